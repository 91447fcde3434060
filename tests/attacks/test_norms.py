"""L2 balls and groups of elements: closed forms, the definitions' identities, other libraries."""

import math
import sys
from importlib.util import find_spec
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llm_attack.attacks import NORMS, Attack, Elements, Groups, perturb, uniform
from llm_attack.attacks.draws import normal, words
from llm_attack.attacks.settings import LENGTH_OF_ONES

from .helpers import (
    ALL_ATTACKS,
    DESCENDING,
    GRADIENT_ATTACKS,
    ITERATIVE,
    attacked,
    closures,
    keys,
    linear,
    most_from_half,
    rng,
)

ADV_LIB = "adv_lib is not installed: make attack-libs"
FOOLBOX = "foolbox is not installed: make attack-libs"
TORCHATTACKS = "torchattacks is not installed: make attack-libs"


def lengths(change):
    return change.flatten(1).norm(dim=1)


@pytest.mark.parametrize("shape", ((7,), (3, 5, 5)), ids=str)
@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_l2_ends_where_the_gradient_points(name, shape):
    """On a linear loss: the most that the ball allows, along w; mifgsm's momentum is w too."""
    x, w = torch.randn(2, 4, *shape, generator=rng(1), dtype=torch.float64)
    way = -1 if name in DESCENDING else 1
    expected = x + way * 0.5 * w / lengths(w).reshape(-1, *[1] * len(shape))
    got = attacked(Attack(name, 0.5, steps=400, step_size=0.1, norm="l2"), x, linear(w))
    assert torch.allclose(got, expected, atol=1e-12)
    # half of the way in two steps of a quarter
    if name in ITERATIVE and name != "pgd":
        got = attacked(Attack(name, 0.5, steps=2, step_size=0.125, norm="l2"), x, linear(w))
        assert torch.allclose(got, (x + expected) / 2, atol=1e-12)


@given(st.integers(0, 2**32), st.sampled_from(ALL_ATTACKS), st.floats(1e-3, 10), st.booleans())
@settings(max_examples=100, deadline=None)
def test_l2_ball_box_and_mask(seed, name, epsilon, boxed):
    generator = rng(seed)
    x = torch.rand(3, 4, 5, generator=generator, dtype=torch.float64)
    w = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 4, generator=generator) < 0.6
    attack = Attack(name, epsilon, steps=3, norm="l2")
    box = (0, 1) if boxed else None
    loss = lambda point: (w * (point + (3 * point).sin())).flatten(1).sum(1)  # noqa: E731
    got = attacked(attack, x, loss, elements=Elements(mask), bounds=box)
    assert name == "gaussian" or (lengths(got - x) <= epsilon * (1 + 1e-12)).all()
    assert torch.equal(got[~mask], x[~mask])
    if boxed:
        assert got.min() >= 0
        assert got.max() <= 1
    elif name in ("random", "fgsm", "ost", "reversed"):
        assert torch.allclose(lengths(got - x)[mask.any(1)], torch.tensor(epsilon).double())


@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_l2_keeps_what_has_no_gradient(name):
    x, w = torch.randn(2, 3, 6, generator=rng(2))
    w[0], w[1, :3] = 0, torch.nan
    got = attacked(Attack(name, 0.5, norm="l2"), x, linear(w))
    start = attacked(Attack(name, 0.5, norm="l2"), x, linear(0 * x))
    assert torch.equal(got[0], start[0])
    # a start may be drawn in by the projection, but only towards x
    inward = (got - x)[1, :3] / (start - x)[1, :3] if name == "pgd" else torch.ones(3)
    assert torch.allclose(inward, inward[:1]) and 0 <= inward[0] <= 1
    assert name == "pgd" or torch.equal(got[1, :3], x[1, :3])


@pytest.mark.parametrize("scale", (1e-30, 1.0, 1e30))
def test_l2_of_gradients_whose_squares_no_float_holds(scale):
    x, w = torch.zeros(1, 3), torch.tensor([[3.0, 0.0, 4.0]])
    got = perturb(Attack("fgsm", 10.0, norm="l2"), x, linear(w * scale))
    assert torch.allclose(got, torch.tensor([[6.0, 0.0, 8.0]]))


