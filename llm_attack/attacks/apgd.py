"""Auto-PGD (Croce and Hein 2020): projected ascent that finds its own step sizes.

The step starts at twice epsilon and is halved, for each example by itself, when at a checkpoint
fewer than three quarters of the steps since the last one have raised the loss, or when nothing has
been gained at the same step size; then it goes on from the best point so far. What it returns is
the best point that it has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from llm_attack.attacks.norms import Groups, Norm

FIRST_STEP = 2.0  # in units of epsilon
_MOMENTUM = 0.75  # share of the new step; the rest is of the step before
_RISES = 0.75  # of the steps between checkpoints: with fewer the step is halved
# The first checkpoint, by how much the intervals shrink, and the shortest: in shares of all steps.
_FIRST, _SHRINK, _SHORTEST = 0.22, 0.03, 0.06

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


def ascend(
    start: Tensor,
    evaluate: Evaluate,
    stay: Callable[[Tensor], Tensor],
    *,
    steps: int,
    step: float,
    norm: Norm,
    examples: Groups,
    balls: Groups,
) -> tuple[Tensor, Tensor]:
    """The best of the points on the way up from `start`, and its loss.

    Args:
        start: a point like those of `perturb`.
        evaluate: point -> losses (examples,), and their gradient, like the point.
        stay: projects on what is allowed.
        steps: how many; there is one gradient more.
        step: the first step's length.
        norm: of the ball.
        examples: whose step sizes and best points are found by themselves.
        balls: which elements share a ball.
    """
    point = previous = best = start
    value, slope = evaluate(point)
    best_value, best_slope = value, slope
    size = torch.full_like(value, step)
    checked, halved = best_value, torch.ones_like(value, dtype=torch.bool)
    rises = torch.zeros_like(value)
    interval, since = _of(steps, _FIRST), 0

    def where(chosen: Tensor, this: Tensor, other: Tensor) -> Tensor:
        return torch.where(examples.spread(chosen, this), this, other)

    for i in range(steps):
        step_of = examples.spread(size, point).to(point.dtype)
        direction = norm.direction(slope, balls)
        # as in `perturb`, what does not move keeps its bits, infinities included
        ahead = stay(torch.where(direction != 0, point + step_of * direction, point))
        share = _MOMENTUM if i else 1.0
        change = share * (ahead - point) + (1 - share) * (point - previous)
        still = (ahead == point) & (point == previous)
        moved = stay(torch.where(still, point, point + change))
        previous, point, before = point, moved, value
        value, slope = evaluate(point)
        better = value > best_value
        best, best_slope = where(better, point, best), where(better, slope, best_slope)
        best_value = torch.where(better, value, best_value)
        rises = rises + (value > before)
        since += 1
        if since == interval:
            stuck = ~halved & (checked >= best_value)
            halved, checked = (rises <= _RISES * interval) | stuck, best_value
            size = torch.where(halved, size / 2, size)
            point, slope = where(halved, best, point), where(halved, best_slope, slope)
            rises, since = torch.zeros_like(rises), 0
            interval = max(interval - _of(steps, _SHRINK), _of(steps, _SHORTEST))
    return best, best_value


def best_of(starts: Iterable[Tensor], *args: Any, examples: Groups, **options: Any) -> Tensor:
    """For each example the best point on the ways up from `starts`; the arguments of `ascend`."""
    best: Tensor | None = None
    for start in starts:
        point, value = ascend(start, *args, examples=examples, **options)
        if best is None:
            best, most = point, value
            continue
        best = torch.where(examples.spread(value > most, point), point, best)
        most = torch.maximum(most, value)
    assert best is not None
    return best


def _of(steps: int, share: float) -> int:
    return max(int(share * steps), 1)
