"""Attacks on losses with known answers: linear, quadratic, cross-entropy of a linear model.

Points, weights, epsilon and steps are multiples of powers of two. So every sum is exact, and the
comparisons are exact, too.
"""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from llm_attack.attacks import (
    NORMS,
    Attack,
    Elements,
    Known,
    Losses,
    Watch,
    keys_for,
    least_likely,
    perturb,
    signs,
    uniform,
)

from .helpers import (
    ADAPTIVE,
    ALL_ATTACKS,
    DESCENDING,
    GRADIENT_ATTACKS,
    ITERATIVE,
    STEPPING,
    TARGETED,
    Counted,
    attacked,
    closures,
    gradients,
    grid,
    keys,
    linear,
    most_from_half,
    rng,
)

EPS = 1 / 8
STEP = EPS / 4

over_sizes = pytest.mark.parametrize("n", (1, 3, 8))
over_shapes = pytest.mark.parametrize("shape", ((7,), (3, 5, 5), (11, 4)), ids=str)


def way(name):
    """The direction in which an attack moves along the gradient of its loss."""
    return -1 if name in DESCENDING else 1


def problem(n, shape):
    """A point and the weights of a linear loss; about one weight of seven is zero."""
    return grid(n, *shape, seed=1), torch.randint(-3, 4, (n, *shape), generator=rng(2)).float()


@over_sizes
@over_shapes
@pytest.mark.parametrize("name", ("fgsm", "ost"))
def test_one_step(name, n, shape):
    x, w = problem(n, shape)
    # steps and step_size belong to the iterative attacks alone
    attack = Attack(name, EPS, steps=7, step_size=STEP)
    assert torch.equal(attacked(attack, x, linear(w)), x + way(name) * EPS * w.sign())


@over_sizes
@over_shapes
@pytest.mark.parametrize("name", ("bim", "illc"))
def test_steps_up_to_the_corner(name, n, shape):
    x, w = problem(n, shape)
    for steps, step_size in product((1, 3, 4, 5, 10), (None, 1 / 64, EPS, 1.0)):
        gone = min(EPS, steps * (STEP if step_size is None else step_size))
        got = attacked(Attack(name, EPS, steps=steps, step_size=step_size), x, linear(w))
        assert torch.equal(got, x + way(name) * gone * w.sign())


@over_sizes
@over_shapes
def test_pgd_ends_at_the_corner_that_the_gradient_points_to(n, shape):
    x, w = problem(n, shape)
    got = attacked(Attack("pgd", EPS), x, linear(w))  # 10 quarters reach across the ball
    start = x + EPS * uniform(keys(n), x)
    assert torch.equal(got, torch.where(w == 0, start, x + EPS * w.sign()))


@over_sizes
@over_shapes
def test_pgd_takes_its_steps_from_a_uniform_start(n, shape):
    x, w = problem(n, shape)
    loss = Counted(linear(w))
    got = attacked(Attack("pgd", EPS, steps=2), x, loss)
    start = x + EPS * uniform(keys(n), x)
    assert torch.equal(loss.points[0], start)
    once = (start + STEP * w.sign()).clamp(x - EPS, x + EPS)
    assert torch.equal(loss.points[1], once)
    assert torch.equal(got, (once + STEP * w.sign()).clamp(x - EPS, x + EPS))


@pytest.mark.parametrize("steps", (1, 2, 4, 10))
@pytest.mark.parametrize("name", ("bim", "illc"))
def test_the_gradient_is_taken_anew_at_each_step(name, steps):
    """The best point lies k steps away: the attack goes there, at most to the ball, and stays."""
    x = grid(3, 17, seed=1)
    k = torch.arange(-8, 9).expand_as(x)
    best = x + k * STEP
    got = attacked(
        Attack(name, EPS, steps=steps), x, lambda p: -way(name) * ((p - best) ** 2).sum(1)
    )
    assert torch.equal(got, x + k.clamp(-min(steps, 4), min(steps, 4)) * STEP)