@pytest.mark.parametrize("d", (1, 2, 5))
def test_l2_starts_fill_the_ball(d):
    """radius ** d is uniform on [0, 1], and every coordinate as often positive as negative."""
    n = 4000
    x = torch.zeros(n, d, dtype=torch.float64)
    start = perturb(Attack("pgd", 1.0, norm="l2"), x, lambda p: 0 * p.sum(1), keys=keys(n))
    share = lengths(start) ** d
    for threshold in (0.25, 0.5, 0.75):
        expected = n * threshold
        assert abs((share < threshold).sum() - expected) < 5 * (expected * (1 - threshold)) ** 0.5
    for column in start.T:
        assert abs((column > 0).sum() - n / 2) <= most_from_half(n, 10**6)
    on_sphere = perturb(Attack("random", 1.0, norm="l2"), x, keys=keys(n))
    assert torch.allclose(lengths(on_sphere), torch.ones(n, dtype=torch.float64))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ALL_ATTACKS)
def test_examples_are_told_by_an_index(name, norm):
    """A flat point with an index gives what rows give, also with elements in another order."""
    x, w = torch.randn(2, 3, 4, 5, generator=rng(3), dtype=torch.float64)
    own = torch.arange(12).reshape(3, 4)
    attack = Attack(name, 0.3, steps=4, norm=norm)
    bent = lambda point, w: (w * (point + (3 * point).sin())).sum(-1)  # noqa: E731
    options = {} if norm == "linf" else {"elements": Elements(examples=Groups.rows(x))}

    def found(order):
        index = Groups(torch.arange(3).repeat_interleave(4)[order], 3)
        flat, slopes = x.flatten(0, 1)[order], w.flatten(0, 1)[order]

        def loss(point):
            of_elements = bent(point, slopes)
            return of_elements.new_zeros(3).index_add(0, index.index, of_elements)

        options = {"keys": own.flatten()[order], "elements": Elements(examples=index)}
        point = perturb(attack, flat, **closures(name, loss), **options)
        return torch.empty_like(point).index_copy(0, order, point).reshape(x.shape)

    loss = lambda point: bent(point, w).sum(-1)  # noqa: E731
    rows = perturb(attack, x, keys=own, **closures(name, loss), **options)
    mixed = torch.randperm(12, generator=rng(4))
    if name == "blocks":  # whose blocks are of successive elements
        mixed = torch.cat([mixed[mixed // 4 == i].sort().values for i in (2, 0, 1)])
    for order in (torch.arange(12), mixed):
        assert torch.allclose(found(order), rows, rtol=0, atol=1e-14)


def test_balls_of_their_own():
    """An example's loss, and a ball for each of its elements."""
    x, w = torch.randn(2, 3, 4, 5, generator=rng(5), dtype=torch.float64)
    balls = Groups(torch.arange(12).reshape(3, 4), 12)
    got = perturb(
        Attack("bim", 0.5, steps=40, norm="l2"), x, linear(w), elements=Elements(balls=balls)
    )
    assert torch.allclose(got, x + 0.5 * w / w.norm(dim=-1, keepdim=True), atol=1e-12)


class Setting:
    """A smooth network in float64 and images, some of whose pixels lie on the edges of the box."""

    epsilon, steps, labels = 0.8, 10, torch.arange(8)

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(33)
            layers = nn.Conv2d(3, 8, 3), nn.Softplus(), nn.Flatten(), nn.Linear(392, 10)
            self.network = nn.Sequential(*layers).double().eval().requires_grad_(False)
        self.network[0].weight.data *= 8
        x = torch.rand(8, 3, 9, 9, generator=rng(1), dtype=torch.float64) * 1.2 - 0.1
        self.x = x.clamp(0, 1)

    def loss(self, point):
        return F.cross_entropy(self.network(point), self.labels, reduction="none")

    def ours(self, name, **settings):
        attack = Attack(name, self.epsilon, steps=self.steps, **settings)
        return perturb(attack, self.x, self.loss, bounds=(0, 1))


@pytest.mark.parametrize("name", ("fgsm", "bim"))
def test_l2_equals_foolbox(name):
    library = pytest.importorskip("foolbox", reason=FOOLBOX)
    at = Setting()
    attack = {
        "fgsm": lambda: library.attacks.L2FastGradientAttack(),
        "bim": lambda: library.attacks.L2BasicIterativeAttack(rel_stepsize=1 / 4, steps=at.steps),
    }[name]()
    model = library.PyTorchModel(at.network, bounds=(0, 1), device="cpu")
    wanted = library.criteria.Misclassification(at.labels)
    theirs = attack(model, at.x, wanted, epsilons=at.epsilon)[0]
    got = at.ours(name, norm="l2")
    assert (got - theirs).abs().max() <= 1e-12
    assert lengths(got - at.x).min() > 0.5 * at.epsilon


def test_l2_equals_torchattacks():
    library = pytest.importorskip("torchattacks", reason=TORCHATTACKS)
    at = Setting()
    options = {"eps": at.epsilon, "alpha": at.epsilon / 4, "steps": at.steps}
    attack = library.PGDL2(at.network, random_start=False, **options)
    assert (at.ours("bim", norm="l2") - attack(at.x, at.labels)).abs().max() <= 1e-8


def test_momentum_is_of_gradients_in_l1():
    """By hand: 3 (1, 1, 1, 1) / 4 + (-1, 0, 0, 0) is negative at first; of L2 norms it were not."""
    slopes = iter([torch.ones(1, 4), torch.tensor([[-5.0, 0.0, 0.0, 0.0]])])
    attack = Attack("mifgsm", 1.0, steps=2, step_size=0.25, decay=3.0)
    point = perturb(attack, torch.zeros(1, 4), lambda x: (x * next(slopes)).sum(1))
    assert point.tolist() == [[0, 0.5, 0.5, 0.5]]


@pytest.mark.parametrize("decay", (1.0, 0.5))
def test_momentum_equals_torchattacks(decay):
    """Which divides by the mean of absolute values, not by their sum: the signs are the same."""
    library = pytest.importorskip("torchattacks", reason=TORCHATTACKS)
    at = Setting()
    at.epsilon = 8 / 255
    options = {"eps": at.epsilon, "alpha": at.epsilon / 4, "steps": at.steps}
    attack = library.MIFGSM(at.network, decay=decay, **options)
    got = at.ours("mifgsm", decay=decay)
    assert (got - attack(at.x, at.labels)).abs().max() <= 1e-14
    assert not torch.equal(got, at.ours("bim"))


@pytest.fixture
def auto_pgd(monkeypatch):
    """adv_lib's; modules beside it ask for two libraries by name, which it has no need of."""
    for name in ("torchvision", "visdom"):
        if find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, MagicMock())
    return pytest.importorskip("adv_lib.attacks.auto_pgd", reason=ADV_LIB)


@pytest.mark.parametrize(("norm", "p"), (("linf", torch.inf), ("l2", 2)))
def test_a_step_equals_that_of_adv_lib(norm, p, auto_pgd):
    """Its only attack on a fixed L2 ball is Auto-PGD, whose first step is FGSM to the ball's edge:
    a step of twice epsilon, projected.
    """
    at = Setting()
    at.epsilon = 0.75 if norm == "l2" else 1 / 32  # which it holds in float32
    seen = []
    at.network.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    options = {"norm": p, "n_iter": 1, "loss_function": "ce", "x_init": at.x}
    auto_pgd._apgd(at.network, at.x, at.labels, torch.full((8,), at.epsilon), **options)
    start, theirs = seen[:2]
    assert torch.equal(start, at.x)
    attack = Attack("bim", at.epsilon, steps=1, step_size=2 * at.epsilon, norm=norm)
    got = perturb(attack, at.x, at.loss, bounds=(0, 1))
    assert (got - theirs).abs().max() <= 1e-12


def test_amplitudes_have_the_digits_of_float64():
    """The radius of a start in L2, and the size of Gaussian noise, to the last place or two."""
    x = torch.zeros(5, 3, 7, dtype=torch.float64)
    moves = torch.ones_like(x, dtype=torch.bool)
    moves[:, :, 5:] = False
    own, rows = keys(5), Groups.rows(x)
    draws = uniform(rows.sum(words(own, x) * moves), torch.zeros(5, dtype=torch.float64))
    radii = [((1 + u) / 2) ** (1 / 15) for u in draws.tolist()]
    found = rows.norm(NORMS["l2"].in_ball(own, moves, x, rows), 2)
    assert found.tolist() == pytest.approx(radii, rel=4e-16 * 15, abs=0)
    noise = NORMS["l2"].gaussian(own, moves, x, rows)
    assert torch.allclose(noise, normal(own, x) / math.sqrt(15), rtol=1e-15, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_the_length_of_ones(norm):
    """That the settings know without torch is what the norm measures."""
    assert LENGTH_OF_ONES.keys() == NORMS.keys()
    ones = torch.ones(1, 37, dtype=torch.float64)
    measured = NORMS[norm].length(ones, Groups.rows(ones)).item()
    assert LENGTH_OF_ONES[norm](37) == pytest.approx(measured, rel=1e-14)
