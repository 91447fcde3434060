"""Two searches for the nearest point whose loss is above 0, which means a wrong answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from llm_attack.attacks.apgd import Hill
from llm_attack.attacks.closures import Watch
from llm_attack.attacks.norms import Ball

# FMN, first and last step: shares of the first step, and the share by which the radius changes.
_STEPS = 1.0, 0.01
_CHANGES = 0.05, 0.001
_BEYOND = 1.002  # how far the last try of FMN goes, relative to the estimated distance

_BEFORE_BRACKETED = 4.0  # `bisect` divides an amplitude by this as long as all were enough
_NEAR = 1.002  # `bisect` stops if the ends of the bracket differ by less


def fmn(hill: Hill, ball: Ball, watch: Watch, *, steps: int, step: Tensor | float) -> Tensor:
    """The Fast Minimum-Norm attack (Pintor et al. 2021). Its steps follow the gradient itself.

    Each step is projected on a ball. Until the boundary is crossed, the radius is the linear
    estimate of the distance. Then the radius shrinks on the far side of the boundary, and grows on
    the near side.

    If the loss is linear, the estimate leads exactly to the boundary, and rounding decides on which
    side the steps stay. So examples that no step moved across it get one more try: a step along the
    last gradient, a little past the estimate. This is not part of the paper.

    Args:
        hill: the loss; the last try needs no gradient.
        ball: the largest ball that is allowed.
        watch: called with the points that are the shortest so far.
        steps: number of gradients.
        step: L2 length of the first step, a number or (examples,). Steps shrink along a cosine, to
            a hundredth of it.

    Returns:
        The shortest point found, or the clean point.
    """
    x, point, best = ball.x, ball.x, ball.x
    first = ball.examples.spread(step, x).to(x.dtype) if isinstance(step, Tensor) else step
    value, slope = hill.slope(x)
    fooled = torch.zeros_like(value, dtype=torch.bool)
    length = ball.length(x - x)
    least, radius = torch.full_like(length, math.inf), torch.full_like(length, math.inf)
    for i in range(steps):
        cosine = (1 + math.cos(math.pi * i / steps)) / 2
        size, change = (b + (a - b) * cosine for a, b in (_STEPS, _CHANGES))
        if i:
            value, slope = hill.slope(point)
            length = ball.length(point - x)
        wrong = value > 0
        better = wrong & (length < least)
        best, least = ball.where(better, point, best), torch.where(better, length, least)
        watch.on_best(better)
        fooled = fooled | wrong
        ahead = length + value.abs() / ball.dual(slope).clamp(min=1e-12)
        near = torch.where(fooled, radius * (1 + change), ahead)
        radius = torch.where(wrong, torch.minimum(radius * (1 - change), least), near)
        radius = radius.clamp(max=ball.epsilon)
        last = point
        moved = point + size * first * ball.examples.scaled(slope, 2)
        point = replace(ball, scale=radius / ball.epsilon).stay(moved)
    radius, inside = _BEYOND * ahead, _BEYOND * ahead <= ball.epsilon
    radius = radius.clamp(max=ball.epsilon)
    # if the ball ends before that, the whole radius in this direction leads farther
    start, far = ball.where(inside, last, x), radius - torch.where(inside, length, 0)
    step = ball.examples.spread(far, x) * ball.norm.direction(slope, ball.balls)
    beyond = replace(ball, scale=radius / ball.epsilon).stay(start + step.to(x.dtype))
    better = ~fooled & (hill.value(beyond) > 0)
    watch.on_best(better)
    return ball.where(better, beyond, best)


def bisect(
    climb: Callable[[Ball], Tensor],
    hill: Hill,
    ball: Ball,
    watch: Watch,
    *,
    rounds: int,
    first: float,
) -> Tensor:
    """For each example, the shortest point that an attack finds in balls of several radii.

    Args:
        climb: ball -> the point that the attack finds in it.
        hill: the loss; only its values are read.
        ball: the largest ball to try.
        watch: called with the points that are the shortest so far.
        rounds: number of radii. The first is the radius of `ball`, and the second is `first`. Then
            the radius is divided by four as long as the attack succeeds. After that comes the
            geometric mean of the largest radius that failed and the length of the shortest point.
        first: the second radius.

    Returns:
        The shortest point found. If there is none, the point that the attack found in `ball`.
    """
    best, clean = ball.x, hill.clean_value
    if clean is None:
        clean = hill.value(ball.x)
        watch.on_best(torch.ones_like(clean, dtype=torch.bool))
    shortest = torch.where(clean > 0, 0.0, math.inf)
    shortest = shortest.to(ball.length(ball.x - ball.x))
    largest = torch.zeros_like(shortest)  # radius at which the attack failed
    radius = torch.full_like(shortest, ball.epsilon)
    for i in range(rounds):
        point = climb(replace(ball, scale=radius / ball.epsilon))
        wrong = hill.value(point) > 0
        length = ball.length(point - ball.x)
        better = wrong & (length < shortest)
        taken = better | (shortest.isinf() & (i == 0))
        watch.on_best(taken)
        best = ball.where(taken, point, best)
        shortest = torch.where(better, length, shortest)
        largest = torch.where(wrong, largest, torch.maximum(largest, radius))
        open_ = shortest.isfinite() & (shortest > _NEAR * largest) & (shortest > 0)
        if not open_.any():
            break
        between = torch.where(
            largest > 0, (largest * shortest).sqrt(), shortest / _BEFORE_BRACKETED
        )
        radius = torch.where(open_, torch.minimum(between, shortest), radius)
        if i == 0:
            radius = torch.where(open_, radius.new_tensor(first), radius)
    return best
