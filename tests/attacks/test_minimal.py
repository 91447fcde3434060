"""The nearest wrong answer: closed forms, adv-lib's FMN step by step, and what must always hold."""

import sys
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
    for name in ("torchvision", "visdom"):  # asked for by modules that it has no need of
        if find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, MagicMock())
    library = pytest.importorskip(
        "adv_lib.attacks.fast_minimum_norm", reason="adv_lib is not installed: make attack-libs"
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of its radii
    try:
        at = Classifier()
        theirs = library.fmn(at.network, at.x, at.labels, norm=ORDER[norm], steps=steps)
    finally:
        torch.set_default_dtype(before)
    attack = Attack("fmn", 1e9, steps=steps, norm=norm, step_size=1.0)
    got = perturb(attack, at.x, at.gap, bounds=(0, 1))
    assert (at.gap(got) > 0).sum() >= 5
    assert (at.lengths(got, norm) - at.lengths(theirs, norm)).abs().max() <= 1e-12
    if norm == "linf":
        assert (got - theirs).abs().max() <= 1e-12


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