@over_sizes
@over_shapes
@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_two_classes(name, n, shape):
    """Up the loss of the label and down that of the other class is the same corner."""
    x = grid(n, *shape, seed=1).double()  # so that no sign hangs on rounding
    w = torch.randn(2, *shape, generator=rng(3)).double()
    labels = torch.randint(2, (n,), generator=rng(4))
    logits = lambda point: point.flatten(1) @ w.flatten(1).T / 8  # noqa: E731
    targets = least_likely(logits(x), labels)
    assert torch.equal(targets, 1 - labels)
    classes = targets if name in TARGETED else labels
    loss = lambda point: F.cross_entropy(logits(point), classes, reduction="none")  # noqa: E731
    away = -1 if name == "reversed" else 1
    corner = x + away * EPS * (w[1 - labels] - w[labels]).sign()
    assert torch.equal(attacked(Attack(name, EPS), x, loss), corner)


@over_sizes
@pytest.mark.parametrize("name", STEPPING)
def test_many_classes(name, n):
    """Against steps along W'(p - e), the gradient of cross-entropy written out."""
    x = grid(n, 12, seed=1).double()
    w = torch.randn(5, 12, generator=rng(3)).double()
    labels = torch.randint(5, (n,), generator=rng(4))
    attack = Attack(name, epsilon=0.5, steps=6, step_size=1 / 16)
    targets = least_likely(x @ w.T, labels)
    classes = targets if name in TARGETED else labels

    expected = x + 0.5 * uniform(keys(n), x) if name == "pgd" else x
    velocity = 0
    for _ in range(6 if name in ITERATIVE else 1):
        slope = ((expected @ w.T).softmax(1) - torch.eye(5).double()[classes]) @ w
        if name == "mifgsm":
            slope = velocity = velocity + slope / slope.abs().sum(1, keepdim=True)
        assert slope.abs().min() > 1e-9  # no sign hangs on rounding
        length = 1 / 16 if name in ITERATIVE else 0.5
        expected = (expected + way(name) * length * slope.sign()).clamp(x - 0.5, x + 0.5)

    loss = lambda point: F.cross_entropy(point @ w.T, classes, reduction="none")  # noqa: E731
    assert torch.equal(attacked(attack, x, loss), expected)


@over_sizes
@over_shapes
@pytest.mark.parametrize("name", ("random", *GRADIENT_ATTACKS))
def test_bounds_clip_the_corner(name, n, shape):
    x = grid(n, *shape, seed=1, low=0)  # pixels; a quarter of them is nearer than EPS to an edge
    w = problem(n, shape)[1]
    direction = way(name) * w.sign()
    if name == "random":
        direction = signs(keys(n), x)
    corner = (x + EPS * direction).clamp(0, 1)
    if name == "pgd":
        start = (x + EPS * uniform(keys(n), x)).clamp(0, 1)
        corner = torch.where(w == 0, start, corner)
    assert torch.equal(attacked(Attack(name, EPS), x, linear(w), bounds=(0, 1)), corner)


def test_bounds_hold_during_the_steps():
    """A gradient that turns outside the box would be seen if a step left it."""
    x, w = grid(4, 6, seed=1, low=0), torch.ones(4, 6)
    loss = Counted(linear(w))
    attacked(Attack("bim", 2.0, steps=5), x, loss, bounds=(0, 1))
    assert all(point.min() >= 0 and point.max() <= 1 for point in loss.points)
    assert torch.equal(loss.points[2], torch.ones(4, 6))  # 2 steps of 1/2 from anywhere


@over_sizes
@over_shapes
def test_random_has_the_amplitude_of_fgsm_and_the_drawn_signs(n, shape):
    x, _ = problem(n, shape)
    got = attacked(Attack("random", EPS), x, None)
    assert torch.equal((got - x).abs(), torch.full_like(x, EPS))
    assert torch.equal(got, x + EPS * signs(keys(n), x))


def test_random_has_either_sign_half_of_the_time():
    x = torch.zeros(8, 512)
    ups = (attacked(Attack("random", EPS), x, None) > 0).sum().item()
    assert abs(ups - x.numel() / 2) <= most_from_half(x.numel(), odds=10**6)


@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_flat_coordinates_stay_and_the_callback_sees_them(name):
    x, w = problem(8, (11, 4))
    slopes = []
    got = attacked(Attack(name, EPS, steps=5), x, linear(w), watch=Watch(slopes.append))
    assert len(slopes) == gradients(name, 5)
    assert all(torch.equal(slope, w) for slope in slopes)
    start = x + EPS * uniform(keys(8), x) if name == "pgd" else x
    flat = w == 0
    assert 0.05 < flat.float().mean() < 0.3
    assert torch.equal(got[flat], start[flat])
    assert (got != start)[~flat].float().mean() > 0.9


