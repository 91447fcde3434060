"""The fewest elements of a point, such as tokens, that have to move to make the answer wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from llm_attack.attacks.apgd import Best, Hill, ascend
from llm_attack.attacks.norms import Ball, Groups


class Owned(NamedTuple):
    """The E elements of a point, such as tokens, in one sequence.

    Attributes:
        owner: (E,) the example of each element.
        moves: (E,) whether it may move.
        n: number of examples.
    """

    owner: Tensor
    moves: Tensor
    n: int

    @classmethod
    def of(cls, ball: Ball) -> Owned:
        """The elements of a ball's point."""
        shape, index = ball.x.shape[:-1], ball.examples.index
        owner = index.reshape(index.shape + (1,) * (len(shape) - index.dim())).expand(shape)
        moves = ball.moves.expand_as(ball.x).any(-1)
        return cls(owner.flatten(), moves.flatten(), ball.examples.n)

    @property
    def sizes(self) -> Tensor:
        """(n,) the number of elements of each example that may move."""
        return self.owner.new_zeros(self.n).index_add(0, self.owner, self.moves.long())

    def ranks(self, values: Tensor) -> Tensor:
        """(E,) the place of each element in its example, by descending value; the first is 0."""
        by_value = values.argsort(descending=True, stable=True)
        order = by_value[self.owner[by_value].argsort(stable=True)]
        every = self.owner.new_zeros(self.n).index_add(0, self.owner, torch.ones_like(self.owner))
        start = every.cumsum(0) - every
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - start[self.owner[order]]
        return rank


def gains(slope: Tensor, ball: Ball) -> Tensor:
    """(E,) how much each element raises the loss to first order if it moves by 1 in the norm."""
    n = slope.shape[:-1].numel()
    alone = Groups(torch.arange(n, device=slope.device).reshape(slope.shape[:-1]), n)
    return ball.norm.dual(slope, alone)


@dataclass
class _Search:
    """The best sets so far; arguments as for `fewest`."""

    hill: Hill
    gap: Hill
    ball: Ball
    steps: int
    step: float

    def __post_init__(self) -> None:
        clean = self.gap.clean_value
        clean = self.gap.value(self.ball.x) if clean is None else clean
        self.elements = Owned.of(self.ball)
        self.sizes = self.elements.sizes
        self.best = self.ball.x
        self.count = torch.where(clean > 0, 0, torch.iinfo(torch.int64).max)

    def climbed(self, start: Tensor, chosen: Tensor) -> Tensor:
        """The point with the greatest loss that Auto-PGD finds if only chosen elements move."""
        moves = chosen.reshape(self.ball.x.shape[:-1])[..., None] & self.ball.moves
        inside = Best(replace(self.ball, moves=moves))
        return ascend(start, self.hill, inside, steps=self.steps, step=self.step)

    def offer(self, point: Tensor, n: int, asked: Tensor) -> None:
        """Takes a point with `n` moved elements for the examples that it makes wrong."""
        better = asked & (self.count > n) & (self.gap.value(point) > 0)
        self.best = self.ball.where(better, point, self.best)
        self.count = torch.where(better, n, self.count)

    def greedy(self) -> None:
        """Adds the element with the greatest gain at the current point, one after the other."""
        point, slope = self.ball.x, self.hill.clean_slope
        chosen = torch.zeros_like(self.elements.moves)
        for n in range(1, int(self.sizes.max()) + 1):
            asked = (self.count > n) & (self.sizes >= n)
            if not asked.any():
                break
            if slope is None:
                _, slope = self.hill.slope(point)
            gain = gains(slope, self.ball).masked_fill(chosen | ~self.elements.moves, -1.0)
            first = self.elements.ranks(gain) == 0
            chosen = chosen | (first & asked[self.elements.owner])
            point, slope = self.climbed(point, chosen), None
            self.offer(point, n, asked)
        none = self.count == torch.iinfo(torch.int64).max
        self.best = self.ball.where(none, point, self.best)

    def exact(self, most: int) -> None:
        """Tries all sets of up to `most` elements, smallest sets and largest gains first."""
        slope = self.hill.clean_slope
        if slope is None:
            _, slope = self.hill.slope(self.ball.x)
        gain = gains(slope, self.ball).masked_fill(~self.elements.moves, -1.0)
        rank = self.elements.ranks(gain)
        for chosen in self._sets(most):
            asked = (self.count > len(chosen)) & (self.sizes > chosen[-1])
            if asked.any():
                places = torch.tensor(chosen, device=rank.device)
                moved = (rank[:, None] == places).any(-1) & self.elements.moves
                self.offer(self.climbed(self.ball.x, moved), len(chosen), asked)

    def _sets(self, most: int) -> Iterator[tuple[int, ...]]:
        for n in range(1, most + 1):
            yield from combinations(range(int(self.sizes.max())), n)


def fewest(hill: Hill, gap: Hill, ball: Ball, *, steps: int, step: float, exact: int = 0) -> Tensor:
    """For each example, a point with few moved elements that makes the answer wrong.

    The greedy search begins with no element. It adds the element whose gradient at the current
    point has the greatest dual norm, and lets Auto-PGD move all chosen elements from there. It ends
    as soon as the answer is wrong. The exact search then tries all smaller sets of at most `exact`
    elements, each by Auto-PGD from the clean point.

    Args:
        hill: the loss that is raised.
        gap: above 0 if the answer is wrong; only its values are read.
        ball: each element moves within its own bound.
        steps: steps of Auto-PGD for each set.
        step: length of its first step.
        exact: largest number of elements of the sets that are all tried.

    Returns:
        A tensor like `ball.x`: the clean point if its answer is wrong. If no set was found, the
        point with all elements moved.
    """
    search = _Search(hill, gap, ball, steps, step)
    search.greedy()
    if exact:
        search.exact(exact)
    return search.best
