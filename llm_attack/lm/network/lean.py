"""Norms and rotary embeddings in fewer passes over memory, forward and backward.

The forward gives the same bits, and the backward the same gradient except for rounding. A module is
replaced only if a trial finds it equal to ours, and only in float32 on a CPU, where these modules
wait for memory.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_ROTARY = "apply_rotary_pos_emb"  # its name in all models of transformers


class _Norm(torch.autograd.Function):
    """Computes x / sqrt(mean of squares + eps) * weight. The weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        slope = upstream * weight
        along = (slope * x).mean(-1, keepdim=True).mul_(scale).mul_(scale)
        return slope.addcmul_(x, along, value=-1).mul_(scale), None, None


class _Rotated(torch.autograd.Function):
    """Turns the pairs (i, i + D / 2) of the last dimension, of length D, by angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return turned_back(upstream, *ctx.saved_tensors), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs of `x`, (..., D), turned by angles; see `_Rotated`."""
    first, second = x.chunk(2, -1)
    result = x * cos
    ends, sines = result.chunk(2, -1), sin.chunk(2, -1)
    ends[0].sub_(second * sines[0])
    ends[1].add_(first * sines[1])
    return result


def turned_back(upstream: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of `x`, from that of `turned`."""
    first, second = upstream.chunk(2, -1)
    slope = upstream * cos
    ends, sines = slope.chunk(2, -1), sin.chunk(2, -1)
    ends[0].add_(second * sines[1])
    ends[1].sub_(first * sines[0])
    return slope


def _rotated(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`theirs`, replaced by ours if it turns whole queries and keys."""

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any) -> Any:
        unsqueeze_dim = named.get("unsqueeze_dim", 1)
        equal = q.dtype == k.dtype == cos.dtype and {q.shape[-1], k.shape[-1]} == {cos.shape[-1]}
        if others or set(named) - {"unsqueeze_dim"} or not equal:
            return theirs(q, k, cos, sin, *others, **named)
        angles = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return tuple(_Rotated.apply(x, *angles) for x in (q, k))  # type: ignore[no-untyped-call]

    return rotated


class Lean:
    """The modules of a model that are replaced.

    Args:
        model: a model whose weights require no gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        weights = {(p.device.type, p.dtype) for p in model.parameters()}
        usable = weights == {("cpu", torch.float32)}
        modules = [*model.modules()] if usable else []
        self.norms = {module: norm for module in modules if (norm := _norm(module)) is not None}
        sources = {sys.modules.get(type(module).__module__): None for module in modules}
        self.sources = [source for source in sources if _turns(getattr(source, _ROTARY, None))]

    @contextmanager
    def used(self) -> Iterator[None]:
        """While the context lasts, forwards use the replacements."""
        norms = {m: f for m, f in self.norms.items() if "forward" not in vars(m)}
        before = [(source, getattr(source, _ROTARY)) for source in self.sources]
        try:
            for module, norm in norms.items():
                module.forward = norm
            for source, function in before:
                setattr(source, _ROTARY, _rotated(function))
            yield
        finally:
            for module in norms:
                vars(module).pop("forward", None)
            for source, function in before:
                setattr(source, _ROTARY, function)


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A forward for `module`, if it is an RMS norm."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "forward" in vars(module) or not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return None
    if not isinstance(eps, float):
        return None
    given = weight, eps

    def norm(hidden_states: Tensor) -> Tensor:
        normed: Tensor = _Norm.apply(hidden_states, *given)  # type: ignore[no-untyped-call]
        return normed

    return norm if _equal(module, norm, [_drawn(2, 3, len(weight))]) else None


def _turns(function: Any) -> bool:
    """Whether `function` turns queries and keys as our function does."""
    if not callable(function):
        return False
    known = [name for name in inspect.signature(function).parameters if name != "position_ids"]
    if known != ["q", "k", "cos", "sin", "unsqueeze_dim"]:  # transformers 4 has position_ids, too
        return False
    angles = [f(_drawn(2, 3, 4)).repeat(1, 1, 2) for f in (torch.cos, torch.sin)]

    def flattened(turning: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda q, k: torch.cat([x.flatten() for x in turning(q, k, *angles)])

    return _equal(
        flattened(function), flattened(_rotated(function)), [_drawn(2, n, 3, 8) for n in (4, 2)]
    )


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _equal(theirs: Any, ours: Callable[..., Tensor], given: list[Tensor]) -> bool:
    """Whether both give the same bits, and the same gradient except for rounding."""
    results = []
    for function in (theirs, ours):
        leaves = [x.clone().requires_grad_(True) for x in given]
        try:
            with torch.enable_grad():
                value = function(*leaves)
                slopes = torch.autograd.grad((value * _drawn(*value.shape)).sum(), leaves)
        except Exception:  # a module with other arguments is another one
            return False
        results.append((value, slopes))
    (a, slopes), (b, others) = results
    close = all(
        torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(slopes, others, strict=True)
    )
    return torch.equal(a, b) and close
