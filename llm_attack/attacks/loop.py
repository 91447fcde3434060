"""One loop for all attacks: steps along the gradient of a loss, projected on the ball and the box.

An attack is a function of a point `x` and of a closure `loss(x)` with one value per example. Only
the closure knows if the point is pixels, features or token embeddings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llm_attack.attacks import blocks
from llm_attack.attacks.apgd import Best, Hill, ascend
from llm_attack.attacks.closures import (
    Known,
    Loss,
    Losses,
    Watch,
    check_functions,
    check_groups,
    check_point,
    check_types,
    leaf,
)
from llm_attack.attacks.draws import rehashed
from llm_attack.attacks.minimal import bisect, fmn
from llm_attack.attacks.norms import Ball, Elements
from llm_attack.attacks.settings import Attack, step_settings
from llm_attack.attacks.sparse import fewest
from llm_attack.base.errors import UsageError

_ALL, _NOTHING, _NOBODY = Elements(), Known(), Watch()


def loss_gradient(loss: Loss, x: Tensor) -> Tensor:
    """Gradient of `loss(x).sum()` with respect to `x`; nothing else gets a gradient."""
    return _with_gradient(loss, x)[1]


def _with_gradient(loss: Loss, x: Tensor) -> tuple[Tensor, Tensor]:
    """`loss(x)`, detached, and the gradient of its sum; also under torch.inference_mode."""
    with torch.inference_mode(False), torch.enable_grad():
        x = leaf(x)
        values = loss(x)
        (gradient,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), gradient


def least_likely(scores: Tensor, gold: Tensor) -> Tensor:
    """The class with the lowest score among those that are not gold, (N,).

    Args:
        scores: (N, C); +inf for classes that do not exist.
        gold: (N,) indices or (N, C) booleans.
    """
    if gold.dtype != torch.bool:
        gold = torch.nn.functional.one_hot(gold, scores.shape[-1]).bool()
    return scores.masked_fill(gold, torch.inf).argmin(-1)


def perturb(
    attack: Attack,
    x: Tensor,
    loss: Losses | Loss | None = None,
    *,
    bounds: tuple[float, float] | None = None,
    elements: Elements = _ALL,
    keys: Tensor | None = None,
    known: Known = _NOTHING,
    watch: Watch = _NOBODY,
) -> Tensor:
    """Attacks a point, and returns the perturbed one.

    Args:
        attack: name and settings; same definitions as torchattacks, foolbox and cleverhans.
        x: the clean point within `bounds`; (N, ...), unless `elements` say otherwise.
        loss: closure that returns (N,); untargeted attacks raise it. Pass `Losses` for attacks that
            need other functions.
        bounds: box that the point must stay in, (0, 1) for pixels; None for embeddings, features.
        elements: which elements of `x` move, and which examples and balls they belong to.
        keys: int64 of shape x.shape[:k], one key per draw (noise, random starts, restarts, blocks);
            None: one for each entry of the first dimension, from torch's generator.
        known: values at `x` that the caller already has, such as the gradient.
        watch: functions that are called with gradients and best points.

    Returns:
        Tensor like `x`, detached. It is `x` itself for epsilon 0 and for `none`. Otherwise it is
        within `bounds`, and within epsilon of `x` in the attack's norm (`gaussian`: on the
        average), as computed in the dtype of `x`. `fmn` and `critical` return the nearest point
        found whose gap is above 0. A gradient that is zero or NaN does not move the point.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the attack needs a closure that was not given, a closure does not return (N,),
            the bounds are no interval, `x` is not within them, or a shape does not fit that of `x`.

    Networks in the closures should be in evaluation mode (`network.eval()`). In training mode,
    dropout makes new draws at every step, and batch norm counts every forward in its statistics.
    """
    more: Any = {"elements": elements, "keys": keys, "known": known, "watch": watch}
    *_, point = deque(trajectory(attack, x, loss, bounds=bounds, **more), maxlen=1)
    return point


def trajectory(
    attack: Attack,
    x: Tensor,
    loss: Losses | Loss | None = None,
    *,
    bounds: tuple[float, float] | None = None,
    elements: Elements = _ALL,
    keys: Tensor | None = None,
    known: Known = _NOTHING,
    watch: Watch = _NOBODY,
) -> Iterator[Tensor]:
    """The attacked point after every step, if the steps do not depend on how many follow.

    This holds if `Attack.by_steps` is true. Other attacks give one point, the result. Arguments and
    errors are as for `perturb`.
    """
    if isinstance(attack, Attack) and attack.cells is not None:
        raise ValueError(f"attack {attack.name!r} stays in cells: call attacks.cells.confined")
    check_types({"elements": elements, "known": known, "watch": watch})
    tensors = {"mask": elements.mask, "keys": keys, "gradient": known.gradient}
    check_point(attack, x, bounds, tensors)
    check_groups(x, {"examples": elements.examples, "balls": elements.balls})
    check_functions(vars(watch))
    losses = Losses.of(loss)
    x = x.detach()
    if attack.identity:
        yield x
        return
    ball = Ball.of(attack, x, bounds=bounds, elements=elements)
    losses = losses.checked(attack, ball.examples.n)
    known.check(ball.examples.n)
    if attack.draws and keys is None:
        keys = torch.randint(-(2**63), 2**63 - 1, (len(x),), device=x.device)
    run = _Run(attack, losses, ball, keys, known, watch)
    if attack.by_steps:
        yield from run.steps()
    else:
        yield run.result()


@dataclass(frozen=True)
class _Run:
    """One attack on one point. The fields are the checked arguments of `perturb`."""

    attack: Attack
    losses: Losses
    ball: Ball
    keys: Tensor | None
    known: Known
    watch: Watch

    @property
    def loss(self) -> Loss:
        assert self.losses.loss is not None
        return self.losses.loss

    @property
    def draws(self) -> Tensor:
        assert self.keys is not None
        return self.keys

    def used(self, slope: Tensor) -> Tensor:
        """The part of a gradient that the attack uses."""
        self.watch.on_gradient(slope)
        return slope.masked_fill(slope.isnan() | ~self.ball.moves, 0)

    def start(self) -> Tensor:
        """The point where steps begin. For noise this is already the result."""
        kind, ball = self.attack.kind, self.ball
        if kind.start is None:
            return ball.x
        point = ball.drawn(getattr(ball.norm, kind.start), self.draws)
        return ball.stay(point) if kind.projected else ball.only_moves(point)

    def steps(self) -> Iterator[Tensor]:
        """The point after each step along the gradient."""
        attack, kind, ball = self.attack, self.attack.kind, self.ball
        ascended = self.losses.target_loss if kind.targeted else self.losses.loss
        assert ascended is not None
        step = -attack.step if kind.targeted or kind.reverse else attack.step
        point, velocity = self.start(), torch.zeros((), dtype=ball.x.dtype, device=ball.x.device)
        for i in range(attack.steps if kind.iterative else 1):
            known = self.known.gradient if i == 0 else None
            slope = self.used(loss_gradient(ascended, point) if known is None else known)
            if kind.momentum:
                slope = velocity = attack.decay * velocity + ball.examples.scaled(slope, 1)
            point = ball.step(point, slope, step)
            yield point

    def result(self) -> Tensor:
        """The final point of an attack that is more than steps, or has none."""
        kind = self.attack.kind
        if kind.fixed:
            raise ValueError(
                f"attack {self.attack.name!r}: its perturbation is added by the caller"
            )
        if kind.swaps:
            raise ValueError(f"attack {self.attack.name!r} swaps tokens: call attacks.swaps")
        if kind.members:
            return self._battery()
        if kind.function is not None:
            return self._own(kind.function)
        if kind.search:
            best = Best(self.ball, self.watch.on_best)
            return blocks.search(
                partial(_value, self.loss), best, self.draws, queries=self.attack.queries
            )
        if not kind.gradient:
            return self.start()
        if kind.sparse:
            return self._fewest()
        return self._nearest() if kind.minimal else self._climbed(self.ball, self.watch)

    def _battery(self) -> Tensor:
        """The point of the first member that makes an example wrong (a gap above 0).

        If there is none, it is the point with the greatest gap.
        """
        gap, watch = self._hill(self.losses.gap, _without_nan(self.known.gap)), self.watch
        value = gap.value(self.ball.x) if gap.clean_value is None else gap.clean_value
        best = Best(self.ball, watch.on_best)
        best.start(self.ball.x, value)
        assert best.value is not None and best.point is not None
        for member in self.attack.members:
            wrong = best.value > 0
            if wrong.all():
                break
            alone = replace(watch, on_best=Watch().on_best)
            point = replace(self, attack=member, watch=alone).result()
            best.offer(point, torch.where(wrong, -torch.inf, gap.value(point)))
        return best.point

    def _own(self, function: Callable[..., Any]) -> Tensor:
        """The point that a user's own attack returns, projected on the ball."""
        attack, ball = self.attack, self.ball
        given = step_settings(attack) | {"step_size": attack.step}
        settings = {name: given[name] for name in attack.kind.settings}
        point = function(ball.x, Objective(self.loss, self.used), ball, self.draws, **settings)
        if not isinstance(point, Tensor) or point.shape != ball.x.shape:
            got = list(point.shape) if isinstance(point, Tensor) else type(point).__name__
            raise UsageError(
                f"attack={attack.name}: must return a point of shape {list(ball.x.shape)}, not"
                f" {got}"
            )
        point = point.detach().to(ball.x)
        # coordinates that do not move keep their bits
        return ball.stay(torch.where(point.isnan(), ball.x, point))

    def _climbed(self, ball: Ball, watch: Watch) -> Tensor:
        """The point with the greatest loss that Auto-PGD finds from all its starts.

        With targets, it lowers the loss of each target in turn, and the greatest gap counts.
        """
        if not self.attack.kind.targeted:
            clean = _without_nan(self.known.loss), self.known.gradient
            best = Best(ball, watch.on_best)
            return self._ascended(self._hill(self.loss, *clean), best)
        gap = self._hill(self.losses.gap, _without_nan(self.known.gap))
        best = Best(ball, watch.on_best)
        # also the clean point: a target that an example does not have leads nowhere
        if gap.clean_value is None:
            best.offer(ball.x, gap.value(ball.x))
        else:
            best.start(ball.x, gap.clean_value)
        for target in self.losses.target_losses:
            point = self._ascended(self._hill(partial(_negative, target)), Best(ball))
            best.offer(point, gap.value(point))
        assert best.point is not None
        return best.point

    def _nearest(self) -> Tensor:
        """The nearest point with a gap above 0."""
        attack, ball, watch = self.attack, self.ball, self.watch
        gap = self._hill(self.losses.gap, _without_nan(self.known.gap))
        if not attack.kind.adaptive:
            step = ball.farthest if attack.step_size is None else attack.step_size
            return fmn(gap, ball, watch, steps=attack.steps, step=step)
        first = attack.epsilon / 16 if attack.first_epsilon is None else attack.first_epsilon
        climb = partial(self._climbed, watch=replace(watch, on_best=Watch().on_best))
        return bisect(climb, gap, ball, watch, rounds=attack.rounds, first=first)

    def _fewest(self) -> Tensor:
        """A point with few moved elements and a gap above 0."""
        attack, known = self.attack, self.known
        hill = self._hill(self.loss, _without_nan(known.loss), known.gradient)
        gap = self._hill(self.losses.gap, _without_nan(known.gap))
        how = {"steps": attack.steps, "exact": attack.exact_tokens}
        return fewest(hill, gap, self.ball, step=attack.step, **how)

    def _ascended(self, hill: Hill, best: Best) -> Tensor:
        for start in self._starts(best.ball):
            ascend(start, hill, best, steps=self.attack.steps, step=self.attack.step)
        assert best.point is not None
        return best.point

    def _starts(self, ball: Ball) -> Iterator[Tensor]:
        yield ball.x
        keys = self.keys
        for _ in range(self.attack.restarts - 1):
            assert keys is not None
            keys = rehashed(keys)
            yield ball.stay(ball.drawn(ball.norm.in_ball, keys))

    def _hill(
        self, loss: Loss | None, value: Tensor | None = None, gradient: Tensor | None = None
    ) -> Hill:
        """The loss to raise, and its known values at the clean point."""
        assert loss is not None

        def slope(point: Tensor) -> tuple[Tensor, Tensor]:
            values, slope = _with_gradient(loss, point)
            return values.masked_fill(values.isnan(), -torch.inf), self.used(slope)

        clean_slope = None
        if value is not None and gradient is not None:
            clean_slope = self.used(gradient)
        return Hill(partial(_value, loss), slope, value, clean_slope)


