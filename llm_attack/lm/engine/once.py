"""Computes tokens that rows share once in the forward at the clean point, but not in the backward.

Requests of a question have equal tokens behind equal prefixes (`Twins`), and so equal activations.
But each request has its own gradient if it is attacked by itself. So each product with a weight is
computed for one token of each node, and copied to its twins. The gradient goes back row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_attack.lm.packing.pack import Twins


class _Product(torch.autograd.Function):
    """(N, M) products of a linear layer, copied from one token of each node.

    The gradient is added in place to the gradients of the other layers with the same input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: nn.Linear, given: _Input) -> Tensor:
        ctx.weight, ctx.given = linear.weight, given
        product = nn.functional.linear(given.some, linear.weight, linear.bias)
        return product.index_select(0, given.node)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if ctx.given.gradient is None:
            ctx.given.gradient = upstream @ ctx.weight
        else:
            ctx.given.gradient.addmm_(upstream, ctx.weight)
        return None, None, None


class _Fan(torch.autograd.Function):
    """The common input of several products. It gets the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: _Input) -> Tensor:
        ctx.given = given
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> Any:
        gradient, ctx.given.gradient = ctx.given.gradient, None
        return gradient, None


@dataclass
class _Input:
    """An input of linear layers.

    Attributes:
        some: (U, M) one token of each node.
        node: (N,) the node of each token.
        gradient: (N, M) the gradient so far.
    """

    some: Tensor
    node: Tensor
    gradient: Tensor | None = None


class _Gathered(torch.autograd.Function):
    """(P, H) hidden states of `Twins.entries`. Their gradient also goes to the twins.

    The loss is a sum over entries, so the gradients of twins are equal.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, twins: Twins) -> Tensor:
        ctx.rows, ctx.twins = len(hidden), twins
        return hidden.index_select(0, twins.entries.positions)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        gradient = upstream.new_zeros(ctx.rows, upstream.shape[1])
        # each position has one entry, because a row predicts one token at each position
        gradient[ctx.twins.at] = upstream[ctx.twins.of_entry]
        return gradient, None


def gathered(hidden: Tensor, twins: Twins) -> Tensor:
    """Makes (P, H) of hidden (B x L, H); see `_Gathered`."""
    rows: Tensor = _Gathered.apply(hidden, twins)  # type: ignore[no-untyped-call]
    return rows


@contextmanager
def products_once(model: nn.Module, twins: Twins, shape: tuple[int, ...]) -> Iterator[None]:
    """While the context lasts, linear layers compute a product once for each node.

    Layers stay as they are if their input is not of `shape` (B, L), or if another library has
    replaced their `forward`. The head also stays.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    modules = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and module is not head and "forward" not in vars(module)
    ]
    last: list[Any] = [None, None, None]  # the last input, which several layers often share

    def once(module: nn.Linear) -> Any:
        def forward(x: Tensor) -> Tensor:
            if x.shape[:-1] != shape:
                return nn.functional.linear(x, module.weight, module.bias)
            if last[0] is not x:
                flat = x.reshape(-1, x.shape[-1])
                given = _Input(flat.detach().index_select(0, twins.first), twins.node)
                last[:] = x, given, _Fan.apply(flat, given)  # type: ignore[no-untyped-call]
            product: Tensor = _Product.apply(last[2], module, last[1])  # type: ignore[no-untyped-call]
            return product.view(*shape, -1)

        return forward

    try:
        for module in modules:
            vars(module)["forward"] = once(module)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)
