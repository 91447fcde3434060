"""One loop for all attacks: steps along a loss's gradient, projected on the ball and the box.

An attack is a function of a point `x` and of a closure `loss(x)` with one value per example; what
the point is (pixels, features, token embeddings) only the closure knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llm_attack.attacks import blocks
from llm_attack.attacks.apgd import ascend, best_of
from llm_attack.attacks.closures import (
    check_functions,
    check_groups,
    check_point,
    checked,
    leaf,
)
from llm_attack.attacks.draws import rehashed
from llm_attack.attacks.minimal import bisect, fmn
from llm_attack.attacks.norms import Ball, Groups
from llm_attack.attacks.settings import Attack, step_settings
from llm_attack.base.errors import UsageError

Loss = Callable[[Tensor], Tensor]


def loss_gradient(loss: Loss, x: Tensor) -> Tensor:
    """Gradient of `loss(x).sum()` with respect to `x` alone; nothing else gets a gradient."""
    return _with_gradient(loss, x)[1]


def _with_gradient(loss: Loss, x: Tensor) -> tuple[Tensor, Tensor]:
    """`loss(x)`, detached, and the gradient of its sum; under torch.inference_mode, too."""
    with torch.inference_mode(False), torch.enable_grad():
        x = leaf(x)
        values = loss(x)
        (gradient,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), gradient


def least_likely(scores: Tensor, gold: Tensor) -> Tensor:
    """The class of the lowest score that is not a gold one, (N,).

    Args:
        scores: (N, C); classes that do not exist are +inf.
        gold: (N,) indices or (N, C) booleans.
    """
    if gold.dtype != torch.bool:
        gold = torch.nn.functional.one_hot(gold, scores.shape[-1]).bool()
    return scores.masked_fill(gold, torch.inf).argmin(-1)


def perturb(
    attack: Attack,
    x: Tensor,
    loss: Loss | None = None,
    *,
    target_loss: Loss | None = None,
    target_losses: Sequence[Loss] = (),
    gap: Loss | None = None,
    bounds: tuple[float, float] | None = None,
    mask: Tensor | None = None,
    keys: Tensor | None = None,
    examples: Groups | None = None,
    balls: Groups | None = None,
    gradient: Tensor | None = None,
    on_gradient: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """The attacked point.

    Args:
        attack: name and settings; same definitions as torchattacks, foolbox and cleverhans.
        x: the clean point within `bounds`; (N, ...), unless `examples` says otherwise.
        loss: closure that returns (N,), ascended by the attacks that are not targeted.
        target_loss: closure for the targeted attacks (`ost`, `illc`), which descend it: the loss of
            the target class, which the caller fixes at the clean point (`least_likely`).
        target_losses: closures for `apgdt`, which descends each in turn: the losses of the classes
            that are not gold.
        gap: closure that is above 0 where the answer is wrong; None: `loss` is. Of what `apgdt`
            finds the point with the greatest counts; `fmn` follows its gradient, and `critical`
            asks it whether what `apgd` finds with `loss` is enough.
        bounds: box that the point must stay in, (0, 1) for pixels; None for embeddings, features.
        mask: booleans of shape x.shape[:k]; where False (padding) the point never moves.
        keys: int64 of shape x.shape[:k], one key per draw (noise, random starts, restarts, blocks);
            None: one for each entry of the first dimension, from torch's generator.
        examples: which of the N examples each element of `x` belongs to; None: `x` has a row each.
        balls: which elements share a ball of radius epsilon; None: those of an example.
        gradient: the first gradient, if the caller has it already (see
            `Attack.uses_clean_gradient`).
        on_gradient: called with every gradient that was used.

    Returns:
        Tensor like `x`, detached: x itself for epsilon 0 and for `none`; else within epsilon of x
        in the attack's norm (`gaussian`: on the average), as computed in the dtype of `x`, and
        within `bounds`; of `fmn` and `critical` the nearest point found whose gap is above 0. A
        gradient that is zero or NaN does not move the point.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the attack needs a closure that was not given, a closure does not return (N,),
            the bounds are no interval, `x` is not within them, or a shape does not fit that of `x`.

    Networks in the closures should be in evaluation mode (`network.eval()`): in training mode
    dropout draws anew at every step, and batch norm counts every forward in its statistics.
    """
    check_point(attack, x, bounds, {"mask": mask, "keys": keys, "gradient": gradient})
    check_groups(x, {"examples": examples, "balls": balls})
    functions = {"loss": loss, "target_loss": target_loss, "gap": gap, "on_gradient": on_gradient}
    check_functions(functions, target_losses)
    x = x.detach()
    if attack.identity:
        return x
    kind = attack.kind
    given = {"loss": loss, "target_loss": target_loss, "target_losses": target_losses}
    for name in kind.closures:
        if not given[name]:
            raise ValueError(f"attack {attack.name!r} needs {name}")
    n = len(x) if examples is None else examples.n
    loss, target_loss, gap = (
        None if closure is None else checked(name, closure, n)
        for name, closure in (("loss", loss), ("target_loss", target_loss), ("gap", gap))
    )
    target_losses = [checked("target_losses", closure, n) for closure in target_losses]
    ball = Ball.of(attack, x, bounds=bounds, mask=mask, examples=examples, balls=balls)
    if attack.draws and keys is None:
        keys = torch.randint(-(2**63), 2**63 - 1, (len(x),), device=x.device)

    def used(slope: Tensor) -> Tensor:
        if on_gradient is not None:
            on_gradient(slope)
        return slope.masked_fill(slope.isnan() | ~ball.moves, 0)

    if kind.function is not None:
        assert loss is not None and keys is not None
        return _own(attack, kind.function, Objective(loss, used), ball, keys)
    if kind.search:
        assert loss is not None and keys is not None
        return blocks.search(partial(_value, loss), ball, keys, queries=attack.queries)
    point = x
    if kind.start is not None:
        assert keys is not None
        point = ball.drawn(getattr(ball.norm, kind.start), keys)
        point = ball.stay(point) if kind.projected else ball.only_moves(point)
    if not kind.gradient:
        return point
    if kind.adaptive or kind.minimal:
        assert loss is not None
        targets = target_losses if kind.targeted else ()
        climb = _Climb(attack, loss, gap or loss, targets, keys, used)
        return climb.nearest(ball) if kind.minimal else climb(ball)
    ascended = target_loss if kind.targeted else loss
    assert ascended is not None
    step = -attack.step if kind.targeted or kind.reverse else attack.step
    velocity: Tensor | float = 0.0
    for i in range(attack.steps if kind.iterative else 1):
        known = gradient if i == 0 else None
        slope = loss_gradient(ascended, point) if known is None else known
        slope = used(slope)
        if kind.momentum:
            slope = velocity = attack.decay * velocity + ball.examples.scaled(slope, 1)
        point = ball.step(point, slope, step)
    return point


def _value(loss: Loss, x: Tensor) -> Tensor:
    """`loss(x)`; what is not a number is never the best."""
    with torch.no_grad():
        values = loss(x)
    return values.masked_fill(values.isnan(), -torch.inf)


@dataclass(frozen=True)
class Objective:
    """The loss as an attack of the user's own sees it.

    Attributes:
        loss: point -> (examples,) values, raised; differentiable.
        used: a gradient -> what is used of it, which the diagnostics count.
    """

    loss: Loss
    used: Callable[[Tensor], Tensor]

    def __call__(self, point: Tensor) -> Tensor:
        """(examples,) values at a point."""
        return self.loss(point)

    def gradient(self, point: Tensor) -> Tensor:
        """Gradient of the sum of the values, like `point`; zero where nothing may move, or NaN."""
        return self.used(loss_gradient(self.loss, point))


def _own(
    attack: Attack, function: Callable[..., Any], loss: Objective, ball: Ball, keys: Tensor
) -> Tensor:
    """What an attack of the user's own finds, in the ball."""
    given = step_settings(attack) | {"step_size": attack.step}
    settings = {name: given[name] for name in attack.kind.settings}
    point = function(ball.x, loss, ball, keys, **settings)
    if not isinstance(point, Tensor) or point.shape != ball.x.shape:
        got = list(point.shape) if isinstance(point, Tensor) else type(point).__name__
        raise UsageError(
            f"attack={attack.name}: must return a point of shape {list(ball.x.shape)}, not {got}"
        )
    point = point.detach().to(ball.x)
    # what does not move keeps its bits
    return ball.stay(torch.where(point.isnan(), ball.x, point))


