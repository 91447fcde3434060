"""Swaps of tokens: closed form on a linear loss, finite differences, and every swap by hand."""

from itertools import product

import pytest
import torch

from llm_attack.attacks import Attack, Ball, Elements, loss_gradient
from llm_attack.attacks.apgd import Hill
from llm_attack.attacks.swaps import Sentence, Vocabulary, every, first_order, gcg, hotflip

from .helpers import keys, rng

SIZE, WIDTH, ALLOWED = 12, 4, [1, 2, 3, 5, 6, 7, 9, 10, 11]
TABLE = torch.randn(SIZE, WIDTH, generator=rng(0), dtype=torch.float64)
IDS = torch.tensor([[1, 4, 7, 7], [2, 2, 9, 10], [8, 3, 5, 0]])
W = torch.randn(3, 4, WIDTH, generator=rng(1), dtype=torch.float64)
VOCABULARY = Vocabulary(lambda ids: TABLE[ids], torch.tensor(ALLOWED))
MASK = torch.tensor([[True] * 4, [True, False, True, True], [True, True, True, False]])


def sums(x):
    return (W * x).flatten(1).sum(-1)


def curved(x):
    return sums(x) + (W * x).sum(-1).sin().prod(-1)


def sentence(gap=None, mask=MASK, rows=slice(None)):
    x = TABLE[IDS[rows]]
    ball = Ball.of(Attack("hotflip", 1.0), x, elements=Elements(mask=mask[rows]))
    hill = None if gap is None else Hill(gap, lambda point: (gap(point), point))
    return Sentence(hill, ball, IDS[rows], VOCABULARY)


def every_by_hand(gap):
    """{example: {(place, token): (gap, length)}} of all swaps that are allowed."""
    found = {}
    for i, place, token in product(range(3), range(4), ALLOWED):
        if not MASK[i, place] or IDS[i, place] == token:
            continue
        x = TABLE[IDS].clone()
        x[i, place] = TABLE[token]
        length = float((TABLE[token] - TABLE[IDS[i, place]]).abs().max())
        found.setdefault(i, {})[place, token] = float(gap(x)[i]), length
    return found


def level(share):
    """A gap that so large a share of the swaps of each example makes positive."""
    by_hand = every_by_hand(curved)
    values = [sorted(value for value, _ in by_hand[i].values()) for i in range(3)]
    cuts = torch.tensor([of[int((1 - share) * len(of))] for of in values], dtype=torch.float64)
    cuts = torch.maximum(cuts, curved(TABLE[IDS]))  # the clean answers are right
    return lambda x: curved(x) - cuts - 1e-12


def test_every_swap_is_tried_and_the_shortest_wrong_one_is_taken():
    gap = level(0.2)
    found, by_hand = every(sentence(gap)), every_by_hand(gap)
    for i in range(3):
        wrong = {swap: length for swap, (value, length) in by_hand[i].items() if value > 0}
        assert wrong and int(found.tried[4 * i : 4 * i + 4].sum()) == len(by_hand[i])
        assert found.wrong.reshape(3, 4)[i].tolist() == [
            sum(place == at for at, _ in wrong) for place in range(4)
        ]
        place, token = min(wrong, key=wrong.get)
        expected = IDS[i].clone()
        expected[place] = token
        assert found.ids[i].tolist() == expected.tolist()
    assert torch.equal(found.point, TABLE[found.ids])


def test_without_a_wrong_answer_the_greatest_gap_is_taken():
    found = every(sentence(lambda x: curved(x) - 100))
    by_hand = every_by_hand(curved)
    best = curved(found.point)
    for i in range(3):
        assert float(best[i]) == pytest.approx(max(value for value, _ in by_hand[i].values()))
    assert int(found.wrong.sum()) == 0


def test_wrong_answers_stay_as_they_are():
    found = every(sentence(lambda x: curved(x) + 100))
    assert torch.equal(found.ids, IDS) and int(found.tried.sum()) == 0


