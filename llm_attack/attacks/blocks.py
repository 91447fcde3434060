"""Search over random blocks: no gradient, so that none can be hidden from it.

The idea of the Square attack (Andriushchenko et al. 2020) where a point is a sequence of elements,
such as tokens, that have no neighbours in a plane: from random signs, a random block of successive
elements and coordinates is drawn anew, and kept if the loss has risen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llm_attack.attacks.apgd import Best
from llm_attack.attacks.draws import rehashed, uniform, words
from llm_attack.attacks.norms import Ball, widest

# The share of the coordinates in a block, and after which shares of all queries it is halved.
_SHARE = 0.8
_HALVED = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def search(
    evaluate: Callable[[Tensor], Tensor], best: Best, keys: Tensor, *, queries: int
) -> Tensor:
    """The best point found, like the point of the ball.

    Args:
        evaluate: point -> losses (examples,), raised.
        best: gets every point. Its ball is what is allowed. An example's elements are all entries
            of the point's dimensions but the last that move, in their order.
        keys: of the draws, as of `perturb`.
        queries: how many points are tried; the first is one of random signs.
    """
    ball = best.ball
    point = ball.stay(ball.drawn(ball.norm.on_sphere, keys))
    best.offer(point, evaluate(point))
    moves = ball.moves.expand_as(ball.x).any(-1, keepdim=True)
    rank, sizes = _ranks(ball, moves)
    width = ball.x.shape[-1]
    column = torch.arange(width, device=ball.x.device)
    for query in range(1, queries):
        keys = rehashed(keys)
        share = _SHARE / 2 ** sum(query / queries > end for end in _HALVED)
        # a key of the example, whatever the order, and whatever does not move
        of_example = ball.examples.sum(words(keys, ball.x[..., :1]) * moves)
        where = (1 + uniform(of_example, sizes.new_empty(len(sizes), 2))) / 2
        rows = (share**0.5 * sizes).round().clamp(min=1)
        columns = max(1, round(share**0.5 * width))
        top = (where[:, 0] * (sizes - rows + 1)).floor()
        left = (where[:, 1] * (width - columns + 1)).floor()
        top, rows, left = (ball.examples.spread(part, rank) for part in (top, rows, left))
        inside = (rank >= top) & (rank < top + rows)
        block = (
            inside[..., None] & (column >= left[..., None]) & (column < left[..., None] + columns)
        )
        drawn = ball.drawn(ball.norm.on_sphere, keys)
        assert best.point is not None
        point = ball.stay(torch.where(block, drawn, best.point))
        best.offer(point, evaluate(point))
    assert best.point is not None
    return best.point


def _ranks(ball: Ball, moving: Tensor) -> tuple[Tensor, Tensor]:
    """How many moving elements of its example are before each element, and how many there are."""
    shape = ball.x.shape[:-1]
    index = ball.examples.index
    owner = index.reshape(index.shape + (1,) * (len(shape) - index.dim())).expand(shape).flatten()
    moves = moving.flatten().long()  # whose running sums no GPU rounds by the order
    sizes = moves.new_zeros(ball.examples.n).index_add(0, owner, moves)
    order = owner.argsort(stable=True)
    before = moves[order].cumsum(0) - moves[order]
    rank = torch.empty_like(before)
    rank[order] = before - (sizes.cumsum(0) - sizes)[owner[order]]
    return rank.reshape(shape), sizes.to(widest(sizes.device))
