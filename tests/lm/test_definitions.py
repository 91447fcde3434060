"""Every threat model equals its definition, computed one request or question at a time."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import softplus

from llm_attack.base.errors import UsageError
from llm_attack.lm.engine import scoring
from llm_attack.lm.engine.choices import ChoiceScores
from llm_attack.lm.engine.scoring import look_up
from llm_attack.lm.packing.questions import Question, Request

TASKS = ["demo_arc_challenge", "demo_piqa", "demo_winogrande"]


# Steps that know which tokens are one example's, or one ball's: settings, and their definition.
SHAPES = [
    ({"attack": "mifgsm", "steps": 3, "epsilon": 0.01, "decay": 0.5}, {"decay": 0.5}),
    ({"attack": "bim", "steps": 3, "epsilon": 0.2, "norm": "l2"}, {"norm": "l2"}),
    ({"attack": "bim", "steps": 3, "epsilon": 0.05, "norm": "l2_token"}, {"norm": "l2_token"}),
]
SHAPE_NAMES = ["mifgsm", "l2", "l2_token"]


def answers(lm, task):
    return [ll for ll, _ in lm.loglikelihood(task.instances, disable_tqdm=True)]


def questions(task):
    grouped = {}
    for i, request in enumerate(task.instances):
        grouped.setdefault(request.doc_id, []).append(i)
    return list(grouped.values())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("settings", "definition"),
    [
        ({"attack": "fgsm"}, {}),
        ({"attack": "fgsm", "epsilon": 0.002, "loss": "continuation"}, {"continuation": True}),
        ({"attack": "bim", "steps": 3}, {"steps": 3, "step": 0.0025}),
        ({"attack": "bim", "steps": 2, "step_size": 0.02}, {"steps": 2, "step": 0.02}),
        ({"attack": "random", "seed": 7}, {"draw": 7}),
        *((own, {**shape, "steps": 3, "step": own["epsilon"] / 4}) for own, shape in SHAPES),
    ],
    ids=["fgsm", "continuation", "bim", "bim-step_size", "random", *SHAPE_NAMES],
)
@pytest.mark.sampled(6)
def test_own_context(exact, build, reference, task, settings, definition):
    task = build(task, 3)
    definition.setdefault("epsilon", settings.get("epsilon", 0.01))
    expected = [reference.alone(r.args, **definition) for r in task.instances]
    assert answers(exact(**settings), task) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("gold", [[0], [2], [0, 1], [0, 1, 2]])
def test_margin_is_cross_entropy_that_does_not_vanish(gold):
    """The cross-entropy is softplus of it, so that the signs of the gradients are the same."""
    is_gold = [i in gold for i in range(3)]
    request = Request((1, 2), 1)
    choices = ChoiceScores([Question([request] * 3, [[0], [1], [2]], is_gold)])

    def gradients(scores):
        scores = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
        margin = choices.margin(scores, choices.gold)
        odds = scores.softmax(0)[gold].sum()
        if 0 < odds < 1:
            assert torch.allclose(softplus(margin), -odds.log(), rtol=1e-12)
        return [torch.autograd.grad(loss, scores)[0] for loss in (margin.sum(), -odds.log())]

    slope, of_cross_entropy = gradients([-3.0, -4.0, -2.5])
    assert torch.equal(slope.sign(), of_cross_entropy.round(decimals=12).sign())
    slope, _ = gradients([-3.0 + 1e4 * i for i in map(float, is_gold)])
    assert (slope == 0).all() if len(gold) == 3 else slope.abs().sum() == pytest.approx(2)
    if len(gold) < 3:  # nor do those of choices out of reach, in whichever direction
        slope, _ = gradients([-3.0, -1e4, -1e4])
        assert torch.equal(slope.sign(), torch.tensor([1 - 2 * i for i in is_gold]).double())


def choice_loss(gold, lengths):
    def loss(log_likelihoods, _):
        return -(log_likelihoods / lengths).log_softmax(0)[gold]

    return loss


def gold_of(task, doc):
    return task.doc_to_text(doc) if task.multiple_input else int(task.doc_to_target(doc))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("score", ["acc", "acc_norm"])
@pytest.mark.parametrize(("attack", "steps"), [("fgsm", 1), ("bim", 3)])
@pytest.mark.parametrize("packing", ["tree", "off"])
@pytest.mark.sampled(6)
def test_choice(exact, build, reference, task, score, attack, steps, packing):
    task = build(task, 3)
    if score not in task.aggregation():
        lm = exact(attack=attack, loss="choice", score=score)
        with pytest.raises(UsageError, match=f"score={score}: must be a score of the tasks"):
            answers(lm, task)
        return
    expected = []
    for indices in questions(task):
        requests = [task.instances[i] for i in indices]
        doc = requests[0].doc
        lengths = [len(c) if score == "acc_norm" else 1 for c in task.doc_to_choice(doc)]
        loss = choice_loss(gold_of(task, doc), torch.tensor(lengths))
        step = 0.01 if attack == "fgsm" else 0.0025
        expected += reference.together([r.args for r in requests], loss, steps=steps, step=step)
    lm = exact(attack=attack, steps=steps, loss="choice", score=score, packing=packing)
    assert answers(lm, task) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", ["sequence", "continuation"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("packing", ["tree", "off"])
@pytest.mark.sampled(4)
def test_shared_context(exact, build, reference, task, loss, packing):
    """The loss of a question is the sum of its requests' losses: a shared token counts in each."""
    task = build(task, 3)
    ascended = {
        "sequence": lambda _, sequence: sequence.sum(),
        "continuation": lambda continuation, _: -continuation.sum(),
    }
    expected = []
    for indices in questions(task):
        requests = [task.instances[i].args for i in indices]
        expected += reference.together(requests, ascended[loss])
    lm = exact(attack="fgsm", loss=loss, context="shared", packing=packing)
    assert answers(lm, task) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("packing", ["tree", "off"])
