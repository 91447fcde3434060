"""Search over random blocks. It uses no gradient, so a model cannot hide its gradient from it.

This is the idea of the Square attack (Andriushchenko et al. 2020) for points that are sequences of
elements, such as tokens. The search begins with random signs. Each query draws new signs in a block
of successive elements and coordinates, and keeps them if the loss has risen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llm_attack.attacks.apgd import Best
from llm_attack.attacks.draws import rehashed, uniform, words
from llm_attack.attacks.norms import Ball, widest

# The share of the coordinates in a block, and the shares of all queries after which it is halved.
_SHARE = 0.8
_HALVED = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def search(
    evaluate: Callable[[Tensor], Tensor], best: Best, keys: Tensor, *, queries: int
) -> Tensor:
    """Searches for the point with the greatest loss, and returns the best one that it tried.

    Args:
        evaluate: point -> losses (examples,), which the search raises.
        best: gets every point. All points stay in its ball. The elements of an example are the
            entries of all dimensions of the point except the last, if they may move, in order.
        keys: seeds of the draws; see `perturb`.
        queries: number of points to try. The first has random signs everywhere.
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
        # the example's key: independent of the order, and of elements that do not move
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
    """For each element, how many moving elements of its example precede it; and their number."""
    shape = ball.x.shape[:-1]
    index = ball.examples.index
    owner = index.reshape(index.shape + (1,) * (len(shape) - index.dim())).expand(shape).flatten()
    moves = moving.flatten().long()  # integers: no GPU rounds their running sums
    sizes = moves.new_zeros(ball.examples.n).index_add(0, owner, moves)
    order = owner.argsort(stable=True)
    before = moves[order].cumsum(0) - moves[order]
    rank = torch.empty_like(before)
    rank[order] = before - (sizes.cumsum(0) - sizes)[owner[order]]
    return rank.reshape(shape), sizes.to(widest(sizes.device))
