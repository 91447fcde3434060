"""What a caller hands over, points and closures, is looked at before it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llm_attack.attacks.norms import Groups
from llm_attack.attacks.settings import Attack
from llm_attack.base.errors import shortened


def leaf(x: Tensor) -> Tensor:
    """`x` by itself, with a gradient; of one that torch.inference_mode made a copy."""
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_(True)


def check_point(
    attack: Attack, x: Tensor, bounds: Any, others: Mapping[str, Tensor | None]
) -> None:
    """Refuses arguments of `perturb` that are of another type or shape, or a point out of bounds.

    Args:
        attack: as of `perturb`.
        x: as of `perturb`.
        bounds: as of `perturb`.
        others: `mask`, `keys` and `gradient`, which have the shape of `x`, or begin like it.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(attack, Attack):
        raise TypeError(f"attack: must be an Attack, not {type(attack).__name__}")
    check_floats(x)
    if bounds is not None:
        check_bounds(x, bounds, moves=not attack.identity)
    kinds = {"mask": torch.bool, "keys": torch.int64, "gradient": x.dtype}
    for name, tensor in others.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != kinds[name]:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: must be a tensor of {kinds[name]}, not {got}")
        whole = tensor.shape == x.shape if name == "gradient" else True
        if not whole or tensor.shape != x.shape[: tensor.dim()]:
            raise ValueError(
                f"{name}: its shape {tuple(tensor.shape)} does not fit that of x, {tuple(x.shape)}"
            )


def check_groups(x: Tensor, groups: Mapping[str, Groups | None]) -> None:
    """Raises `TypeError` or `ValueError` unless they are groups of the elements of `x`."""
    for name, of in groups.items():
        if of is None:
            continue
        if not isinstance(of, Groups):
            raise TypeError(f"{name}: must be Groups, not {type(of).__name__}")
        if of.index.shape != x.shape[: of.index.dim()]:
            shapes = f"{tuple(of.index.shape)} does not fit that of x, {tuple(x.shape)}"
            raise ValueError(f"{name}: the shape of its index {shapes}")


def check_functions(given: Mapping[str, Any], target_losses: Any) -> None:
    """Raises `TypeError` unless those that are not None can be called, and all `target_losses`."""
    if not isinstance(target_losses, Sequence) or isinstance(target_losses, (str, bytes)):
        got = type(target_losses).__name__
        raise TypeError(f"target_losses: must be a list of functions, not {got}")
    several = [("target_losses", closure) for closure in target_losses]
    for name, closure in [*((n, c) for n, c in given.items() if c is not None), *several]:
        if not callable(closure):
            raise TypeError(f"{name}: must be a function, not {type(closure).__name__}")


def check_floats(x: Tensor) -> None:
    """Raises `TypeError` unless `x` is a tensor of floats with a dimension for the examples."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: must be a tensor, not {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x: must be of floats, not {x.dtype}")
    if not x.dim():
        raise ValueError("x: must have a dimension for the examples")


def check_bounds(x: Tensor, bounds: Any, moves: bool = True) -> None:
    """Refuses bounds that are no interval and, where `moves`, points out of it.

    Raises:
        TypeError, ValueError: naming what is wrong.
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


def checked(name: str, closure: Callable[[Tensor], Tensor], n: int) -> Callable[[Tensor], Tensor]:
    """The closure, which raises `TypeError` or `ValueError` unless it returns (n,) values."""

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