@pytest.mark.parametrize(("settings", "definition"), SHAPES, ids=SHAPE_NAMES)
@pytest.mark.sampled(6)
def test_shared_balls(exact, build, reference, settings, definition, task, packing):
    """A question has one ball and one momentum, however its tokens are laid out."""
    task = build(task, 3)
    expected = []
    for indices in questions(task):
        requests = [task.instances[i].args for i in indices]
        shape = {**definition, "epsilon": settings["epsilon"], "step": settings["epsilon"] / 4}
        total = lambda _, sequence: sequence.sum()  # noqa: E731
        expected += reference.together(requests, total, steps=3, **shape)
    lm = exact(context="shared", packing=packing, **settings)
    # a Llama normalises in float32 all the same, and L2 steps carry that on, where signs do not
    assert answers(lm, task) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("attack", "steps"), [("fgsm", 1), ("bim", 3)])
@pytest.mark.sampled(3)
def test_margin(exact, build, reference, task, attack, steps):
    """Raised is the best of the other choices against the gold; the rest count for nothing."""
    task = build(task, 3)
    expected = []
    for indices in questions(task):
        requests = [task.instances[i] for i in indices]
        gold = gold_of(task, requests[0].doc)

        def loss(scores, _, gold=gold):
            others = [score for i, score in enumerate(scores) if i != gold]
            return torch.stack(others).max() - scores[gold]

        step = 0.01 if attack == "fgsm" else 0.0025
        expected += reference.together([r.args for r in requests], loss, steps=steps, step=step)
    lm = exact(attack=attack, steps=steps, loss="margin")
    assert answers(lm, task) == pytest.approx(expected, abs=1e-6)


def test_gap_is_what_decides():
    request = Request((1, 2), 1)
    gold = [[False, True, False], [True, False, True], [True, True]]
    asked = [Question([request] * len(g), [[i] for i in range(len(g))], g) for g in gold]
    scores = torch.tensor([-3.0, -2.0, -2.5, -3.0, -1.0, -4.0, -1.0, -2.0])
    assert ChoiceScores(asked).gap(scores).tolist() == [-0.5, 2.0, 0.0]


