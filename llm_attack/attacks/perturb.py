"""One loop for all attacks: steps along a loss's gradient, projected on the ball and the box.

An attack is a function of a point `x` and of a closure `loss(x)` with one value per example; what
the point is (pixels, features, token embeddings) only the closure knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from llm_attack.attacks.apgd import best_of
from llm_attack.attacks.draws import redrawn
from llm_attack.attacks.norms import NORMS, Groups
from llm_attack.attacks.settings import Attack

Loss = Callable[[Tensor], Tensor]


def loss_gradient(loss: Loss, x: Tensor) -> Tensor:
    """Gradient of `loss(x).sum()` with respect to `x` alone; nothing else gets a gradient."""
    return _with_gradient(loss, x)[1]


def _with_gradient(loss: Loss, x: Tensor) -> tuple[Tensor, Tensor]:
    """`loss(x)`, detached, and the gradient of its sum."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
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
        bounds: box that the point must stay in, (0, 1) for pixels; None for embeddings, features.
        mask: booleans of shape x.shape[:k]; where False (padding) the point never moves.
        keys: int64 of shape x.shape[:k], one key per draw (`random`, `pgd`, restarts of `apgd`);
            None: one for each entry of the first dimension, from torch's generator.
        examples: which of the N examples each element of `x` belongs to; None: `x` has a row each.
        balls: which elements share a ball of radius epsilon; None: those of an example.
        gradient: the first gradient, if the caller has it already (see
            `Attack.uses_clean_gradient`).
        on_gradient: called with every gradient that was used.

    Returns:
        Tensor like `x`, detached: x itself for epsilon 0 and for `none`; else within epsilon of x
        in the attack's norm, as computed in the dtype of `x`, and within `bounds`. A gradient that
        is zero or NaN does not move the point.

    Raises:
        ValueError: the attack needs a closure that was not given.
    """
    x = x.detach()
    if attack.identity:
        return x
    kind, norm = attack.kind, NORMS[attack.norm]
    examples = examples or Groups.rows(x)
    balls = balls or examples
    moves = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    moves = moves.reshape(moves.shape + (1,) * (x.dim() - moves.dim()))

    def stay(point: Tensor) -> Tensor:
        inside = norm.project(point, x, attack.epsilon, balls)
        inside = inside if bounds is None else inside.clamp(*bounds)
        return torch.where(moves, inside, x)

    point = x
    if attack.draws and keys is None:
        keys = torch.randint(-(2**63), 2**63 - 1, (len(x),), device=x.device)
    if kind.random_start:
        assert keys is not None
        draw = norm.in_ball if kind.gradient else norm.on_sphere
        point = stay(x + attack.epsilon * draw(keys, moves, x, balls))
    if not kind.gradient:
        return point
    ascended = target_loss if kind.targeted else loss
    if ascended is None:
        needed = "target_loss" if kind.targeted else "loss"
        raise ValueError(f"attack {attack.name!r} needs {needed}")

    def used(slope: Tensor) -> Tensor:
        if on_gradient is not None:
            on_gradient(slope)
        return slope.masked_fill(slope.isnan() | ~moves, 0)

    if kind.adaptive:

        def evaluate(at: Tensor) -> tuple[Tensor, Tensor]:
            value, slope = _with_gradient(ascended, at)
            return value.masked_fill(value.isnan(), -torch.inf), used(slope)

        def starts() -> Iterator[Tensor]:
            yield x
            for again in () if keys is None else redrawn(keys, attack.restarts - 1):
                yield stay(x + attack.epsilon * norm.in_ball(again, moves, x, balls))

        how: Any = {"steps": attack.steps, "step": attack.step, "norm": norm}
        return best_of(starts(), evaluate, stay, examples=examples, balls=balls, **how)
    step = -attack.step if kind.targeted or kind.reverse else attack.step
    velocity: Tensor | float = 0.0
    for i in range(attack.steps if kind.iterative else 1):
        known = gradient if i == 0 else None
        slope = loss_gradient(ascended, point) if known is None else known
        slope = used(slope)
        if kind.momentum:
            slope = velocity = attack.decay * velocity + examples.scaled(slope, 1)
        direction = norm.direction(slope, balls)
        # not by adding a zero: that would turn -0.0 into 0.0, and inf * 0 into NaN
        point = stay(torch.where(direction != 0, point + step * direction, point))
    return point


def sweep(
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
