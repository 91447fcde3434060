"""How often the model runs: each attack's forwards and backwards, counted at the head."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from llm_attack.attacks import ATTACKS, Attack, Losses, perturb, trajectory
from llm_attack.attacks.settings import BATTERIES
from llm_attack.base.errors import UsageError
from llm_attack.harness.requests import encode, questions_of
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.settings import AttackSettings
from llm_attack.suite.run.cost import passes

STEPS, TARGETS, ROUNDS, QUERIES = 10, 3, 2, 7
# (forwards, backwards) of each attack alone, on questions of four choices.
ALONE = {
    "none": (1, 0),
    "random": (1, 0),
    "uniform": (1, 0),
    "gaussian": (1, 0),
    "fgsm": (2, 1),
    "ost": (3, 1),  # the clean answers choose the target
    "bim": (STEPS + 1, STEPS),
    "illc": (STEPS + 2, STEPS),
    "pgd": (STEPS + 1, STEPS),
    "mifgsm": (STEPS + 1, STEPS),
    "apgd": (STEPS + 1, STEPS),  # the best point's answers are those it was found with
    # a gap for the clean point, and for each target, of which one is the answer
    "apgdt": (1 + TARGETS * (STEPS + 2), TARGETS * STEPS),
    "blocks": (QUERIES, 0),
    "fmn": (1 + STEPS + 1, 1 + STEPS),  # the first is for the estimate from the clean point
    "critical": (1 + ROUNDS * (STEPS + 1), 1 + ROUNDS * (STEPS - 1)),
    "reversed": (2, 1),
}
# Of several conditions.
TOGETHER = [
    (["none", "random"], (2, 0)),
    (["none", "fgsm"], (2, 1)),
    (["fgsm", "apgd"], (STEPS + 2, STEPS)),
    (["none", "fgsm", "bim", "apgd"], (1 + 1 + STEPS + STEPS, 1 + 2 * (STEPS - 1))),
    (["none", "pgd"], (STEPS + 2, STEPS)),
]


def settings(name, epsilon="0.3rms", **more):
    how = {"steps": STEPS, "rounds": ROUNDS, "queries": QUERIES, "loss": "choice", **more}
    return AttackSettings(name, epsilon, **how)


@contextmanager
def counted(engine):
    """[forwards, backwards] that reach the head of the model, or of its copy, while it lasts."""
    counts = [0, 0]

    def look(module, args, output):
        counts[0] += 1
        if output.requires_grad:
            output.register_hook(lambda _: counts.__setitem__(1, counts[1] + 1))

    models = {scorer.model for scorer in (engine.scorer, *engine.slopes.values())}
    handles = [m.get_output_embeddings().register_forward_hook(look) for m in models]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def packed(lm, requests):
    questions = questions_of(requests, encode(lm, requests), lm.settings)
    (batch,) = lm.batches(questions, 1000)
    return lm.engine.pack(batch)


@pytest.fixture(scope="module")
def asked(build):
    return build("demo_arc_easy", 2).instances


def run(lm, asked, conditions):
    """The passes of a batch, and its answers (conditions, predictions)."""
    lm.use(*conditions)
    pack = packed(lm, asked)
    with frozen(lm.model), counted(lm.engine) as counts:
        computed = lm.engine.compute(pack)
    estimated = passes(lm.engine.attacks, TARGETS, apart=bool(lm.engine.slopes))
    assert counts[1] == estimated.gradients
    assert counts[0] == sum(estimated) - estimated.first
    return tuple(counts), computed


def recorded(computed):
    """What each condition says that it takes by itself, forward and backward."""
    return [
        tuple(float(sums[name] / sums["points"]) for name in ("forwards", "backwards"))
        for sums in computed.sums
    ]


def test_the_table_has_every_attack():
    assert ALONE.keys() == ATTACKS.keys()


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.sampled(2)
def test_alone(name, reused, asked):
    counts, computed = run(reused(), asked, [settings(name)])
    assert counts == ALONE[name]
    assert recorded(computed) == [ALONE[name]]


@pytest.mark.parametrize(("names", "expected"), TOGETHER, ids=lambda value: str(value))
@pytest.mark.sampled(2)
def test_together(names, expected, reused, asked):
    counts, computed = run(reused(), asked, [settings(name) for name in names])
    assert counts == expected
    assert recorded(computed) == [ALONE[name] for name in names]


@pytest.mark.parametrize("name", ["bim", "apgdt", "critical"])
@pytest.mark.sampled(3)
def test_passes_that_are_recorded_with_another_model_for_gradients(name, reused, asked):
    counts, computed = run(reused(gradient_dtype="bfloat16"), asked, [settings(name)])
    assert recorded(computed) == [counts]


def test_passes_of_a_battery_are_those_of_its_attacks(reused, build, monkeypatch):
    """Of one question, which all attacks meet: too small an amplitude breaks nothing."""
    members = (("apgdt", {"steps": 2}), ("fmn", {"steps": 3}), ("blocks", {"queries": 4}))
    kind = BATTERIES["standard-1"]
    monkeypatch.setitem(BATTERIES, "standard-1", replace(kind, members=members))
    one = build("demo_arc_easy", 1).instances
    lm = reused()
    lm.use(settings("standard-1", "1e-9rms", loss="margin"))
    pack = packed(lm, one)
    with frozen(lm.model), counted(lm.engine) as counts:
        computed = lm.engine.compute(pack)
    assert computed.broken_by == [[None]]
    assert recorded(computed) == [tuple(counts)]


@pytest.mark.parametrize("loss", ["sequence", "choice"])
@pytest.mark.parametrize("name", ["apgd", "apgdt", "blocks", "critical", "fmn"])
@pytest.mark.sampled(3)
def test_answers_that_are_kept_are_those_of_the_point(name, loss, exact, asked):
    """A forward at the attacked point gives the same, in float64."""
    if loss == "sequence" and (ATTACKS[name].targeted or ATTACKS[name].minimal):
        pytest.skip("needs a loss that knows the gold")
    lm = exact()
    lm.use(settings("none", loss=loss), settings(name, loss=loss, restarts=2))
    pack = packed(lm, asked)
    with frozen(lm.model):
        batches = lm.engine.prepared(pack, _needs(lm))
        (batch,) = batches.values()
        attacked = batch.attack(lm.engine.attacks[1])
        again = batch.answers(attacked.x)
    assert attacked.scores is not None
    assert torch.allclose(attacked.scores.log_prob, again.log_prob, rtol=1e-9, atol=1e-9)
    assert torch.equal(attacked.scores.greedy, again.greedy)
    assert not torch.allclose(again.log_prob, batch.clean.scores.log_prob, atol=1e-6)


def _needs(lm):
    from llm_attack.lm.engine.clean import Needs

    return Needs.of(lm.engine.attacks)


@pytest.mark.parametrize("loss", ["sequence", "choice"])
@pytest.mark.parametrize("name", ["bim", "mifgsm", "pgd", "illc"])
@pytest.mark.sampled(4)
def test_a_curve_over_steps_is_one_run(name, loss, reused, asked):
    """Every step count gives what it gives alone: the same points, and the same answers."""
    if name == "illc" and loss == "sequence":
        pytest.skip("needs a loss that knows the gold")
    lm, steps = reused(), (5, 1, STEPS, 2)
    curve = [settings(name, steps=n, loss=loss) for n in steps]
    counts, computed = run(lm, asked, curve)
    alone, _ = run(lm, asked, [settings(name, loss=loss)])
    assert counts == alone
    for condition, scores, sums in zip(curve, computed.scores, computed.sums, strict=True):
        _, expected = run(lm, asked, [condition])
        # log-probabilities of the same point, of forwards that look at other positions
        torch.testing.assert_close(scores, expected.scores[0], rtol=1e-5, atol=1e-5)
        assert {k: float(v) for k, v in sums.items()} == {
            k: float(v) for k, v in expected.sums[0].items()
        }


@pytest.mark.parametrize("name", ["fgsm", "bim", "mifgsm", "pgd", "ost", "illc", "reversed"])
def test_points_of_a_trajectory_are_those_of_fewer_steps(name):
    """To the last bit; of a loss that bends."""
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(2, 3, 7, generator=generator)
    keys = torch.arange(3)

    def loss(point):
        return (w * (point + (3 * point).sin())).sum(1)

    losses = Losses(loss, lambda point: -loss(point))
    points = list(trajectory(Attack(name, 0.3, steps=6), x, losses, keys=keys))
    assert len(points) == (6 if ATTACKS[name].iterative else 1)
    for i, point in enumerate(points, 1):
        assert torch.equal(point, perturb(Attack(name, 0.3, steps=i), x, losses, keys=keys))


def test_gradients_in_bfloat16(reused, asked):
    """Signs are those of float32 but where the gradient is lost in rounding; answers stay."""
    plain, half = reused(), reused(gradient_dtype="bfloat16")
    conditions = [settings(name, loss="sequence") for name in ("none", "fgsm", "bim", "apgd")]
    _, expected = run(plain, asked, conditions)
    counts, found = run(half, asked, conditions)
    # the clean answers, and those at each end, are apart from the gradients
    gradients = 1 + 2 * (STEPS - 1)
    assert counts == (1 + 3 + gradients + 1, gradients)
    _, untouched = run(plain, asked, [settings(n, loss="sequence") for n in ("none", "random")])
    assert torch.equal(found.scores[0].log_prob, untouched.scores[0].log_prob)
    clean = expected.scores[0].log_prob
    torch.testing.assert_close(found.scores[0].log_prob, clean, rtol=1e-5, atol=1e-5)
    slopes = []
    plain.use(*conditions)
    for lm in (plain, half):
        with frozen(lm.model):
            (batch,) = lm.engine.prepared(packed(lm, asked), _needs(lm)).values()
        slopes.append(batch.clean.gradient)
        assert batch.clean.gradient.dtype == torch.float32
    # a sign is lost where the gradient is below its error: an error of relative size e turns
    # about e / pi of normal signs; a network of some layers has a few units of 2 ** -8
    error = (slopes[1] - slopes[0]).norm() / slopes[0].norm()
    assert 0 < error < 16 * torch.finfo(torch.bfloat16).eps
    same = (slopes[0].sign() == slopes[1].sign()).double().mean()
    assert 1 - 16 * torch.finfo(torch.bfloat16).eps < same < 1
    # the attack itself is as strong
    harms = [float((clean - c.scores[1].log_prob).sum()) for c in (expected, found)]
    assert harms[1] == pytest.approx(harms[0], rel=0.05) and harms[0] > 0
    info = [half.attack_info(i)["gradient_dtype"] for i in range(4)]
    assert info == [None, "bfloat16", "bfloat16", "bfloat16"]
    assert {w.dtype for w in half.model.parameters()} == {torch.float32}
    weights = {w.data_ptr(): w.nbytes for w in half.model.parameters()}
    assert half.copy_bytes == sum(weights.values()) / 2 and plain.copy_bytes == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dtype": "bfloat16"}, "of fewer bits than the model's dtype, which is torch.bfloat16"),
        ({"attack": "fmn", "loss": "choice"}, "must be left out with attack=fmn"),
        ({"gradient_dtype": "float8"}, "gradient_dtype=float8: must be one of bfloat16"),
        ({"mixed_precision_dtype": "bfloat16"}, "left out with mixed precision"),
    ],
)
def test_refused_gradient_dtypes(arguments, says, make):
    with pytest.raises(UsageError, match=says):
        make(**{"gradient_dtype": "bfloat16", **arguments})


def test_no_copy_where_nothing_follows_a_gradient(make):
    assert make(attack="random", gradient_dtype="bfloat16").copy_bytes == 0


@pytest.mark.parametrize("how", [{"gradient_checkpointing": True}, {"packing": "off"}])
def test_the_copy_is_prepared_as_the_model_is(how, reused, asked):
    """Recomputed blocks are those of the copy, not of the model."""
    lm = reused(gradient_dtype="bfloat16", attack="fgsm", loss="choice", **how)
    other = reused(gradient_dtype="bfloat16", attack="fgsm", loss="choice")
    found = []
    for each in (lm, other):
        with frozen(each.model):
            (batch,) = each.engine.prepared(packed(each, asked), _needs(each)).values()
        found.append(batch.clean.loss)
    assert found[0].float() == pytest.approx(found[1].float(), rel=0.05, abs=0.05)
