"""Invariants of every attack, shape, epsilon, step, box, mask and dtype, without tolerance."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llm_attack.attacks import Attack, Elements, Known, Losses, least_likely, perturb, perturb_each

from .helpers import (
    ADAPTIVE,
    ALL_ATTACKS,
    DESCENDING,
    GRADIENT_ATTACKS,
    MINIMAL,
    NOISE,
    STEPPING,
    TARGETED,
    Counted,
    bits,
    closures,
    gradients,
    keys,
    linear,
    rng,
    same_bits,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
EPSILONS = st.one_of(
    st.sampled_from((0.0, 1e-300, 1e-45, 1e-8, 0.01, 8 / 255, 1.0, 1e30)),
    st.floats(0, 4),
)
STEP_SIZES = st.none() | st.sampled_from((1e-45, 2 / 255, 1e30)) | st.floats(1e-6, 4)
BOXES = st.none() | st.sampled_from(((0, 1), (-0.5, 0.5), (0.3, 0.7), (-1e-3, 2e-3)))
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def attacks(draw, names=ALL_ATTACKS):
    name, epsilon = draw(st.sampled_from(names)), draw(EPSILONS)
    return Attack(name, epsilon, steps=draw(st.integers(1, 4)), step_size=draw(STEP_SIZES))


@st.composite
def problems(draw):
    """A point, as drawn or in a box, and the options of `perturb`; some gradients are zero."""
    n, shape, dtype = draw(st.integers(1, 4)), draw(SHAPES), draw(st.sampled_from(DTYPES))
    box, generator = draw(BOXES), rng(draw(st.integers(0, 2**32)))
    x = torch.randn(n, *shape, generator=generator) * draw(st.sampled_from((1e-3, 1, 1e3)))
    x[torch.rand(x.shape, generator=generator) < 0.1] = 0.0
    x = x.to(dtype)
    if box is not None:
        x = x.clamp(*box)
    w = torch.randint(-1, 2, x.shape, generator=generator).to(dtype)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(x.shape[: draw(st.integers(1, x.dim()))], generator=generator) < 0.6
    loss = lambda point: (w * (point + (3 * point).sin())).flatten(1).sum(1)  # noqa: E731
    return x, {
        "loss": Losses(
            loss,
            lambda point: -loss(point) - (w * point**2).flatten(1).sum(1),
            [lambda point: -loss(point), lambda point: (w * point).flatten(1).sum(1)],
        ),
        "bounds": box,
        "elements": Elements(mask),
        "keys": keys(n),
    }


def spread(mask, x):
    return mask.reshape(mask.shape + (1,) * (x.dim() - mask.dim())).expand_as(x)


@settings(max_examples=300, deadline=None)
@given(attacks(), problems())
def test_ball_box_mask_and_determinism(attack, problem):
    x, options = problem
    clean = x.clone()
    got = perturb(attack, x, **options)
    assert (got.shape, got.dtype) == (x.shape, x.dtype)
    if attack.name != "gaussian":
        assert (got >= x - attack.epsilon).all()
        assert (got <= x + attack.epsilon).all()
    if options["bounds"] is not None:
        low, high = torch.tensor(options["bounds"], dtype=x.dtype)
        assert (got >= low).all()
        assert (got <= high).all()
    if options["elements"].mask is not None:
        still = ~spread(options["elements"].mask, x)
        assert torch.equal(bits(got)[still], bits(x)[still])
    if attack.name == "none" or attack.epsilon == 0:
        assert same_bits(got, x)
    assert same_bits(perturb(attack, x, **options), got)
    assert same_bits(x, clean)


@settings(max_examples=100, deadline=None)
@given(st.lists(attacks(), max_size=5), problems())
def test_perturb_each_is_perturb_one_by_one_with_one_clean_gradient(several, problem):
    x, options = problem
    several = [attack for attack in several if attack.name in (*STEPPING, "apgd", "none", *NOISE)]
    expected = [perturb(attack, x, **options) for attack in several]
    losses = options.pop("loss")
    loss, target_loss = Counted(losses.loss), Counted(losses.target_loss)
    each = list(perturb_each(several, x, Losses(loss, target_loss), **options))
    assert len(each) == len(several)
    assert all(same_bits(got, alone) for got, alone in zip(each, expected, strict=True))

    steps = {"loss": 0, "target_loss": 0}
    shared = 0
    for attack in several:
        if attack.epsilon > 0 and attack.name in GRADIENT_ATTACKS:
            n = gradients(attack.name, attack.steps) + (attack.name == "apgd")
            if attack.name in ("fgsm", "bim", "mifgsm", "reversed", "apgd"):
                shared, n = 1, n - 1
            steps["target_loss" if attack.name in TARGETED else "loss"] += n
    assert loss.calls == steps["loss"] + shared
    assert target_loss.calls == steps["target_loss"]
    if shared and not any(a.name == "pgd" for a in several):
        assert same_bits(loss.points[0], x)


def test_perturb_each_takes_no_gradient_that_it_was_given_or_does_not_need():
    x = torch.zeros(2, 3)
    loss = Counted(linear(torch.ones(2, 3)))
    given_one = [Attack("fgsm", 0.1), Attack("fgsm", 0.2)]
    downwards = list(perturb_each(given_one, x, loss, known=Known(gradient=-torch.ones(2, 3))))
    assert [point.unique().item() for point in downwards] == pytest.approx([-0.1, -0.2])
    list(perturb_each([Attack("none"), Attack("random"), Attack("fgsm", 0)], x, loss, keys=keys(2)))
    assert loss.calls == 0


def test_perturb_each_is_lazy():
    """An attack is made when it is asked for; callers hold one point at a time."""
    loss = Counted(linear(torch.ones(2, 3)))
    points = perturb_each([Attack("bim", steps=2), Attack("bim", steps=2)], torch.zeros(2, 3), loss)
    assert loss.calls == 0
    next(points)
    assert loss.calls == 2


def hard_bits(dtype):
    """Zeros of both signs, infinities, subnormals, quiet and signalling NaNs with payloads."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    special = bits(torch.tensor([0.0, -0.0, 1.5, -2.0, math.inf, -math.inf], dtype=dtype))
    nan = bits(torch.tensor([math.inf, -math.inf], dtype=dtype))[:, None] + torch.tensor(
        [1, 5, 63], dtype=integer
    )
    tiny = torch.tensor([1, 2, 3], dtype=integer)
    return torch.cat([special, nan.flatten(), tiny]).view(dtype)[None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL_ATTACKS)