@dataclass(frozen=True)
class _Climb:
    """Auto-PGD, from all its starts, and the searches for the nearest point that rest on it.

    Attributes:
        attack, loss, gap, keys: as of `perturb`.
        targets: losses that are lowered, each in turn; none: `loss` is raised.
        used: a gradient -> what is used of it.
    """

    attack: Attack
    loss: Loss
    gap: Loss
    targets: Sequence[Loss]
    keys: Tensor | None
    used: Callable[[Tensor], Tensor]

    def __call__(self, ball: Ball) -> Tensor:
        """The point with the greatest loss, or with the greatest gap of those towards targets."""
        if not self.targets:
            return self._best(self.loss, ball)
        # the clean point too: a target that an example does not have leads nowhere
        found = [ball.x, *(self._best(partial(_negative, target), ball) for target in self.targets)]
        return best_of(((point, _value(self.gap, point)) for point in found), ball)[0]

    def nearest(self, ball: Ball) -> Tensor:
        """The nearest point with a gap above 0."""
        attack, value = self.attack, partial(_value, self.gap)
        if not attack.kind.adaptive:
            evaluate = partial(self._evaluated, self.gap)
            step = ball.farthest if attack.step_size is None else attack.step_size
            return fmn(evaluate, value, ball, steps=attack.steps, step=step)
        first = attack.epsilon / 16 if attack.first_epsilon is None else attack.first_epsilon
        return bisect(self, value, ball, rounds=attack.rounds, first=first)

    def _best(self, way: Loss, ball: Ball) -> Tensor:
        evaluate = partial(self._evaluated, way)
        how: Any = {"steps": self.attack.steps, "step": self.attack.step}
        ways = (ascend(start, evaluate, ball, **how) for start in self._starts(ball))
        return best_of(ways, ball)[0]

    def _starts(self, ball: Ball) -> Iterator[Tensor]:
        yield ball.x
        keys = self.keys
        for _ in range(self.attack.restarts - 1):
            assert keys is not None
            keys = rehashed(keys)
            yield ball.stay(ball.drawn(ball.norm.in_ball, keys))

    def _evaluated(self, way: Loss, at: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = _with_gradient(way, at)
        return value.masked_fill(value.isnan(), -torch.inf), self.used(slope)


def _negative(loss: Loss, x: Tensor) -> Tensor:
    return -loss(x)


def perturb_each(
    attacks: Iterable[Attack],
    x: Tensor,
    loss: Loss | None = None,
    *,
    gradient: Tensor | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """The attacked point of each attack in turn; those that start at `x` share its gradient.

    `gradient` and the options are those of `perturb`. Several epsilons of `fgsm` cost one gradient.
    """
    for attack in attacks:
        shares = attack.uses_clean_gradient
        if shares and gradient is None and loss is not None:
            gradient = loss_gradient(loss, x)
        yield perturb(attack, x, loss, gradient=gradient if shares else None, **options)
