"""Block search: what it may move, that it gains, and that it needs no gradient."""

import pytest
import torch

from llm_attack.attacks import Attack, Elements, Groups, perturb, signs
from llm_attack.attacks.draws import rehashed

from .helpers import Counted, keys, linear, rng


def searched(x, loss, queries, epsilon=0.5, **options):
    attack = Attack("blocks", epsilon, queries=queries)
    return perturb(attack, x, loss, keys=keys(len(x)), **options)


def test_starts_with_random_signs_and_changes_a_block_at_a_time():
    x, w = torch.zeros(3, 12, 16), torch.randn(3, 12, 16, generator=rng(1))
    loss = Counted(linear(w))
    searched(x, loss, 40)
    points = torch.stack(loss.points)
    assert len(points) == 40
    assert torch.equal(points[0], 0.5 * signs(keys(3), x))
    assert torch.equal(points.abs(), torch.full_like(points, 0.5))
    best, most = points[0], linear(w)(points[0])
    sides = set()
    for point in points[1:]:
        for changed in point != best:
            spans = span(changed)
            assert spans[0] <= 4 and spans[1] <= 5  # a tenth of the coordinates
            sides.add(spans)
        better = linear(w)(point) > most
        best = torch.where(better[:, None, None], point, best)
        most = torch.where(better, linear(w)(point), most)
    assert len(sides) > 3


def span(changed):
    """Height and width of the smallest rectangle that holds all that is True."""
    places = changed.nonzero()
    if not len(places):
        return 0, 0
    return tuple((places.max(0).values - places.min(0).values + 1).tolist())


def test_the_blocks_get_smaller():
    """From two fifths of the coordinates of an example to a few."""
    x = torch.zeros(1, 40, 50)
    loss = Counted(lambda point: point.new_ones(1))  # nothing is ever better
    searched(x, loss, 300)
    sizes = [span((point != loss.points[0])[0]) for point in loss.points[1:]]
    assert 23 <= sizes[0][0] <= 25 and 30 <= sizes[0][1] <= 32
    assert sizes[-1][0] <= 2 and sizes[-1][1] <= 2
    areas = [max(a * b for a, b in sizes[i : i + 60]) for i in range(0, 299, 60)]
    assert areas == sorted(areas, reverse=True)


def test_more_queries_only_gain():
    x, w = torch.zeros(4, 5, 6), torch.randn(4, 5, 6, generator=rng(2))
    curved = lambda point: (w * (point + (3 * point).sin())).sum((1, 2))  # noqa: E731
    values = [curved(searched(x, curved, n)) for n in (1, 200)]
    assert (values[1] > values[0]).all()
    most = (0.5 + torch.tensor(1.5).sin()) * w.abs().sum((1, 2))
    assert (values[1] > 0.6 * most).all()  # random signs are at 0 on the average


def test_needs_no_gradient():
    x = torch.zeros(2, 4, 4)

    def blind(point):
        assert not torch.is_grad_enabled()
        return point.sum((1, 2))

    assert (blind_found := searched(x, torch.no_grad()(blind), 50)).sum() > 0
    assert not blind_found.requires_grad


def test_masked_elements_do_not_count():
    """The blocks are of what moves: padding in between changes nothing for the others."""
    x, w = torch.zeros(2, 5, 4), torch.randn(2, 5, 4, generator=rng(3))
    own = torch.arange(10).reshape(2, 5)
    attack = Attack("blocks", 0.5, queries=60)
    alone = perturb(attack, x, lambda p: (w * p).sum((1, 2)), keys=own)
    place = torch.tensor([0, 2, 3, 5, 6])
    wide, mask = torch.zeros(2, 8, 4), torch.zeros(2, 8, dtype=torch.bool)
    mask[:, place] = True
    spread = torch.zeros(2, 8, dtype=torch.int64).index_copy(1, place, own)
    loss = lambda p: (w * p[:, place]).sum((1, 2))  # noqa: E731
    padded = perturb(attack, wide, loss, keys=spread, elements=Elements(mask))
    assert torch.equal(padded[:, place], alone)
    assert not padded[~mask].any()


@pytest.mark.parametrize("n", (1, 3))
def test_elements_of_examples_of_different_sizes(n):
    x, w = torch.zeros(7, 4), torch.randn(7, 4, generator=rng(4))
    index = Groups(torch.tensor([0, 0, 0, 0, 1, 2, 2])[: 4 + n], 3 if n == 3 else 2)
    x, w = x[: 4 + n], w[: 4 + n]
    loss = lambda p: p.new_zeros(index.n).index_add(0, index.index, (w * p).sum(1))  # noqa: E731
    own = torch.arange(4 + n) + 100
    attack = Attack("blocks", 0.5, queries=80)
    got = perturb(attack, x, loss, keys=own, elements=Elements(examples=index))
    first = lambda p: (w[:4] * p).sum().reshape(1)  # noqa: E731
    one = Groups(torch.zeros(4, dtype=torch.int64), 1)
    assert torch.equal(
        got[:4], perturb(attack, x[:4], first, keys=own[:4], elements=Elements(examples=one))
    )
    assert (loss(got) > 0).all()


def test_keys_are_hashed_anew():
    one, other = rehashed(keys(5)), rehashed(rehashed(keys(5)))
    assert len({*keys(5).tolist(), *one.tolist(), *other.tolist()}) == 15
