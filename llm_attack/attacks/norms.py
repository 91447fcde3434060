"""The balls that attacks stay in. Each norm has random points, a step direction and a projection.

Values per example, such as a norm or the scale of a momentum, are computed by an index (`Groups`).
So a point of rows, of nodes that requests share, and of trees gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_attack.attacks.draws import normal, signs, uniform, words
from llm_attack.attacks.settings import Attack


def widest(device: torch.device) -> torch.dtype:
    """The widest float type that `device` supports."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Groups:
    """The group of each element of a point x. A group is an example or a ball.

    Attributes:
        index: int64 of shape x.shape[:k]; all coordinates of an element are in one group.
        n: number of groups.
    """

    index: Tensor
    n: int

    @classmethod
    def rows(cls, x: Tensor) -> Groups:
        """Groups with one group for each entry of the first dimension."""
        return cls(torch.arange(len(x), device=x.device), len(x))

    def sum(self, values: Tensor) -> Tensor:
        """(n,) sums of `values`, which has the shape of x."""
        of_elements = values.reshape(*self.index.shape, -1).sum(-1).flatten()
        return of_elements.new_zeros(self.n).index_add(0, self.index.flatten(), of_elements)

    def largest(self, values: Tensor) -> Tensor:
        """(n,) largest absolute values, in float64."""
        wide = values.to(widest(values.device)).abs()
        of_elements = wide.reshape(*self.index.shape, -1).amax(-1).flatten()
        return wide.new_zeros(self.n).scatter_reduce(0, self.index.flatten(), of_elements, "amax")

    def norm(self, values: Tensor, p: int) -> Tensor:
        """(n,) L1 or L2 norms, in float64: in float32, squares of a small gradient become zero."""
        wide = values.to(widest(values.device)).abs()
        return self.sum(wide) if p == 1 else self.sum(wide.square()).sqrt()

    def spread(self, of_groups: Tensor, x: Tensor) -> Tensor:
        """Copies each group's value to its elements, in a shape that broadcasts with `x`."""
        return of_groups[self.index].reshape(self.index.shape + (1,) * (x.dim() - self.index.dim()))

    def scaled(self, values: Tensor, p: int) -> Tensor:
        """Scales `values` to norms of 1; zero if the norm is zero or not finite."""
        norm = self.norm(values, p)
        factor = torch.where((norm > 0) & norm.isfinite(), 1 / norm, 0)
        return (values * self.spread(factor, values)).to(values.dtype)


Draw = Callable[[Tensor, Tensor, Tensor, Groups], Tensor]


@dataclass(frozen=True)
class Norm:
    """The geometry of balls round a clean point x.

    Attributes:
        on_sphere: (keys, moves, x, balls) -> a random point at distance 1 from 0.
        in_ball: (keys, moves, x, balls) -> a uniform point of the unit ball round 0. `moves`, which
            broadcasts with x, is False where nothing is drawn.
        gaussian: the same arguments -> a normal draw with the root mean square of `on_sphere`.
        direction: (gradient, balls) -> the step of length 1 that raises the loss most.
        project: (point, x, epsilon, balls) -> the nearest point within epsilon of x; epsilon is a
            number, or broadcasts with x.
        length: (change, balls) -> (balls.n,) norms, in float64.
        dual: (gradient, balls) -> (balls.n,) dual norms of the gradient: how much a step of length
            1 along `direction` raises the loss.
    """

    on_sphere: Draw
    in_ball: Draw
    gaussian: Draw
    direction: Callable[[Tensor, Groups], Tensor]
    project: Callable[[Tensor, Tensor, Any, Groups], Tensor]
    length: Callable[[Tensor, Groups], Tensor]
    dual: Callable[[Tensor, Groups], Tensor]


def _l2_sphere(keys: Tensor, moves: Tensor, x: Tensor, balls: Groups) -> Tensor:
    return balls.scaled(normal(keys, x) * moves, 2).to(x.dtype)


def _l2_ball(keys: Tensor, moves: Tensor, x: Tensor, balls: Groups) -> Tensor:
    """A point of the sphere times u ** (1 / coordinates), u uniform; uniform in the ball."""
    own = balls.sum(words(keys, x) * moves)  # the ball's key: independent of the order
    share = (1 + uniform(own, own.to(widest(x.device)))) / 2
    radius = share ** (1 / _coordinates(moves, x, balls))
    return _l2_sphere(keys, moves, x, balls) * balls.spread(radius, x).to(x.dtype)


def _l2_gaussian(keys: Tensor, moves: Tensor, x: Tensor, balls: Groups) -> Tensor:
    return (normal(keys, x) / balls.spread(_coordinates(moves, x, balls), x).sqrt()).to(x.dtype)


def _coordinates(moves: Tensor, x: Tensor, balls: Groups) -> Tensor:
    return balls.sum(moves.expand_as(x).to(widest(x.device))).clamp(min=1)


def _l2_project(point: Tensor, x: Tensor, epsilon: Any, balls: Groups) -> Tensor:
    change = point - x
    change = change.masked_fill(change.isnan(), 0)  # if both are infinite
    length = balls.spread(balls.norm(change, 2), x)
    return torch.where(length > epsilon, x + (change * (epsilon / length)).to(x.dtype), point)


