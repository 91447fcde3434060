"""APGD: equal to its authors' code step by step, keeps the best point, examples are independent."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llm_attack.attacks import NORMS, Attack, Elements, Groups, Losses, loss_gradient, perturb
from llm_attack.attacks.apgd import Best, Hill, ascend
from llm_attack.attacks.norms import Ball

from .helpers import Counted, keys, linear, rng

AUTOATTACK = "pyautoattack is not installed: make attack-libs"


class Rough:
    """A network in float64 whose loss has many hills within epsilon, and images in [0, 1]."""

    def __init__(self, n=8):
        self.epsilon = {"linf": 0.25, "l2": 1.5}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            layers = nn.Flatten(), nn.Linear(48, 24), nn.GELU(), nn.Linear(24, 5)
            self.network = nn.Sequential(*layers).double().eval().requires_grad_(False)
        self.network[1].weight.data *= 6
        self.x = torch.rand(n, 3, 4, 4, generator=rng(2), dtype=torch.float64)
        self.labels = self.network(self.x).argmax(1)

    def loss(self, point):
        return F.cross_entropy(self.network(point), self.labels, reduction="none")

    def attacked(self, norm="linf", steps=40, bounds=(0, 1), **more):
        attack = Attack("apgd", self.epsilon[norm], steps=steps, norm=norm, **more)
        return perturb(attack, self.x, self.loss, bounds=bounds, keys=keys(len(self.x)))


@pytest.fixture
def wide():
    """The library keeps losses in torch's default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("steps", [10, 40, 100])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_equals_autoattack(norm, steps, wide):
    """The authors' own, from the same start: every point that it looks at, and what it returns.

    It takes the loss before the first step for zero, where ours looks it up: the same as long as
    the first step gains.
    """
    pytest.importorskip("pyautoattack", reason=AUTOATTACK)
    from pyautoattack.autopgd_base import APGDAttack

    at = Rough()
    their_norm = {"linf": "Linf", "l2": "L2"}[norm]
    theirs = APGDAttack(at.network, n_iter=steps, norm=their_norm, eps=at.epsilon[norm], loss="ce")
    theirs.init_hyperparam(at.x)
    seen = []
    handle = at.network.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().clone())
    )
    best, _, value, _ = theirs.attack_single_run(at.x, at.labels, x_init=at.x)
    their_points, seen[:] = list(seen), []
    got = at.attacked(norm, steps)
    handle.remove()
    assert (at.loss(their_points[1]) > at.loss(at.x)).all()
    assert len(seen) == len(their_points) == steps + 1
    largest = max((a - b).abs().max() for a, b in zip(seen, their_points, strict=True))
    assert largest <= 1e-9
    assert (got - best).abs().max() <= 1e-9
    assert at.loss(got) == pytest.approx(value)


def test_step_sizes_are_halved_at_the_checkpoints():
    """With a loss that only falls: at each it goes back to the start, with half the step."""
    points = []

    def value(point):
        points.append(point.item())
        return torch.tensor([-float(len(points))])

    def slope(point):
        return value(point), torch.ones(1, 1)

    start = torch.zeros(1, 1)
    groups, moves = Groups.rows(start), torch.ones(1, 1, dtype=torch.bool)
    ball = Ball(start, 1e9, NORMS["linf"], groups, groups, moves)
    best = Best(ball)
    assert ascend(start, Hill(value, slope), best, steps=100, step=1.0) == 0
    assert best.value.item() == -1
    moves = torch.tensor(points).diff()
    back = [i for i in range(1, 100) if moves[i] < 0 <= moves[i - 1]]
    assert back == [22, 41, 57, 70, 80, 87, 93, 99]
    for halvings, i in enumerate(back):
        # the momentum forgets three quarters of what was before at each step
        assert moves[i - 1] == pytest.approx(0.5**halvings, rel=0.05)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_returns_the_best_that_it_has_seen(norm):
    at = Rough()
    loss = Counted(at.loss)
    attack = Attack("apgd", at.epsilon[norm], steps=30, norm=norm)
    got = perturb(attack, at.x, loss, bounds=(0, 1))
    values = torch.stack([at.loss(point) for point in loss.points])
    assert torch.equal(at.loss(got), values.max(0).values)
    assert (values.max(0).values > values[-1]).any()  # which is not always the last
    bim = Attack("bim", at.epsilon[norm], steps=30, norm=norm)
    assert at.loss(got).sum() > at.loss(perturb(bim, at.x, at.loss, bounds=(0, 1))).sum()


def test_a_linear_loss_is_at_the_corner_after_one_step():
    x, w = torch.zeros(3, 7), torch.randn(3, 7, generator=rng(1))
    for steps in (1, 10):
        got = perturb(Attack("apgd", 0.5, steps=steps), x, linear(w))
        assert torch.equal(got, 0.5 * w.sign())


