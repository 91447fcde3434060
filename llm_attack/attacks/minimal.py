"""The nearest point whose loss is above 0, which means a wrong answer: two ways to look for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from llm_attack.attacks.apgd import Hill
from llm_attack.attacks.closures import Watch
from llm_attack.attacks.norms import Ball

# Of FMN, first and last: shares of the first step, and of the radius that it changes by.
_STEPS = 1.0, 0.01
_CHANGES = 0.05, 0.001
_BEYOND = 1.002  # its last try: so far past the boundary, relative to how far that seems to be

_BEFORE_BRACKETED = 4.0  # by what `bisect` divides an amplitude as long as all were enough
_NEAR = 1.002  # it stops where the bracket's ends differ by less


def fmn(hill: Hill, ball: Ball, watch: Watch, *, steps: int, step: Tensor | float) -> Tensor:
    """The Fast Minimum-Norm attack (Pintor et al. 2021), whose steps follow the gradient itself.

    Each step is projected on a ball whose radius is the linear estimate of the distance until the
    boundary is crossed, then shrinks on the far side of it and grows on the near one.

    Where the loss is linear, that estimate leads to the boundary itself, and rounding decides on
    which side of it the steps stay. So the examples of which no step crossed it get one try more: a
    step along the last gradient, a little past the estimate. This is not part of the paper.

    Args:
        hill: the loss; the last try needs no gradient.
        ball: the largest that is allowed.
        watch: told which points are the shortest so far.
        steps: gradients.
        step: L2 length of the first step, one or (examples,); steps get shorter as a cosine, to a
            hundredth.

    Returns:
        The shortest point found; the clean one where none was.
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
    # where the ball ends before that, the whole radius in this direction leads farther
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
    """The shortest point that an attack finds in balls of several radii, for each example.

    Args:
        climb: a ball -> the point that the attack finds there.
        hill: the loss, of which the values are read.
        ball: the largest that is tried.
        watch: told which points are the shortest so far.
        rounds: radii. The first is that of `ball`, the second `first`; then it is divided by
            four as long as that is enough, and then comes the geometric mean of the largest that
            was not enough and the shortest point that was found.
        first: a radius.

    Returns:
        The shortest point found; what the attack found in `ball` where that was not enough.
    """
    best, clean = ball.x, hill.clean_value
    if clean is None:
        clean = hill.value(ball.x)
        watch.on_best(torch.ones_like(clean, dtype=torch.bool))
    shortest = torch.where(clean > 0, 0.0, math.inf)
    shortest = shortest.to(ball.length(ball.x - ball.x))
    largest = torch.zeros_like(shortest)  # of those that were not enough
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
