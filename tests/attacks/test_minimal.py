"""Searches for the nearest wrong answer: closed forms, adv-lib's FMN step by step, invariants."""

import sys
from functools import partial
from importlib.util import find_spec
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from llm_attack.attacks import Attack, perturb

from .helpers import MINIMAL, Counted, attacked, rng

DUAL = {"linf": 1, "l2": 2}
ORDER = {"linf": torch.inf, "l2": 2}


class Classifier:
    """A network in float64, images in [0, 1], and the margin by which they are wrong."""

    def __init__(self, n=6):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = nn.Flatten(), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 5)
            self.network = nn.Sequential(*layers).double().eval().requires_grad_(False)
        self.x = torch.rand(n, 3, 16, generator=rng(1), dtype=torch.float64)
        self.labels = self.network(self.x).argmax(1)

    def gap(self, point):
        scores = self.network(point)
        own = scores.gather(1, self.labels[:, None])
        return (scores.scatter(1, self.labels[:, None], -torch.inf).amax(1) - own[:, 0]).clone()

    def lengths(self, point, norm):
        return (point - self.x).flatten(1).norm(ORDER[norm], dim=1)


def adv_lib(monkeypatch):
    """Its module of FMN."""
    for name in ("torchvision", "visdom"):  # asked for by modules that it has no need of
        if find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, MagicMock())
    return pytest.importorskip(
        "adv_lib.attacks.fast_minimum_norm", reason="adv_lib is not installed: make attack-libs"
    )


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("name", MINIMAL)
def test_on_a_linear_margin_it_is_the_margin_over_the_dual_norm(name, norm):
    w = torch.randn(4, 9, generator=rng(2), dtype=torch.float64)
    margin = torch.tensor([0.5, -0.3, 2.0, 0.0], dtype=torch.float64)
    x = torch.randn(4, 9, generator=rng(3), dtype=torch.float64)
    attack = Attack(name, 3.0, norm=norm, steps=60, rounds=30)
    got = attacked(attack, x, lambda point: ((point - x) * w).sum(1) - margin)
    expected = margin.clamp(min=0) / w.norm(DUAL[norm], dim=1)
    found = (got - x).norm(ORDER[norm], dim=1)
    # fmn shrinks its radius by no less than a thousandth, bisection ends at two
    assert torch.allclose(found, expected, rtol=3e-3, atol=1e-6)
    assert (found[margin > 0] > expected[margin > 0]).all()  # on the far side of the boundary
    assert torch.equal(got[1], x[1])  # wrong already


@pytest.mark.parametrize("steps", (10, 30, 100))
@pytest.mark.parametrize("norm", DUAL)
def test_fmn_equals_adv_lib(norm, steps, monkeypatch):
    """Lengths, and in L-infinity points: in L2 rounding decides which of two equal lengths counts.

    (Its projection in L2 also draws shorter steps out to the sphere, which that of the paper and of
    its authors' code does not. With a first step as long as here there are none that matter.)
    """
    library = adv_lib(monkeypatch)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of its radii
    try:
        at = Classifier()
        theirs = library.fmn(at.network, at.x, at.labels, norm=ORDER[norm], steps=steps)
    finally:
        torch.set_default_dtype(before)
    attack = Attack("fmn", 1e9, steps=steps, norm=norm, step_size=1.0)
    got = perturb(attack, at.x, at.gap, bounds=(0, 1))
    found = at.gap(theirs) > 0
    assert found.sum() >= 5
    assert (at.lengths(got, norm) - at.lengths(theirs, norm))[found].abs().max() <= 1e-12
    # of the others theirs is the clean image; one stays on the boundary, where L2's steps end
    assert (at.gap(got) > 0).all()
    if norm == "linf":
        assert (got - theirs).abs().max() <= 1e-12


class Linear:
    """Margins of the first of two classes, which are linear: the distance has a closed form."""

    def __init__(self, n, dtype, width=64):
        # each example has weights of its own, as those are what the network is linear in
        self.x, self.w = (torch.randn(n, width, generator=rng(i), dtype=dtype) for i in (4, 5))
        self.margin = torch.rand(n, generator=rng(6), dtype=dtype)

    def gap(self, point):
        return ((point - self.x) * self.w).sum(1) - self.margin

    def __call__(self, point):
        return torch.stack([torch.zeros_like(self.margin), self.gap(point)], 1)

    def distance(self, norm):
        return self.margin / self.w.norm(DUAL[norm], dim=1)


@pytest.mark.parametrize("steps", (1, 3, 30))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("norm", DUAL)
def test_fmn_finds_every_wrong_answer_of_a_linear_margin(norm, dtype, steps):
    """Also where the estimate of the distance leads to the boundary, and rounding decides."""
    at = Linear(400, dtype)
    exact = at.distance(norm)
    epsilon = exact.quantile(0.7).item()
    for step_size in (None, epsilon / 100):  # with short steps the ball is not yet filled
        got = perturb(
            Attack("fmn", epsilon, steps=steps, norm=norm, step_size=step_size), at.x, at.gap
        )
        length = (got - at.x).norm(ORDER[norm], dim=1)
        # in float32 a length has the digits that x has
        allowed = 2e-7 * at.x.abs().max().item() * (1 if norm == "linf" else 8)
        assert (length <= epsilon + allowed).all()
        wrong = at.gap(got) > 0
        assert wrong[exact < epsilon * 0.997].all() and not wrong[exact > epsilon + allowed].any()
        assert torch.equal(got[~wrong], at.x[~wrong])
        assert (length >= exact - allowed)[wrong].all()
        if norm == "l2":  # in L-infinity few steps do not fill the ball
            assert (length <= 1.0021 * exact + allowed)[wrong].all()