def test_first_order_gains_are_the_derivatives_along_each_swap():
    """A central difference of the loss towards the new embedding; and the order of gains."""
    x, h = TABLE[IDS], 1e-5
    gains = first_order(loss_gradient(curved, x), x, IDS, VOCABULARY, len(ALLOWED))
    assert gains.value.shape == (12, len(ALLOWED))
    for element in range(12):
        i, place = divmod(element, 4)
        pairs = zip(gains.token[element].tolist(), gains.value[element].tolist(), strict=True)
        for token, value in pairs:
            if token == IDS[i, place]:
                assert value == -torch.inf
                continue
            way = torch.zeros_like(x)
            way[i, place] = TABLE[token] - x[i, place]
            ends = [curved(x + sign * h * way)[i] for sign in (1, -1)]
            assert value == pytest.approx(float(ends[0] - ends[1]) / (2 * h), abs=1e-8)
        assert gains.value[element].tolist() == sorted(gains.value[element].tolist())[::-1]
    few = first_order(loss_gradient(curved, x), x, IDS, VOCABULARY, 3)
    assert torch.equal(few.token, gains.token[:, :3])


def test_blocks_of_the_vocabulary_do_not_matter(monkeypatch):
    x = TABLE[IDS]
    whole = first_order(W, x, IDS, VOCABULARY, 4)
    monkeypatch.setattr("llm_attack.attacks.swaps._BLOCK", 2)
    parts = first_order(W, x, IDS, VOCABULARY, 4)
    assert torch.equal(whole.token, parts.token)
    near = Vocabulary(VOCABULARY.embed, VOCABULARY.allowed).nearest(4)
    change = (TABLE[ALLOWED] - TABLE[4]).float().abs()
    expected = change.square().mean(-1).sqrt().min(), change.amax(-1).min()
    assert near == pytest.approx([*map(float, expected)], rel=1e-6)


def test_on_a_linear_loss_the_first_candidate_is_the_best_swap():
    """HotFlip's estimate is exact there, so one candidate does what all do."""
    gap = lambda x: sums(x) - 100  # noqa: E731
    one = hotflip(sentence(gap), W, candidates=1)
    assert torch.equal(one.ids, every(sentence(gap)).ids)
    assert int(one.tried.sum()) == 3


def test_all_candidates_are_all_swaps():
    gap = level(0.2)
    all_, found = every(sentence(gap)), hotflip(sentence(gap), W, candidates=1000)
    for here, there in zip(all_, found, strict=True):
        assert torch.equal(here, there)


def test_gcg_finds_the_best_swaps_of_a_linear_loss():
    """The best of `k` places, each with its best token, and never more than `k`."""
    by_hand = every_by_hand(sums)
    for k in (1, 2, 3):
        hill = Hill(sums, lambda x: (sums(x), W))
        found = gcg(sentence(), hill, keys(3), swaps=k, steps=9, candidates=40)
        changed = (found.ids != IDS).sum(-1)
        assert (changed <= k).all()
        gained = sums(found.point) - sums(TABLE[IDS])
        for i in range(3):
            clean = float(sums(TABLE[IDS])[i])
            places = {}
            for (place, _), (value, _) in by_hand[i].items():
                places[place] = max(places.get(place, 0.0), value - clean)
            best = sum(sorted(places.values())[-k:])
            # a place that was chosen stays chosen, so the best places need not be among them
            assert float(gained[i]) <= best + 1e-9
            if k == 3:  # all places of the two that have three
                chosen = [places[p] for p in (found.ids[i] != IDS[i]).nonzero().flatten().tolist()]
                assert float(gained[i]) == pytest.approx(sum(chosen), abs=1e-9)
                assert i == 0 or float(gained[i]) == pytest.approx(best, abs=1e-9)


def test_gcg_ends_with_the_first_wrong_answer_and_does_not_depend_on_the_batch():
    gap = level(0.3)
    hill = Hill(gap, lambda x: (gap(x), loss_gradient(gap, x)))
    together = gcg(sentence(gap), hill, keys(3), swaps=2, steps=8, candidates=9)
    assert (gap(together.point) > 0).all()
    assert together.wrong.reshape(3, 4).sum(-1).tolist() == [1, 1, 1]
    some = slice(1, 3)
    padded = lambda x: torch.cat([TABLE[IDS[:1]], x])  # noqa: E731
    alone = Hill(
        lambda x: gap(padded(x))[1:],
        lambda x: (gap(padded(x))[1:], loss_gradient(gap, padded(x))[1:]),
    )
    part = sentence(lambda x: gap(padded(x))[1:], rows=some)
    found = gcg(part, alone, keys(3)[some], swaps=2, steps=8, candidates=9)
    assert torch.equal(found.ids, together.ids[some])


def test_perturb_refers_to_the_functions_that_swap():
    from llm_attack.attacks import perturb

    with pytest.raises(ValueError, match="swaps tokens: call"):
        perturb(Attack("gcg", 1.0), TABLE[IDS], sums)