def test_epsilon_0_and_none_return_the_very_bits(name, dtype):
    x = hard_bits(dtype)
    before = bits(x).clone()
    loss = Counted(linear(torch.ones_like(x)))
    attack = Attack(name, 0.5 if name == "none" else 0.0)
    got = perturb(attack, x, bounds=(0, 1), keys=keys(1), **closures(name, loss))
    assert got.dtype == dtype
    assert torch.equal(bits(got), before)
    assert loss.calls == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("random", *GRADIENT_ATTACKS))
def test_masked_infinities_stay_and_harm_nobody(name, dtype):
    x = torch.tensor([[math.inf, -math.inf, 0.0, 0.25]]).to(dtype)
    mask = torch.tensor([[False, False, False, True]])
    loss = linear(torch.ones_like(x))
    got = perturb(
        Attack(name, 0.5), x, elements=Elements(mask), keys=keys(1), **closures(name, loss)
    )
    assert same_bits(got[:, :3], x[:, :3])
    if name in ADAPTIVE:  # whose loss, inf - inf, says nothing of where it would be better
        assert same_bits(got, x)
        return
    assert got[0, 3] == x[0, 3] + (0.5 if got[0, 3] > x[0, 3] else -0.5)


@pytest.mark.parametrize("masked", (True, False))
@pytest.mark.parametrize(
    "name",
    ["fgsm", "bim", "ost", "illc"],
)
def test_negative_zeros_with_a_flat_gradient_stay_negative(name, masked):
    x = torch.full((1, 21), -0.0)
    mask = torch.zeros(1, 21, dtype=torch.bool) if masked else None
    loss = linear(torch.zeros(1, 21))
    assert same_bits(perturb(Attack(name, 0.1), x, Losses(loss, loss), elements=Elements(mask)), x)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "settings", ({"epsilon": 1e300}, {"epsilon": 0.1, "step_size": 1e39}), ids=str
)
@pytest.mark.parametrize("name", ("bim", "illc"))
def test_a_step_larger_than_the_dtype_holds(name, settings, dtype):
    x = torch.ones(1, 4, dtype=dtype)
    loss = linear(torch.tensor([[0, 0, 1, 1]], dtype=dtype))
    got = perturb(Attack(name, **settings), x, Losses(loss, loss))
    assert torch.equal(got[:, :2], x[:, :2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_nan_gradients_make_no_step(name, dtype):
    """Neither where they are nor, elsewhere, for the other coordinates and examples."""
    x = torch.tensor([[0.5, -1.0, 2.0], [0.5, -1.0, 2.0]], dtype=dtype)
    steep = 1e3 if name == "mifgsm" else math.inf  # an infinite norm scales all to zero
    w = torch.tensor([[math.nan, 1, -1], [steep, math.nan, math.nan]], dtype=dtype)
    way = -1 if name in DESCENDING else 1
    attack = Attack(name, 0.25, steps=9)
    got = perturb(attack, x, keys=keys(2), **closures(name, linear(w)))
    start = perturb(attack, x, keys=keys(2), **closures(name, linear(0 * x)))
    nan = w.isnan()
    assert same_bits(got[nan], start[nan])
    assert name == "pgd" or same_bits(start, x)
    if name in ADAPTIVE:  # as above
        assert same_bits(got, x)
        return
    assert torch.equal(got[~nan], (x + way * 0.25 * w.sign())[~nan])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 2**32), st.booleans())