@pytest.mark.parametrize("norm", DUAL)
def test_of_linear_margins_adv_lib_finds_fewer_and_none_nearer(norm, monkeypatch):
    library = adv_lib(monkeypatch)
    at = Linear(400, torch.float32)
    labels = torch.zeros(400, dtype=torch.int64)
    # theirs knows no ball but has a box, which ours has not: it is far away
    scaled = partial(library.fmn, lambda p: at(p * 200 - 100), (at.x + 100) / 200, labels)
    theirs = scaled(norm=ORDER[norm], steps=30)
    theirs = theirs * 200 - 100
    got = perturb(Attack("fmn", 100.0, steps=30, norm=norm), at.x, at.gap)
    lengths = [(point - at.x).norm(ORDER[norm], dim=1) for point in (got, theirs)]
    found = [at.gap(point) > 0 for point in (got, theirs)]
    assert found[0].all() and not found[1].all()
    assert (lengths[0] <= 1.0021 * at.distance(norm) + 1e-5).all()


@pytest.mark.parametrize("norm", DUAL)
def test_the_two_agree(norm):
    at = Classifier()
    near = {
        name: at.lengths(perturb(Attack(name, 2.0, steps=40, norm=norm), at.x, at.gap), norm)
        for name in MINIMAL
    }
    assert torch.allclose(near["fmn"], near["critical"], rtol=0.02)


@pytest.mark.parametrize("name", MINIMAL)
def test_no_wrong_answer_within_epsilon(name):
    """One of the examples has its boundary outside of the ball."""
    at = Classifier()
    far = at.lengths(perturb(Attack(name, 9.0, steps=40), at.x, at.gap), "linf")
    epsilon = far.sort().values[-2:].mean().item()
    got = perturb(Attack(name, epsilon, steps=40), at.x, at.gap)
    assert (at.lengths(got, "linf") <= epsilon * (1 + 1e-12)).all()
    assert torch.equal(at.gap(got) > 0, far < epsilon)
    (left,) = (far > epsilon).nonzero()[:, 0].tolist()
    if name == "fmn":
        assert torch.equal(got[left], at.x[left])
    else:  # what apgd found at epsilon
        apgd = perturb(Attack("apgd", epsilon, steps=40), at.x, at.gap)
        assert torch.allclose(got[left], apgd[left], rtol=0, atol=1e-12)


def test_critical_tries_epsilon_then_the_first_epsilon_then_between():
    """Radii as they are seen by a loss that is above 0 where the point is 0.1 away."""
    x = torch.zeros(1, 4)
    loss = Counted(lambda point: point.sum(1) - 0.4)
    attack = Attack("critical", 0.8, steps=1, rounds=5, first_epsilon=0.05)
    got = perturb(attack, x, loss)
    tried = [0.8, 0.05, (0.8 * 0.05) ** 0.5, 0.1, ((0.8 * 0.05) ** 0.5 * 0.1) ** 0.5]
    seen = [point.abs().max().item() for point in loss.points]
    assert all(any(abs(s - t) < 1e-6 for s in seen) for t in (0.8, 0.05, tried[2]))
    assert 0.1 <= got.max() <= tried[2]
    rounds = perturb(Attack("critical", 0.8, steps=1, rounds=1), x, loss)
    assert torch.allclose(rounds, torch.full_like(x, 0.8))


@pytest.mark.parametrize("name", MINIMAL)
def test_a_bigger_ball_does_not_change_what_is_near(name):
    at = Classifier()
    attacks = (Attack(name, e, steps=50, rounds=20, step_size=0.2) for e in (0.5, 1.0))
    small, big = (at.lengths(perturb(attack, at.x, at.gap), "linf") for attack in attacks)
    assert torch.allclose(small, big, rtol=0.02)


@pytest.mark.parametrize("name", MINIMAL)
def test_with_a_ball_for_each_token_it_is_the_margin_over_the_sum_of_their_norms(name):
    """The largest of the tokens' lengths is a norm; its dual is the sum of the tokens' lengths."""
    w = torch.randn(3, 4, 5, generator=rng(2), dtype=torch.float64)
    margin = torch.tensor([0.5, -0.3, 2.0], dtype=torch.float64)
    x = torch.randn(3, 4, 5, generator=rng(3), dtype=torch.float64)
    attack = Attack(name, 3.0, norm="l2", per_token=True, steps=60, rounds=30)
    got = attacked(attack, x, lambda point: ((point - x) * w).flatten(1).sum(1) - margin)
    expected = margin.clamp(min=0) / w.norm(dim=2).sum(1)
    found = (got - x).norm(dim=2).amax(1)
    assert torch.allclose(found, expected, rtol=3e-3, atol=1e-6)
    assert (found[margin > 0] > expected[margin > 0]).all()
    assert torch.equal(got[1], x[1])
