"""Checks points and closures of a caller before they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_attack.attacks.norms import Elements, Groups
from llm_attack.attacks.settings import Attack
from llm_attack.base.errors import shortened

Loss = Callable[[Tensor], Tensor]


def leaf(x: Tensor) -> Tensor:
    """`x` as a leaf that requires a gradient; a copy if torch.inference_mode made `x`."""
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_(True)


@dataclass(frozen=True)
class Losses:
    """The functions of a point that an attack may call. `Kind.closures` says which it needs.

    Attributes:
        loss: returns (N,); untargeted attacks raise it.
        target_loss: returns (N,); `ost` and `illc` lower it. It is the loss of the target class,
            which the caller fixes at the clean point (`least_likely`).
        target_losses: `apgdt` lowers each in turn: the losses of the classes that are not gold.
        gap: returns (N,), above 0 if the answer is wrong; None: the same as `loss`. `apgdt` returns
            its point with the greatest gap. `fmn` follows the gradient of the gap. `critical`
            raises `loss` by `apgd`, and reads the gap to see if the answer is wrong.
    """

    loss: Loss | None = None
    target_loss: Loss | None = None
    target_losses: Sequence[Loss] = ()
    gap: Loss | None = None

    @classmethod
    def of(cls, given: Losses | Loss | None) -> Losses:
        """Makes losses of the argument `loss` of `perturb`.

        Raises:
            TypeError: one of them cannot be called.
        """
        if not isinstance(given, Losses):
            given = cls(given)
        several = given.target_losses
        if not isinstance(several, Sequence) or isinstance(several, (str, bytes)):
            got = type(several).__name__
            raise TypeError(f"target_losses: must be a list of functions, not {got}")
        one = {name: getattr(given, name) for name in ("loss", "target_loss", "gap")}
        check_functions(
            {**one, **{f"target_losses[{i}]": function for i, function in enumerate(several)}}
        )
        return given

    def checked(self, attack: Attack, n: int) -> Losses:
        """The same functions, with checks of their values. `gap` is `loss` if it was not given.

        Raises:
            ValueError: a function that the attack needs is missing.
        """
        for name in attack.kind.closures:
            if not getattr(self, name):
                raise ValueError(f"attack {attack.name!r} needs {name}")
        loss, target_loss, gap = (
            None if closure is None else checked(name, closure, n)
            for name, closure in (
                ("loss", self.loss),
                ("target_loss", self.target_loss),
                ("gap", self.gap),
            )
        )
        several = [checked("target_losses", closure, n) for closure in self.target_losses]
        return Losses(loss, target_loss, several, gap or loss)


@dataclass(frozen=True)
class Known:
    """Values at the clean point that the caller already has, so they are not computed again.

    Attributes:
        loss: (N,) values of the loss.
        gradient: gradient of their sum, like `x`; read if `Attack.uses_clean_gradient` is true.
        gap: (N,) values of `Losses.gap`.
    """

    loss: Tensor | None = None
    gradient: Tensor | None = None
    gap: Tensor | None = None

    def check(self, n: int) -> None:
        """Raises `ValueError` unless there is a value for each of n examples."""
        for name in ("loss", "gap"):
            values = getattr(self, name)
            if values is not None and values.shape != (n,):
                raise ValueError(
                    f"{name}: must be one value for each of {n} examples, ({n},), not"
                    f" {tuple(values.shape)}"
                )


def _ignore(_: Tensor) -> None:
    pass


@dataclass(frozen=True)
class Watch:
    """Functions that an attack calls while it runs.

    Attributes:
        on_gradient: called with every gradient that is used.
        on_best: called by attacks that return the best point that they have seen. It gets booleans
            (N,): for which examples the point of the last loss call is the best so far.
    """

    on_gradient: Callable[[Tensor], None] = _ignore
    on_best: Callable[[Tensor], None] = _ignore


def check_point(
    attack: Attack, x: Tensor, bounds: Any, others: Mapping[str, Tensor | None]
) -> None:
    """Refuses arguments of `perturb` with a wrong type or shape, and a point out of bounds.

    Args:
        attack: as for `perturb`.
        x: as for `perturb`.
        bounds: as for `perturb`.
        others: `mask`, `keys` and `gradient`. Each has the shape of `x`, or its first dimensions.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    if not isinstance(attack, Attack):
        raise TypeError(f"attack: must be an Attack, not {type(attack).__name__}")
    check_floats(x)
    if bounds is not None:
        check_bounds(x, bounds, moves=not attack.identity)
    kinds = {"mask": torch.bool, "keys": torch.int64, "gradient": x.dtype}
    for name, tensor in others.items():
        if tensor is not None:
            _check_tensor(name, tensor, kinds[name], x)


