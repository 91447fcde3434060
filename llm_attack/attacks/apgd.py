"""Auto-PGD (Croce and Hein 2020): projected ascent that finds its own step sizes.

Each example has its own step size, which begins at twice epsilon. It is halved at a checkpoint in
two cases. Either at most three quarters of the steps since the last checkpoint have raised the
loss. Or the best loss has not changed since then, and the step was not halved there. The ascent
then continues from the best point so far. The result is the best point that was evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm_attack.attacks.norms import Ball

_MOMENTUM = 0.75  # share of the new step; the previous step has the rest
_RISES = 0.75  # the step is halved if a smaller share of the steps raised the loss
# Shares of all steps: the first checkpoint, how much intervals shrink, the shortest interval.
_FIRST, _SHRINK, _SHORTEST = 0.22, 0.03, 0.06


@dataclass
class Best:
    """The best point of each example so far: the one with the greatest value, the first of equals.

    Attributes:
        ball: the ball, which knows the examples.
        on_best: see `Watch`; it is called for points that were evaluated just before.
        point, value: the best point and its value.
    """

    ball: Ball
    on_best: Callable[[Tensor], None] = lambda better: None
    point: Tensor | None = field(default=None, init=False)
    value: Tensor | None = field(default=None, init=False)

    def start(self, point: Tensor, value: Tensor) -> None:
        """Sets the first point, whose value is already known."""
        self.point, self.value = point, value

    def offer(self, point: Tensor, value: Tensor) -> Tensor:
        """Compares a point with the best. Returns booleans (examples,): where it is better."""
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
    """The loss that an attack raises.

    Attributes:
        value: point -> losses (examples,).
        slope: point -> the losses, and their gradient in the shape of the point.
        clean_value, clean_slope: both at the clean point, if they are known.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], tuple[Tensor, Tensor]]
    clean_value: Tensor | None = None
    clean_slope: Tensor | None = None


def ascend(start: Tensor, hill: Hill, best: Best, *, steps: int, step: float) -> Tensor:
    """Climbs from `start`, and returns the best point.

    Args:
        start: the first point; shape as for `perturb`.
        hill: the loss. It is asked for `steps` gradients and one more value.
        best: gets every point that is evaluated. All points stay in its ball, and each of its
            examples has its own step size and best point.
        steps: number of steps.
        step: length of the first step.
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
    """Booleans (examples,): where the point is the best of this start. `best` gets it as well."""
    if own is not best:
        best.offer(point, value)
    return own.offer(point, value)


def _with_momentum(ball: Ball, ahead: Tensor, point: Tensor, previous: Tensor | None) -> Tensor:
    """The point after a step to `ahead`, mixed with the last step, which began at `previous`.

    `previous` is None for the first step.
    """
    share = 1.0 if previous is None else _MOMENTUM
    previous = point if previous is None else previous
    change = share * (ahead - point) + (1 - share) * (point - previous)
    # coordinates that do not move keep their bits, also if they are infinite
    still = (ahead == point) & (point == previous)
    return ball.stay(torch.where(still, point, point + change))


def _of(steps: int, share: float) -> int:
    return max(int(share * steps), 1)