@pytest.mark.parametrize(("attack", "steps"), [("ost", 1), ("illc", 3)])
@pytest.mark.sampled(2)
def test_least_likely(exact, build, reference, attack, steps):
    task = build("demo_arc_challenge", 4)
    clean = answers(exact(attack="none"), task)
    expected = []
    for indices in questions(task):
        requests = [task.instances[i] for i in indices]
        gold = gold_of(task, requests[0].doc)
        target = min((i for i in range(len(indices)) if i != gold), key=lambda i: clean[indices[i]])
        loss = choice_loss(target, torch.ones(len(indices)))

        def descended(log_likelihoods, sequence, loss=loss):
            return -loss(log_likelihoods, sequence)

        step = 0.01 if attack == "ost" else 0.0025
        args = [r.args for r in requests]
        expected += reference.together(args, descended, steps=steps, step=step)
    lm = exact(attack=attack, steps=steps, loss="choice")
    assert answers(lm, task) == pytest.approx(expected, abs=1e-6)


def test_one_token_choices_have_perturbations_of_their_own(exact, build, reference):
    """Requests that differ in their last token alone read the same tokens, and are not merged."""
    task = build("demo_arc_challenge", 1)
    context, _ = task.instances[0].args
    words = [" " + w for w in reference.tokenizer.get_vocab() if w.isalpha()][:3]
    requests = []
    for i, word in enumerate(words):
        request = type(task.instances[0])("loglikelihood", {}, (context, word), i)
        request.task_name, request.doc_id = "one token", 0
        requests.append(request)
    lm = exact(attack="fgsm", logits_cache=True)
    expected = [reference.alone(r.args) for r in requests]
    found = [ll for ll, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", ["sequence", "choice"])
@pytest.mark.sampled(2)
def test_float32_follows_the_gradient_not_its_rounding(reused, exact, build, loss):
    """The demo model is sure of most tokens, where log-softmax's own gradient would be noise."""
    for name in TASKS:
        task = build(name, 6)
        settings = {"attack": "fgsm", "loss": loss}
        assert answers(reused(**settings), task) == pytest.approx(
            answers(exact(**settings), task), abs=1e-3
        )


def test_look_up():
    """Log-softmax and its gradient, precise where a token is nearly certain."""
    logits = torch.tensor([[0.0, 30.0, 1.0], [2.0, 2.0, -1.0]], requires_grad=True)
    slot, target = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2, 0, 2])
    scores = look_up(logits, slot, target, torch.float32)
    exact = logits.double().log_softmax(-1)[slot, target]
    assert torch.allclose(scores.log_prob.double(), exact, rtol=1e-6, atol=1e-14)
    assert scores.greedy.tolist() == [True, False, True, False]
    (found,) = torch.autograd.grad(scores.log_prob[0], logits)
    (expected,) = torch.autograd.grad(exact[0], logits)
    assert torch.allclose(found, expected, rtol=1e-5, atol=0)
    assert found[0, 1] > 0  # log-softmax in float32 has 1 - 1 = 0 there


@given(st.data())
def test_look_up_is_log_softmax(data):
    """Any predictions, several of them at one position, of logits in any number of slices."""
    rows, words = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(rows, words, dtype=torch.float64, generator=generator) * 4
    pairs = st.tuples(st.integers(0, rows - 1), st.integers(0, words - 1))
    slot, target = torch.tensor(data.draw(st.lists(pairs, min_size=1, max_size=12))).T
    weights = torch.randn(len(slot), dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    with patch.object(scoring, "_slices", lambda x: [slice(0, 4), slice(4, len(x))]):
        scores = look_up(logits, slot, target, torch.float64)
        (found,) = torch.autograd.grad((scores.log_prob * weights).sum(), logits)
    expected = logits.log_softmax(-1)[slot, target]
    assert torch.allclose(scores.log_prob, expected, atol=1e-12)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    assert torch.allclose(found, gradient, atol=1e-12)
    assert torch.equal(scores.greedy, logits.argmax(-1)[slot] == target)