@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_no_gradient_anywhere_is_no_attack(name):
    x, _ = problem(3, (7,))
    start = x + EPS * uniform(keys(3), x) if name == "pgd" else x
    assert torch.equal(attacked(Attack(name, EPS), x, lambda point: 0 * point.sum(1)), start)


@over_sizes
@over_shapes
@pytest.mark.parametrize("name", ALL_ATTACKS)
@pytest.mark.sampled(3)
def test_examples_do_not_see_their_batch(name, n, shape):
    x, w = problem(n, shape)
    own = torch.tensor([keys_for(5, [i, 7]) for i in range(n)])
    attack = Attack(name, EPS, steps=3)

    def of(rows):
        curved = lambda p: (w[rows] * p - p**3).flatten(1).sum(1)  # noqa: E731
        return perturb(attack, x[rows], keys=own[rows], **closures(name, curved))

    whole = of(torch.arange(n))
    order = torch.randperm(n, generator=rng(5))
    assert torch.equal(of(order), whole[order])
    assert torch.equal(torch.cat([of(torch.tensor([i])) for i in range(n)]), whole)


@pytest.mark.parametrize("name", STEPPING)
def test_a_given_gradient_stands_for_the_first_one_alone(name):
    x, w = problem(3, (7,))
    loss = Counted(linear(w))
    slopes = []
    attack = Attack(name, EPS, steps=3)
    attacked(attack, x, loss, known=Known(gradient=-w), watch=Watch(slopes.append))
    assert loss.calls == (2 if name in ITERATIVE else 0)
    assert torch.equal(slopes[0], -w)
    assert all(torch.equal(slope, w) for slope in slopes[1:])


@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_the_closure_of_the_other_sense_is_not_called(name):
    x, w = problem(3, (7,))
    right, wrong = Counted(linear(w)), Counted(linear(-w))
    wanted = "target_loss" if name in TARGETED else "loss"
    targets = [lambda point: -right(point)] if name == "apgdt" else []
    given = Losses(**{"loss": wrong, "target_loss": wrong, wanted: right}, target_losses=targets)
    perturb(Attack(name, EPS), x, given, keys=keys(3))
    # apgd wants to know at the end where it is; apgdt compares by the loss as well
    assert right.calls == gradients(name) + (name in ADAPTIVE) + 2 * (name == "apgdt")
    assert wrong.calls == 0


@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_missing_closure(name):
    x, w = problem(3, (7,))
    wanted, other = ("target_loss", "loss") if name in TARGETED else ("loss", "target_loss")
    wanted = "target_losses" if name == "apgdt" else wanted
    with pytest.raises(ValueError, match=f"'{name}' needs {wanted}"):
        perturb(Attack(name, EPS), x, keys=keys(3), loss=Losses(**{other: linear(w)}))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ("random", "pgd"))
def test_without_keys_the_draws_are_those_of_torch(name, norm):
    x, w = problem(3, (7,))
    attack = Attack(name, EPS, steps=1, norm=norm)
    torch.manual_seed(1)
    once, again = perturb(attack, x, linear(0 * w)), perturb(attack, x, linear(0 * w))
    torch.manual_seed(1)
    assert torch.equal(perturb(attack, x, linear(0 * w)), once)
    assert (once != again).any(1).all()
    assert (once != once.roll(1, 0) - x.roll(1, 0) + x).any(1).all()  # each example its own


@pytest.mark.parametrize("mask_dims", (1, 2, 3))
@pytest.mark.parametrize("name", ("random", *GRADIENT_ATTACKS))
def test_masked_places_stay_and_the_others_move(name, mask_dims):
    x, w = grid(4, 6, 5, seed=1), torch.randint(1, 3, (4, 6, 5), generator=rng(2)).float()
    mask = torch.rand(x.shape[:mask_dims], generator=rng(3)) < 0.6
    mask[0], mask[1] = True, False
    moves = mask.reshape(mask.shape + (1,) * (3 - mask_dims)).expand_as(x)
    got = attacked(Attack(name, EPS), x, linear(w), elements=Elements(mask))
    direction = signs(keys(4), x) if name == "random" else way(name)
    assert torch.equal(got, torch.where(moves, x + EPS * direction, x))
