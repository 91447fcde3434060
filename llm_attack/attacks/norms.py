"""The balls that attacks stay in: for each norm its random points, a step's direction, projection.

Whatever is one number per example (a norm, the scale of a momentum) goes by `Groups`, an index, so
that a point of rows, of nodes that requests share, and of trees gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_attack.attacks.draws import normal, signs, uniform, words


def widest(device: torch.device) -> torch.dtype:
    """The float of most bits that `device` has."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Groups:
    """Which group each element of a point x belongs to: an example's, or a ball's.

    Attributes:
        index: int64 of shape x.shape[:k]; all coordinates of an element are in one group.
        n: number of groups.
    """

    index: Tensor
    n: int

    @classmethod
    def rows(cls, x: Tensor) -> Groups:
        """A group for each entry of the first dimension."""
        return cls(torch.arange(len(x), device=x.device), len(x))

    def sum(self, values: Tensor) -> Tensor:
        """(n,) sums of `values`, which have the shape of x."""
        of_elements = values.reshape(*self.index.shape, -1).sum(-1).flatten()
        return of_elements.new_zeros(self.n).index_add(0, self.index.flatten(), of_elements)

    def norm(self, values: Tensor, p: int) -> Tensor:
        """(n,) L1 or L2 norms, in float64: squares of a small gradient are nothing in float32."""
        wide = values.to(widest(values.device)).abs()
        return self.sum(wide) if p == 1 else self.sum(wide.square()).sqrt()

    def spread(self, of_groups: Tensor, x: Tensor) -> Tensor:
        """Each group's value at its elements, in a shape that broadcasts with `x`."""
        return of_groups[self.index].reshape(self.index.shape + (1,) * (x.dim() - self.index.dim()))

    def scaled(self, values: Tensor, p: int) -> Tensor:
        """`values` with norms of 1; zero where the norm is zero or not finite."""
        norm = self.norm(values, p)
        factor = torch.where((norm > 0) & norm.isfinite(), 1 / norm, 0)
        return (values * self.spread(factor, values)).to(values.dtype)


@dataclass(frozen=True)
class Norm:
    """The geometry of balls round a clean point x.

    Attributes:
        on_sphere: (keys, moves, x, balls) -> a random point at distance 1 from 0.
        in_ball: (keys, moves, x, balls) -> a uniform point of the unit ball round 0. `moves`, which
            broadcasts with x, is False where nothing is drawn.
        direction: (gradient, balls) -> the step of length 1 that gains most.
        project: (point, x, epsilon, balls) -> the nearest point within epsilon of x.
    """

    on_sphere: Callable[[Tensor, Tensor, Tensor, Groups], Tensor]
    in_ball: Callable[[Tensor, Tensor, Tensor, Groups], Tensor]
    direction: Callable[[Tensor, Groups], Tensor]
    project: Callable[[Tensor, Tensor, float, Groups], Tensor]


def _l2_sphere(keys: Tensor, moves: Tensor, x: Tensor, balls: Groups) -> Tensor:
    return balls.scaled(normal(keys, x) * moves, 2).to(x.dtype)


def _l2_ball(keys: Tensor, moves: Tensor, x: Tensor, balls: Groups) -> Tensor:
    """A point of the sphere times u ** (1 / coordinates), u uniform: the volume inside of it."""
    own = balls.sum(words(keys, x) * moves)  # a key of the ball, whatever the order
    share = (1 + uniform(own, own.float())) / 2
    coordinates = balls.sum(moves.expand_as(x).float()).clamp(min=1)
    radius = share ** (1 / coordinates)
    return _l2_sphere(keys, moves, x, balls) * balls.spread(radius, x).to(x.dtype)


def _l2_project(point: Tensor, x: Tensor, epsilon: float, balls: Groups) -> Tensor:
    change = point - x
    change = change.masked_fill(change.isnan(), 0)  # where both are infinite
    length = balls.spread(balls.norm(change, 2), x)
    return torch.where(length > epsilon, x + (change * (epsilon / length)).to(x.dtype), point)


NORMS = {
    "linf": Norm(
        on_sphere=lambda keys, moves, x, balls: signs(keys, x),
        in_ball=lambda keys, moves, x, balls: uniform(keys, x),
        direction=lambda gradient, balls: gradient.sign(),
        project=lambda point, x, epsilon, balls: point.clamp(x - epsilon, x + epsilon),
    ),
    "l2": Norm(
        on_sphere=_l2_sphere,
        in_ball=_l2_ball,
        direction=lambda gradient, balls: balls.scaled(gradient, 2),
        project=_l2_project,
    ),
}
