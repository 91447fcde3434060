"""Auto-PGD (Croce and Hein 2020): projected ascent that finds its own step sizes.

The step starts at twice epsilon and is halved, for each example by itself, when at a checkpoint
fewer than three quarters of the steps since the last one have raised the loss, or when nothing has
been gained at the same step size; then it goes on from the best point so far. What it returns is
the best point that it has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm_attack.attacks.norms import Ball

_MOMENTUM = 0.75  # share of the new step; the rest is of the step before
_RISES = 0.75  # of the steps between checkpoints: with fewer the step is halved
# The first checkpoint, by how much the intervals shrink, and the shortest: in shares of all steps.
_FIRST, _SHRINK, _SHORTEST = 0.22, 0.03, 0.06


@dataclass
class Best:
    """For each example the point with the greatest value so far; the first of equals.

    Attributes:
        ball: with the examples.
        on_best: as of `Watch`, called for points that were evaluated just before.
        point, value: of the best.
    """

    ball: Ball
    on_best: Callable[[Tensor], None] = lambda better: None
    point: Tensor | None = field(default=None, init=False)
    value: Tensor | None = field(default=None, init=False)

    def start(self, point: Tensor, value: Tensor) -> None:
        """The first point, whose value was known before."""
        self.point, self.value = point, value

    def offer(self, point: Tensor, value: Tensor) -> Tensor:
        """Booleans (examples,): where this point is the best so far."""
        if self.point is None or self.value is None:
            self.start(point, value)
            better = torch.ones_like(value, dtype=torch.bool)
        else:
            better = value > self.value
            self.point = self.ball.where(better, point, self.point)
            self.value = torch.where(better, value, self.value)
        self.on_best(better)
        return better


@dataclass(frozen=True)
class Hill:
    """The loss that is climbed.

    Attributes:
        value: point -> losses (examples,).
        slope: point -> the same, and their gradient, like the point.
        clean_value, clean_slope: both at the clean point, where they are known.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], tuple[Tensor, Tensor]]
    clean_value: Tensor | None = None
    clean_slope: Tensor | None = None


def ascend(start: Tensor, hill: Hill, best: Best, *, steps: int, step: float) -> Tensor:
    """The best of the points on the way up from `start`.

    Args:
        start: a point like those of `perturb`.
        hill: what is climbed; there are `steps` gradients, and one more value.
        best: gets every point that is evaluated. Its ball is what is allowed; step sizes and best
            points are of each of its examples by itself.
        steps: how many.
        step: the first step's length.
    """
    ball = best.ball
    own = best if best.point is None else Best(ball)
    point = previous = start
    if start is ball.x and hill.clean_value is not None and hill.clean_slope is not None:
        value, slope = hill.clean_value, hill.clean_slope
        own.start(start, value)
    else:
        value, slope = hill.slope(start)
        _offer(start, value, own, best)
    best_slope, checked = slope, value
    size = torch.full_like(value, step)
    halved, rises = torch.ones_like(value, dtype=torch.bool), torch.zeros_like(value)
    interval, since = _of(steps, _FIRST), 0
    for i in range(steps):
        length = ball.examples.spread(size, point).to(point.dtype)
        ahead = ball.step(point, slope, length)
        moved = _with_momentum(ball, ahead, point, previous if i else None)
        previous, point, before = point, moved, value
        if i + 1 == steps:
            _offer(point, hill.value(point), own, best)
            break
        value, slope = hill.slope(point)
        better = _offer(point, value, own, best)
        best_slope = ball.where(better, slope, best_slope)
        rises, since = rises + (value > before), since + 1
        if since == interval:
            assert own.point is not None and own.value is not None
            stuck = ~halved & (checked >= own.value)
            halved, checked = (rises <= _RISES * interval) | stuck, own.value
            size = torch.where(halved, size / 2, size)
            point = ball.where(halved, own.point, point)
            slope = ball.where(halved, best_slope, slope)
            rises, since = torch.zeros_like(rises), 0
            interval = max(interval - _of(steps, _SHRINK), _of(steps, _SHORTEST))
    assert best.point is not None
    return best.point


def _offer(point: Tensor, value: Tensor, own: Best, best: Best) -> Tensor:
    """Booleans (examples,): where it is the best from its start; also told to the best of all."""
    if own is not best:
        best.offer(point, value)
    return own.offer(point, value)


def _with_momentum(ball: Ball, ahead: Tensor, point: Tensor, previous: Tensor | None) -> Tensor:
    """The point after a step to `ahead`, mixed with the step from `previous`; None: the first."""
    share = 1.0 if previous is None else _MOMENTUM
    previous = point if previous is None else previous
    change = share * (ahead - point) + (1 - share) * (point - previous)
    # what does not move keeps its bits, infinities included
    still = (ahead == point) & (point == previous)
    return ball.stay(torch.where(still, point, point + change))


def _of(steps: int, share: float) -> int:
    return max(int(share * steps), 1)