def _check_tensor(name: str, tensor: Any, dtype: torch.dtype, x: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: must be a tensor of {dtype}, not {got}")
    whole = tensor.shape == x.shape if name == "gradient" else True
    if not whole or tensor.shape != x.shape[: tensor.dim()]:
        raise ValueError(
            f"{name}: its shape {tuple(tensor.shape)} does not fit that of x, {tuple(x.shape)}"
        )


def check_groups(x: Tensor, groups: Mapping[str, Groups | None]) -> None:
    """Raises `TypeError` or `ValueError` unless they are groups of the elements of `x`."""
    for name, group in groups.items():
        if group is None:
            continue
        if not isinstance(group, Groups):
            raise TypeError(f"{name}: must be Groups, not {type(group).__name__}")
        if group.index.shape != x.shape[: group.index.dim()]:
            shapes = f"{tuple(group.index.shape)} does not fit that of x, {tuple(x.shape)}"
            raise ValueError(f"{name}: the shape of its index {shapes}")


def check_types(given: Mapping[str, Any]) -> None:
    """Raises `TypeError` unless each argument of `perturb` has the class of its name."""
    for kind in (Elements, Known, Watch):
        name = kind.__name__.lower()
        if not isinstance(given[name], kind):
            got = type(given[name]).__name__
            raise TypeError(f"{name}: must be {kind.__name__}, not {got}")


def check_functions(functions: Mapping[str, Any]) -> None:
    """Raises `TypeError` if one of the functions is neither None nor callable."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            name = name.partition("[")[0]
            raise TypeError(f"{name}: must be a function, not {type(function).__name__}")


def check_floats(x: Tensor) -> None:
    """Raises `TypeError` unless `x` is a tensor of floats with a dimension for the examples."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: must be a tensor, not {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x: must be of floats, not {x.dtype}")
    if not x.dim():
        raise ValueError("x: must have a dimension for the examples")


def check_bounds(x: Tensor, bounds: Any, moves: bool = True) -> None:
    """Refuses bounds that are no interval, and points outside of it where `moves` is true.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    try:
        low, high = (torch.as_tensor(end, dtype=x.dtype, device=x.device) for end in bounds)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"bounds: must be two numbers, not {shortened(bounds)}") from error
    if not (low <= high).all():
        raise ValueError(
            f"bounds: must be two numbers, the lower one first, not {shortened(bounds)}"
        )
    if moves and not ((low <= x) & (x <= high)).all():
        reach = f"from {x.min().item():g} to {x.max().item():g}"
        raise ValueError(f"x: must lie within bounds={shortened(bounds)}; it goes {reach}")


def checked(name: str, closure: Loss, n: int) -> Loss:
    """Wraps a closure: it raises `TypeError` or `ValueError` if it does not return (n,) values."""

    def values_of(x: Tensor) -> Tensor:
        values = closure(x)
        if not isinstance(values, Tensor):
            raise TypeError(f"{name}: must return a tensor, not {type(values).__name__}")
        if values.shape != (n,):
            raise ValueError(
                f"{name}: must return one value for each of {n} examples, ({n},), not"
                f" {tuple(values.shape)}"
            )
        return values

    return values_of
