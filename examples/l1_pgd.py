"""Projected gradient ascent in an L1 ball, which llm_attack does not have, in one file.

    llm-attack run --model demo --tasks demo_piqa --attacks none,examples.l1_pgd:l1_pgd -o out-l1

Epsilon is the L1 radius. This ball is inside the L-infinity ball of the same radius, to which the
program confines every attack.
"""

import torch

HALVINGS = 60  # of the interval that contains the threshold of the projection


def l1_pgd(x, loss, ball, keys, *, steps, step_size):
    """Each step goes along the coordinate that gains most, then back to the L1 ball.

    Args:
        x: the clean point.
        loss: the loss to raise; `loss.gradient(point)` is its gradient.
        ball: the allowed points; `ball.balls` says which elements share a ball.
        keys: seeds of random draws, which this attack does not make.
        steps, step_size: number of steps, and their L1 length.
    """
    change = torch.zeros_like(x)
    for _ in range(steps):
        slope = loss.gradient(x + change)
        largest = ball.balls.spread(ball.balls.largest(slope), x)
        best = (slope.abs() >= largest) & (slope != 0)
        change = projected(change + step_size * slope.sign() * best, ball.balls, ball.epsilon)
    return x + change


def projected(change, balls, radius):
    """The nearest `change` whose L1 norm in each of `balls` is at most `radius`.

    It is the soft threshold that leaves `radius` (Duchi et al. 2008). Bisection finds it.
    """
    size = change.double().abs()
    low = torch.zeros_like(balls.largest(size))
    high = balls.largest(size)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        left = balls.sum((size - balls.spread(middle, size)).clamp(min=0))
        low, high = (
            torch.where(left > radius, middle, low),
            torch.where(left > radius, high, middle),
        )
    inside = balls.norm(size, 1) <= radius
    threshold = balls.spread(torch.where(inside, 0.0, high), size)
    return (change.sign() * (size - threshold).clamp(min=0)).to(change.dtype)
