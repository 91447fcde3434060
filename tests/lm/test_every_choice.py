"""Attacks that need every choice, and critical epsilons, on a language model."""

from functools import partial

import pytest
import torch
from networks import prepared

from llm_attack.attacks import Elements, Losses, perturb
from llm_attack.harness.requests import encode, questions_of
from llm_attack.lm.engine.choices import ChoiceScores
from llm_attack.lm.packing.questions import Question, Request

TASKS = ["demo_arc_challenge", "demo_winogrande"]
STRONG = ["apgd", "apgdt", "blocks", "fmn", "critical", "uniform", "gaussian"]
EPSILON = 0.004


def batch_of(lm, requests):
    """All questions of the requests in one pack."""
    questions = questions_of(requests, encode(lm, requests), lm.settings)
    (batch,) = lm.batches(questions)
    return prepared(lm.engine.scorer, lm.engine.pack(batch), lm.settings.threat)


@pytest.mark.parametrize("gold", [[0], [2], [0, 3]])
def test_lead_and_gap_are_differences_of_scores(gold):
    scores = [-3.0, -1.5, -4.0, -2.0]
    request = Request((1, 2), 1)
    whole = Question([request] * 4, [[i] for i in range(4)], [i in gold for i in range(4)])
    short = Question([request] * 2, [[0], [1]], [True, False])
    choices = ChoiceScores([whole, short])
    values = torch.tensor([*scores, -1.0, -5.0], dtype=torch.float64)
    best = max(scores[i] for i in gold)
    others = [scores[i] for i in range(4) if i not in gold]
    leads = [choices.lead(values, k).tolist() for k in range(choices.most_others)]
    assert [lead[0] for lead in leads] == pytest.approx([best - s for s in others])
    assert [lead[1] for lead in leads] == [4.0] + [0.0] * (len(others) - 1)
    assert choices.gap(values).tolist() == pytest.approx([max(others) - best, -4.0])


@pytest.mark.parametrize("attack", STRONG)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.sampled(5)
def test_the_layout_does_not_matter(exact, build, task, attack):
    settings = {"attack": attack, "loss": "margin", "steps": 2, "queries": 5, "rounds": 3}
    task = build(task, 2)
    found = []
    for more in ({"packing": "tree"}, {"packing": "off"}, {"packing": "tree", "batch_size": 1}):
        lm = exact(epsilon=EPSILON, **settings, **more)
        found.append([ll for ll, _ in lm.loglikelihood(task.instances, disable_tqdm=True)])
    # the model's layer norms compute in float32, and not all of these follow signs alone
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2", "l2_token"])
def test_first_order_is_the_margin_over_the_dual_norm_of_its_gradient(exact, build, norm):
    lm = exact(loss="margin", norm=norm)
    at = batch_of(lm, build("demo_arc_challenge", 3).instances)
    found = at.alignment(lm.attack)[:, 3]
    x = at.x.requires_grad_(True)
    gaps = at.gap(x)
    for i, gap in enumerate(gaps):
        (slope,) = torch.autograd.grad(gap, x, retain_graph=True)
        slope = slope.flatten(0, -2)
        dual = {
            "linf": slope.abs().sum(),
            "l2": slope.norm(),
            "l2_token": slope.norm(dim=1).sum(),
        }[norm]
        assert found[i].item() == pytest.approx(max(-gap.item(), 0) / dual.item(), rel=1e-4)


def test_critical_epsilon_is_the_length_of_what_was_found(exact, build):
    lm = exact(attack="critical", loss="margin", epsilon=0.02, steps=5, rounds=6)
    at = batch_of(lm, build("demo_arc_challenge", 6).instances)
    point = at.attack(lm.attack).x
    critical = at.critical_epsilon(lm.attack, point, at.answers(point))
    wrong = at.gap(at.x) > 0
    assert torch.equal(critical == 0, wrong)
    assert critical.isfinite().all() and (at.gap(point) > 0).all()
    assert torch.allclose((point - at.x).flatten(1).abs().amax(1), critical)
    assert (critical[~wrong] > 0).all() and (critical <= lm.attack.epsilon).all()
    few = exact(attack="critical", loss="margin", epsilon=1e-6)
    (right,) = (~wrong).nonzero(as_tuple=True)
    censored = batch_of(few, build("demo_arc_challenge", 6).instances)
    point = censored.attack(few.attack).x
    assert torch.isinf(
        censored.critical_epsilon(few.attack, point, censored.answers(point))[right]
    ).all()


@pytest.mark.parametrize("unit", ["neftune", "token_norm"])
def test_units_of_a_request(exact, build, unit):
    """NEFTune: the L2 norm of the noise is alpha times root(tokens * width) over that, so alpha."""
    lm = exact(attack="random", epsilon=0.5, epsilon_unit=unit)
    at = batch_of(lm, build("demo_arc_challenge", 2).instances)
    point = at.attack(lm.attack).x
    noise = point - at.x
    if unit == "neftune":
        lengths = noise.flatten(1).norm(dim=1)
        assert torch.allclose(lengths, torch.full_like(lengths, 0.5), rtol=1e-6)
        return
    mean = lm.model.get_input_embeddings().weight.norm(dim=1).mean()
    lengths = noise.norm(dim=-1)[at.mask]
    assert torch.allclose(lengths, (0.5 * mean).expand_as(lengths), rtol=1e-6)


def test_towards_every_other_choice_is_no_weaker(exact, build):
    """apgdt keeps the best of its ways: as good as apgd down the lead over any one choice."""
    lm = exact(attack="apgdt", loss="margin", epsilon=EPSILON, steps=4)
    at = batch_of(lm, build("demo_arc_challenge", 4).instances)
    point = at.attack(lm.attack).x
    reached = at.gap(point)
    choices = at.read.choices

    def lead(other, x):
        return choices.lead(at.read.sums(at.watched(x)), other)

    for other in range(choices.most_others):
        losses = Losses(at.loss, target_losses=[partial(lead, other)], gap=at.gap)
        elements = Elements(at.mask, at.examples)
        alone = perturb(lm.attack, at.x, losses, elements=elements)
        assert (reached >= at.gap(alone) - 1e-6).all()
