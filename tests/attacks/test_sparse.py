"""The fewest tokens: closed form on a linear loss, all sets by hand, and what the greedy misses."""

from itertools import combinations

import pytest
import torch

from llm_attack.attacks import Attack, Elements, Losses, perturb

from .helpers import linear, rng

EPSILON = 0.25


def sparse(**more):
    return Attack("token_sparse", EPSILON, **{"steps": 2, **more})


def moved(point, x):
    """(N,) the number of elements that moved."""
    return (point != x).any(-1).sum(-1)


def problem(n=6, tokens=7, seed=0):
    """A linear loss w.x - b of each example; b is what some of the largest gains reach."""
    w = torch.randn(n, tokens, 5, generator=rng(seed), dtype=torch.float64)
    return w, torch.zeros_like(w)


def bounded(w, reached):
    """The loss that is above 0 as soon as the gain is above `reached`, (N,)."""
    loss = linear(w)
    return lambda point: loss(point) - reached


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_loss_needs_the_largest_dual_norms(norm):
    w, x = problem()
    dual = w.abs().sum(-1) if norm == "linf" else w.norm(dim=-1)
    gains, order = (EPSILON * dual).sort(-1, descending=True)
    needed = torch.tensor([1, 2, 3, 4, 5, 7])
    reached = gains.cumsum(-1).gather(-1, needed[:, None] - 1)[:, 0] * (1 - 1e-6)
    attack = sparse(norm=norm, per_token=norm == "l2")
    point = perturb(attack, x, bounded(w, reached))
    assert moved(point, x).tolist() == needed.tolist()
    for row, n, places in zip(point, needed.tolist(), order, strict=True):
        assert {*row.abs().sum(-1).nonzero().flatten().tolist()} == {*places[:n].tolist()}
    # one that nothing reaches: all elements move; one that is wrong already: none does
    reached[0], reached[1] = gains[0].sum() * 1.001, -1.0
    assert moved(perturb(attack, x, bounded(w, reached)), x)[:2].tolist() == [7, 0]


def test_elements_that_may_not_move_are_not_chosen_and_examples_may_share_a_dimension():
    """Elements of examples in one row, as nodes are, with another number for each."""
    from llm_attack.attacks import Groups

    w = torch.tensor([[3.0, 0], [1, 0], [2, 0], [9, 0], [1, 1], [4, 0]], dtype=torch.float64)
    owner, x = torch.tensor([0, 0, 0, 0, 1, 1]), torch.zeros(6, 2, dtype=torch.float64)
    moves = torch.tensor([True, True, True, False, True, True])
    reached = EPSILON * torch.tensor([4.5, 5.5], dtype=torch.float64)

    def loss(point):
        sums = (w * point).sum(-1)
        return torch.zeros(2, dtype=torch.float64).index_add(0, owner, sums) - reached

    elements = Elements(mask=moves, examples=Groups(owner, 2))
    point = perturb(sparse(), x, loss, elements=elements)
    assert (point != 0).any(-1).tolist() == [True, False, True, False, True, True]


def trap(point):
    """The first element gains fast but at most 0.4; each of the others gains 0.5. Needs 0.95."""
    first, *others = point[..., 0].unbind(-1)
    return (10 * first).clamp(max=0.4) + 2 * sum(others) - 0.95


def test_the_exact_search_finds_what_the_greedy_misses():
    x = torch.zeros(1, 3, 1, dtype=torch.float64)
    greedy = perturb(sparse(), x, trap)
    assert moved(greedy, x).tolist() == [3]
    exact = perturb(sparse(exact_tokens=2), x, trap)
    assert (exact != 0).any(-1).tolist() == [[False, True, True]]
    assert moved(perturb(sparse(exact_tokens=1), x, trap), x).tolist() == [3]


def curved(n=4, tokens=6, seed=2):
    """A loss with products of elements, where no formula gives the smallest set."""
    g = rng(seed)
    w = torch.randn(n, tokens, 3, generator=g, dtype=torch.float64)
    pairs = torch.randn(n, tokens, tokens, generator=g, dtype=torch.float64)
    level = torch.linspace(0.6, 2.4, n, dtype=torch.float64)

    def loss(point):
        sums = (w * point).sum(-1)
        products = torch.einsum("nt,ntu,nu->n", sums.tanh(), pairs, sums.tanh())
        return sums.sum(-1) + products - level

    return loss, torch.zeros_like(w)


def test_every_set_by_hand():
    """The smallest set for which the same Auto-PGD, on that set alone, finds a wrong answer."""
    loss, x = curved()
    inner = Attack("apgd", EPSILON, steps=5)
    smallest = torch.full((len(x),), 99)
    for n in (1, 2, 3):
        for chosen in combinations(range(x.shape[1]), n):
            mask = torch.zeros(x.shape[:2], dtype=torch.bool)
            mask[:, list(chosen)] = True
            point = perturb(inner, x, loss, elements=Elements(mask=mask))
            smallest = torch.where((loss(point) > 0) & (smallest > n), n, smallest)
    found = perturb(sparse(steps=5, exact_tokens=3), x, loss)
    few = moved(found, x)
    assert (loss(found) > 0).all() and len(set(few.tolist())) > 1
    assert ((few == smallest) | ((smallest == 99) & (few > 3))).all()
    greedy = perturb(sparse(steps=5), x, loss)
    assert (moved(greedy, x) >= few).all()


def test_the_gap_decides_and_the_loss_is_followed():
    w, x = problem(2)
    asked = []

    def gap(point):
        asked.append(point)
        return torch.tensor([-1.0, 1.0])

    point = perturb(sparse(), x, Losses(linear(w), gap=gap))
    assert moved(point, x).tolist() == [7, 0] and len(asked) == 8
