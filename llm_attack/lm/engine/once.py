"""The forward at the clean point computes once what rows have in common; the backward does not.

Requests of a question have equal tokens behind equal prefixes (`Twins`), hence equal activations,
but gradients of their own where each is attacked alone. So each product of a weight is made for one
token of each node, and copied to its twins; the gradient goes back row by row.
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
    """(N, M) products of a linear layer, from those of one token of each node.

    The gradient is added to that of the other layers of the same input, in place.
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
    """What several products have as their input: to it goes the gradient that they have added."""

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
        some: (U, M) a token of each node.
        node: (N,) the node of each token.
        gradient: (N, M) so far.
    """

    some: Tensor
    node: Tensor
    gradient: Tensor | None = None


class _Gathered(torch.autograd.Function):
    """(P, H) hidden states of `Twins.entries`; the gradient goes to the twins of each as well.

    The loss is a sum over entries, so twins have the same gradient there.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, twins: Twins) -> Tensor:
        ctx.rows, ctx.twins = len(hidden), twins
        return hidden.index_select(0, twins.entries.positions)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        gradient = upstream.new_zeros(ctx.rows, upstream.shape[1])
        # an entry at a time has a position: a row predicts one token at each
        gradient[ctx.twins.at] = upstream[ctx.twins.of_entry]
        return gradient, None


def gathered(hidden: Tensor, twins: Twins) -> Tensor:
    """(P, H) of hidden (B x L, H); see `_Gathered`."""
    found: Tensor = _Gathered.apply(hidden, twins)  # type: ignore[no-untyped-call]
    return found


@contextmanager
def products_once(model: nn.Module, twins: Twins, shape: tuple[int, ...]) -> Iterator[None]:
    """While it lasts, linear layers make a product once for each node.

    Those are left as they are whose input is not of `shape` (B, L), the head, and those that
    another library has taken over.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    modules = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and module is not head and "forward" not in vars(module)
    ]
    last: list[Any] = [None, None, None]  # an input, which is often that of several layers

    def of(module: nn.Linear) -> Any:
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
            vars(module)["forward"] = of(module)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)