def _value(loss: Loss, x: Tensor) -> Tensor:
    """`loss(x)`, with -inf in place of NaN, so NaN is never the best."""
    with torch.no_grad():
        values = loss(x)
    return values.masked_fill(values.isnan(), -torch.inf)


@dataclass(frozen=True)
class Objective:
    """The loss that a user's own attack gets.

    Attributes:
        loss: point -> (examples,) values, which the attack raises; differentiable.
        used: gradient -> the part of it that is used. The diagnostics count it.
    """

    loss: Loss
    used: Callable[[Tensor], Tensor]

    def __call__(self, point: Tensor) -> Tensor:
        """The (examples,) values at a point."""
        return self.loss(point)

    def gradient(self, point: Tensor) -> Tensor:
        """Gradient of the sum, like `point`; zero where the point may not move, and for NaN."""
        return self.used(loss_gradient(self.loss, point))


def _without_nan(values: Tensor | None) -> Tensor | None:
    """Replaces NaN by -inf, so it is never the best."""
    return None if values is None else values.masked_fill(values.isnan(), -torch.inf)


def _negative(loss: Loss, x: Tensor) -> Tensor:
    return -loss(x)


def perturb_each(
    attacks: Iterable[Attack],
    x: Tensor,
    loss: Losses | Loss | None = None,
    *,
    known: Known = _NOTHING,
    **options: Any,
) -> Iterator[Tensor]:
    """The attacked points of several attacks. Attacks that start at `x` share its gradient.

    `known` and the options are as for `perturb`. Several epsilons of `fgsm` cost one gradient.
    """
    for attack in attacks:
        shares = attack.uses_clean_gradient
        ascended = Losses.of(loss).loss
        missing = known.gradient is None or (attack.kind.adaptive and known.loss is None)
        if shares and missing and ascended is not None:
            known = Known(*_with_gradient(ascended, x))
        yield perturb(attack, x, loss, known=known if shares else _NOTHING, **options)