def test_each_example_has_step_sizes_of_its_own():
    whole = Rough().attacked()
    for i in range(8):
        at = Rough()
        at.x, at.labels = at.x[i : i + 1], at.labels[i : i + 1]
        assert (at.attacked() - whole[i]).abs().max() <= 1e-9


def test_elements_of_an_example_may_lie_anywhere():
    """Rows, and the same as a flat list of elements in mixed order with an index."""
    at = Rough()
    order = torch.randperm(24, generator=rng(7))
    owner = torch.arange(8).repeat_interleave(3)[order]

    def rows(flat):
        return flat[order.argsort()].reshape(at.x.shape)

    flat = at.x.reshape(24, 4, 4)[order]
    attack, mixed = Attack("apgd", 0.25, steps=20), Elements(examples=Groups(owner, 8))
    got = perturb(attack, flat, lambda point: at.loss(rows(point)), elements=mixed)
    expected = perturb(attack, at.x, at.loss)
    assert (rows(got) - expected).abs().max() <= 1e-9


def test_restarts_only_gain_and_their_draws_are_keyed():
    at = Rough()
    once, thrice = at.attacked(steps=5), at.attacked(steps=5, restarts=3)
    assert (at.loss(thrice) >= at.loss(once)).all()
    assert (at.loss(thrice) > at.loss(once)).any()
    assert torch.equal(thrice, at.attacked(steps=5, restarts=3))
    assert ((thrice - at.x).abs() <= 0.25 + 1e-12).all()
    other = Attack("apgd", 0.25, steps=5, restarts=3)
    elsewhere = perturb(other, at.x, at.loss, bounds=(0, 1), keys=keys(8) + 1)
    assert not torch.equal(elsewhere, thrice)


def test_restarts_start_at_different_points():
    loss = Counted(linear(torch.ones(2, 5)))
    perturb(Attack("apgd", 0.5, steps=1, restarts=4), torch.zeros(2, 5), loss, keys=keys(2))
    starts = loss.points[::2]
    assert len(starts) == 4 and not starts[0].any()
    assert len({tuple(start.flatten().tolist()) for start in starts}) == 4
    assert all(start.abs().max() <= 0.5 for start in starts)


def test_a_loss_that_is_not_a_number_is_never_the_best():
    def loss(point):
        value = point.sum(1)
        return torch.where(value > 0.4, torch.nan, value)

    x = torch.zeros(2, 1)
    got = perturb(Attack("apgd", 1.0, steps=20), x, loss)
    assert (got <= 0.4).all()
    assert torch.equal(loss_gradient(loss, x), torch.ones(2, 1))


def test_towards_a_target_equals_autoattack(wide, monkeypatch):
    """The authors' own, down the cross-entropy of one class.

    It takes the loss before the first step for zero. Here losses are below that, so it gets them a
    constant higher, lest it should miss that the first step gains.
    """
    pytest.importorskip("pyautoattack", reason=AUTOATTACK)
    from pyautoattack import autopgd_base
    from pyautoattack.autopgd_base import APGDAttack

    at = Rough()
    target = (at.labels + 4) % 5
    theirs = APGDAttack(at.network, n_iter=40, norm="Linf", eps=0.25, loss="ce-targeted-cfts")
    theirs.init_hyperparam(at.x)

    def down(point):
        return F.cross_entropy(at.network(point), target, reduction="none")

    def raised(scores, labels, **options):
        return F.cross_entropy(scores, labels, **options) - 99

    library = SimpleNamespace(cross_entropy=raised)
    monkeypatch.setattr(autopgd_base, "F", library)
    best, _, value, _ = theirs.attack_single_run(at.x, target, x_init=at.x)

    attack = Attack("apgdt", 0.25, steps=40)
    got = perturb(attack, at.x, Losses(at.loss, target_losses=[down]), bounds=(0, 1))
    assert (got - best).abs().max() <= 1e-9
    assert 99 - down(got) == pytest.approx(value)


def test_of_all_targets_the_one_with_the_greatest_loss_counts():
    at = Rough()

    def margin(other):
        classes = (at.labels + other) % 5

        def value(point):
            scores = at.network(point)
            return (scores.gather(1, at.labels[:, None]) - scores.gather(1, classes[:, None]))[:, 0]

        return value

    def gap(point):
        return torch.stack([-margin(other)(point) for other in range(1, 5)]).amax(0)

    attack, targets = Attack("apgdt", 0.25, steps=20), [margin(other) for other in range(1, 5)]
    got = perturb(attack, at.x, Losses(gap, target_losses=targets))
    alone = [perturb(attack, at.x, Losses(gap, target_losses=[t])) for t in targets]
    alone = torch.stack([gap(point) for point in alone])
    assert torch.allclose(gap(got), alone.amax(0), rtol=0, atol=1e-12)
    assert len(set(alone.argmax(0).tolist())) > 1
    assert (gap(got) >= gap(at.attacked(steps=20, bounds=None)) - 1e-9).all()