NORMS = {
    "linf": Norm(
        on_sphere=lambda keys, moves, x, balls: signs(keys, x),
        in_ball=lambda keys, moves, x, balls: uniform(keys, x),
        gaussian=lambda keys, moves, x, balls: normal(keys, x).to(x.dtype),
        direction=lambda gradient, balls: gradient.sign(),
        project=lambda point, x, epsilon, balls: point.clamp(x - epsilon, x + epsilon),
        length=lambda change, balls: balls.largest(change),
        dual=lambda gradient, balls: balls.norm(gradient, 1),
    ),
    "l2": Norm(
        on_sphere=_l2_sphere,
        in_ball=_l2_ball,
        gaussian=_l2_gaussian,
        direction=lambda gradient, balls: balls.scaled(gradient, 2),
        project=_l2_project,
        length=lambda change, balls: balls.norm(change, 2),
        dual=lambda gradient, balls: balls.norm(gradient, 2),
    ),
}


@dataclass(frozen=True)
class Elements:
    """The elements of a point: whether they move, and which examples and balls they belong to.

    An element is an entry of the point's first dimensions, such as an example or a token.

    Attributes:
        mask: booleans of shape x.shape[:k]; the point never moves where it is False (padding);
            None: all of it may move.
        examples: which of the N examples each element belongs to; None: `x` has one row for each.
        balls: which elements share a ball of radius epsilon; None: the elements of an example.
    """

    mask: Tensor | None = None
    examples: Groups | None = None
    balls: Groups | None = None


@dataclass(frozen=True)
class Ball:
    """The region in which the points of a batch may move.

    Attributes:
        x: the clean point.
        epsilon: the radius.
        norm: the norm of the ball.
        examples: which example each element belongs to.
        balls: which elements share a ball.
        moves: booleans that broadcast with `x`; the point stays where it is False.
        bounds: box that the point stays in; None: no box.
        scale: (examples.n,) factors of all lengths; None: 1.
    """

    x: Tensor
    epsilon: float
    norm: Norm
    examples: Groups
    balls: Groups
    moves: Tensor
    bounds: tuple[float, float] | None = None
    scale: Tensor | None = None

    @classmethod
    def of(
        cls,
        attack: Attack,
        x: Tensor,
        *,
        bounds: tuple[float, float] | None = None,
        elements: Elements = Elements(),  # frozen
    ) -> Ball:
        """The ball of an `Attack`. The other arguments are as for `perturb`."""
        examples, mask = elements.examples or Groups.rows(x), elements.mask
        balls = elements.balls or examples
        if attack.per_token:
            n = x.shape[:-1].numel()
            balls = Groups(torch.arange(n, device=x.device).reshape(x.shape[:-1]), n)
        moves = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        moves = moves.reshape(moves.shape + (1,) * (x.dim() - moves.dim()))
        scale = None
        if attack.by_size:
            sizes = examples.sum(moves.expand_as(x)[..., :1].to(widest(x.device)))
            scale = sizes.clamp(min=1) ** -0.5
        norm = NORMS[attack.norm]
        return cls(x, attack.epsilon, norm, examples, balls, moves, bounds, scale)

    def sized(self, length: Any) -> Any:
        """Multiplies a length, which broadcasts with `x`, by the factor of each example."""
        if self.scale is None:
            return length
        return length * self.examples.spread(self.scale, self.x).to(self.x.dtype)

    def stay(self, point: Tensor) -> Tensor:
        """The nearest point in the ball and the box."""
        inside = self.norm.project(point, self.x, self.sized(self.epsilon), self.balls)
        return self.only_moves(inside)

    def only_moves(self, point: Tensor) -> Tensor:
        """The point clamped to the box; clean where it may not move."""
        inside = point if self.bounds is None else point.clamp(*self.bounds)
        return torch.where(self.moves, inside, self.x)

    def step(self, point: Tensor, slope: Tensor, length: Any) -> Tensor:
        """The point after a step in the direction of `slope`, projected."""
        direction = self.norm.direction(slope, self.balls)
        # adding a zero instead would turn -0.0 into 0.0, and inf * 0 into NaN
        ahead = point + self.sized(length) * direction
        return self.stay(torch.where(direction != 0, ahead, point))

    def drawn(self, draw: Draw, keys: Tensor) -> Tensor:
        """The clean point plus a draw of the norm times the radius; not projected."""
        away: Tensor = self.sized(self.epsilon) * draw(keys, self.moves, self.x, self.balls)
        return self.x + away

    def length(self, change: Tensor) -> Tensor:
        """(examples.n,) the smallest radius that allows a change, in float64."""
        of_balls = self.norm.length(change, self.balls)
        if self.balls is self.examples:
            return of_balls
        return self.examples.largest(self.balls.spread(of_balls, change))

    def dual(self, slope: Tensor) -> Tensor:
        """(examples.n,) by how much a step of length 1 in all balls gains along its direction.

        A ball must hold one whole example, or one element.
        """
        of_balls = self.norm.dual(slope, self.balls)
        if self.balls is self.examples:
            return of_balls
        of_elements = of_balls[self.balls.index].reshape(*self.examples.index.shape, -1)
        return self.examples.sum(of_elements)

    @property
    def farthest(self) -> Tensor:
        """(examples.n,) L2 distance of the farthest point."""
        corner = self.moves.expand_as(self.x).to(self.x.dtype)
        return self.epsilon * self.examples.norm(self.norm.direction(corner, self.balls), 2)

    def where(self, chosen: Tensor, this: Tensor, other: Tensor) -> Tensor:
        """`this` for the examples with `chosen`, (examples.n,), and `other` for the rest."""
        return torch.where(self.examples.spread(chosen, this), this, other)
