"""Projected gradient ascent in an L1 ball, which llm_attack does not have, in one file.

    llm-attack run --model demo --tasks demo_piqa --attacks none,examples.l1_pgd:l1_pgd -o out-l1

Epsilon is the L1 radius. That ball lies inside the L-infinity ball of the same radius, which the
program keeps every attack in.
"""

import torch

HALVINGS = 60  # of the interval in which the threshold of the projection is


def l1_pgd(x, loss, ball, keys, *, steps, step_size):
    """Each step goes along the coordinate that gains most, then back to the L1 ball.

    Args:
        x: the clean point.
        loss: what is raised; `loss.gradient(point)` is its gradient.
        ball: what is allowed; `ball.balls` says which elements share a ball.
        keys: of random draws; there are none.
        steps, step_size: how many, and their L1 length.
    """
    change = torch.zeros_like(x)
    for _ in range(steps):
        slope = loss.gradient(x + change)
        largest = ball.balls.spread(ball.balls.largest(slope), x)
        best = (slope.abs() >= largest) & (slope != 0)
        change = projected(change + step_size * slope.sign() * best, ball.balls, ball.epsilon)
    return x + change


def projected(change, balls, radius):
    """The nearest `change` whose L1 norm in each of `balls` is `radius` at most.

    It is the soft threshold that leaves `radius` (Duchi et al. 2008), which is found by halving.
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