def test_least_likely_is_the_lowest_but_never_the_gold(n, classes, seed, several_gold):
    generator = rng(seed)
    scores = torch.randint(-3, 4, (n, classes), generator=generator).float()  # with ties
    gold = torch.randint(classes, (n,), generator=generator)
    is_gold = torch.arange(classes) == gold[:, None]
    if several_gold:
        is_gold |= torch.rand(n, classes, generator=generator) < 0.3
        assume(not is_gold.all(1).any())
    got = least_likely(scores, is_gold if several_gold else gold)
    assert got.shape == (n,)
    for row, golden, target in zip(scores.tolist(), is_gold.tolist(), got.tolist(), strict=True):
        assert not golden[target]
        assert row[target] == min(s for s, g in zip(row, golden, strict=True) if not g)


def test_least_likely_leaves_out_classes_that_do_not_exist():
    scores = torch.tensor([[1.0, 5.0, math.inf, math.inf], [9.0, -math.inf, 3.0, 7.0]])
    assert least_likely(scores, torch.tensor([0, 1])).tolist() == [1, 2]
    assert scores[0, 2] == math.inf  # the scores are not written to
    assert scores[1, 1] == -math.inf


@pytest.mark.parametrize("norm", ("linf", "l2"))
@pytest.mark.parametrize("name", [name for name in ALL_ATTACKS if name not in MINIMAL])
def test_by_size_lengths_are_shared_among_the_elements_that_move(name, norm):
    """Each example as if it were alone with epsilon and steps that long: by the root of 4, 1, 2."""
    x, w = torch.randn(2, 3, 4, 5, generator=rng(3), dtype=torch.float64)
    mask, own = torch.arange(4) < torch.tensor([[4], [1], [2]]), keys(3)

    def loss(rows):
        return lambda p: (w[rows] * (p + (3 * p).sin())).sum((1, 2))

    attack = Attack(name, 0.2, steps=4, step_size=0.1, norm=norm)
    shared = replace(attack, by_size=True)
    got = perturb(shared, x, elements=Elements(mask), keys=own, **closures(name, loss([0, 1, 2])))
    for i, size in enumerate((4, 1, 2)):
        row: dict = {"elements": Elements(mask[[i]]), "keys": own[[i]], **closures(name, loss([i]))}
        expected = perturb(attack.scaled(size**-0.5), x[[i]], **row)
        assert torch.allclose(got[[i]], expected, rtol=0, atol=1e-12)
