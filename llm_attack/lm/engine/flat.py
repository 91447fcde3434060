"""Rows without padding. A model reads the tokens of all rows as one sequence.

Only attention is computed row by row, by the model's own function, on rows with padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llm_attack.lm.packing.pack import Flat

ATTENTION = "sdpa"
"""The attention that is understood: it is causal where it has no mask."""


class _Real(torch.autograd.Function):
    """Makes (N, ...) of (B x L, ...): the values of tokens, without those of padding."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, real: Tensor) -> Tensor:
        ctx.n, ctx.real = len(rows), real
        return rows.index_select(0, real)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        slope = upstream.new_zeros(ctx.n, *upstream.shape[1:])
        return slope.index_copy_(0, ctx.real, upstream), None


class _Rows(torch.autograd.Function):
    """Makes (B x L, ...) of (N, ...). Padding gets the values of some token, which no one reads."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, real: Tensor, number: Tensor) -> Tensor:
        ctx.real = real
        return values.index_select(0, number)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return upstream.index_select(0, ctx.real), None, None


def sequence(rows: Tensor, flat: Flat) -> Tensor:
    """Makes (1, N, ...) of (B, L, ...)."""
    tokens: Tensor = _Real.apply(rows.flatten(0, 1), flat.real)  # type: ignore[no-untyped-call]
    return tokens.unsqueeze(0)


def _by_rows(x: Tensor, flat: Flat) -> Tensor:
    """Makes (B, heads, L, D) of (1, heads, N, D)."""
    of_tokens = x.transpose(1, 2).reshape(len(flat.real), -1)
    rows: Tensor = _Rows.apply(of_tokens, flat.real, flat.number)  # type: ignore[no-untyped-call]
    return rows.view(*flat.shape, x.shape[1], x.shape[3]).transpose(1, 2)


@contextmanager
def row_by_row(flat: Flat) -> Iterator[None]:
    """While the context lasts, tokens attend only to earlier tokens of their own row."""
    inner = ALL_ATTENTION_FUNCTIONS[ATTENTION]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        rows = [_by_rows(x, flat) for x in (query, key, value)]
        attended, _ = inner(module, *rows, None, *args, **kwargs)
        return sequence(attended, flat), None

    ALL_ATTENTION_FUNCTIONS[ATTENTION] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[ATTENTION] = inner
