"""Auto-PGD (Croce and Hein 2020): projected ascent that finds its own step sizes.

The step starts at twice epsilon and is halved, for each example by itself, when at a checkpoint
fewer than three quarters of the steps since the last one have raised the loss, or when nothing has
been gained at the same step size; then it goes on from the best point so far. What it returns is
the best point that it has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from llm_attack.attacks.norms import Ball

_MOMENTUM = 0.75  # share of the new step; the rest is of the step before
_RISES = 0.75  # of the steps between checkpoints: with fewer the step is halved
# The first checkpoint, by how much the intervals shrink, and the shortest: in shares of all steps.
_FIRST, _SHRINK, _SHORTEST = 0.22, 0.03, 0.06

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


def ascend(
    start: Tensor, evaluate: Evaluate, ball: Ball, *, steps: int, step: float
) -> tuple[Tensor, Tensor]:
    """The best of the points on the way up from `start`, and its loss.

    Args:
        start: a point like those of `perturb`.
        evaluate: point -> losses (examples,), and their gradient, like the point.
        ball: what is allowed; step sizes and best points are of each of its examples by itself.
        steps: how many; there is one gradient more.
        step: the first step's length.
    """
    point = previous = best = start
    value, slope = evaluate(point)
    best_value, best_slope = value, slope
    size = torch.full_like(value, step)
    checked, halved = best_value, torch.ones_like(value, dtype=torch.bool)
    rises = torch.zeros_like(value)
    interval, since = _of(steps, _FIRST), 0
    for i in range(steps):
        length = ball.examples.spread(size, point).to(point.dtype)
        ahead = ball.step(point, slope, length)
        share = _MOMENTUM if i else 1.0
        change = share * (ahead - point) + (1 - share) * (point - previous)
        # what does not move keeps its bits, infinities included
        still = (ahead == point) & (point == previous)
        moved = ball.stay(torch.where(still, point, point + change))
        previous, point, before = point, moved, value
        value, slope = evaluate(point)
        better = value > best_value
        best, best_slope = ball.where(better, point, best), ball.where(better, slope, best_slope)
        best_value = torch.where(better, value, best_value)
        rises = rises + (value > before)
        since += 1
        if since == interval:
            stuck = ~halved & (checked >= best_value)
            halved, checked = (rises <= _RISES * interval) | stuck, best_value
            size = torch.where(halved, size / 2, size)
            point, slope = ball.where(halved, best, point), ball.where(halved, best_slope, slope)
            rises, since = torch.zeros_like(rises), 0
            interval = max(interval - _of(steps, _SHRINK), _of(steps, _SHORTEST))
    return best, best_value


def best_of(found: Iterable[tuple[Tensor, Tensor]], ball: Ball) -> tuple[Tensor, Tensor]:
    """For each example the point with the greatest loss, and that loss; the first of equals."""
    points = iter(found)
    best, most = next(points)
    for point, value in points:
        best = ball.where(value > most, point, best)
        most = torch.maximum(most, value)
    return best, most


def _of(steps: int, share: float) -> int:
    return max(int(share * steps), 1)
