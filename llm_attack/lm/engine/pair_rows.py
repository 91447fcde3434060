"""The places of a pack's tokens in the inputs of an encoder and of a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_attack.lm.network.pairs import DECODER, PARTS
from llm_attack.lm.packing.pack import Inputs


@dataclass(frozen=True)
class PartTokens:
    """The N tokens of one part of the model, in some rows of a pack.

    Attributes:
        at: (N,) flat index of each among all tokens of the rows.
        row, column: (N,) its place in the input of the part.
        shape: shape of that input.
    """

    at: Tensor
    row: Tensor
    column: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, inputs: Inputs, part: str) -> PartTokens:
        """The tokens of a part."""
        assert inputs.part is not None
        here = inputs.part == 1 + PARTS.index(part)
        row, column = here.nonzero(as_tuple=True)
        first = (inputs.part == 1).sum(-1) if part == DECODER else inputs.part.new_zeros(len(here))
        length = int(here.sum(-1).max())
        at = here.flatten().nonzero()[:, 0]
        return cls(at, row, column - first[row], (len(here), length))

    def padded(self, values: Tensor) -> Tensor:
        """The input of the part, padded with 0, from values of all tokens of the rows."""
        rows = values.new_zeros(self.shape)
        rows[self.row, self.column] = values.flatten()[self.at]
        return rows

    def put(self, point: Tensor, output: Tensor) -> Tensor:
        """The output of a module of the part, with `point`, (rows, L, H), on its tokens."""
        values = point.flatten(0, 1)[self.at.to(point.device)].to(output.device)
        where = self.row.to(output.device), self.column.to(output.device)
        return output.index_put(where, values.to(output.dtype))

    def take(self, output: Tensor) -> Tensor:
        """(N, ...) values of its tokens in the output of a module of the part."""
        return output[self.row.to(output.device), self.column.to(output.device)]

    def some(self, rows: Tensor) -> PartTokens:
        """The tokens of some rows, which are in ascending order."""
        number = self.row.new_full((self.shape[0],), -1)
        number[rows] = torch.arange(len(rows), device=rows.device)
        kept = number[self.row] >= 0
        row = number[self.row[kept]]
        return PartTokens(self.at[kept], row, self.column[kept], (len(rows), self.shape[1]))


@dataclass(frozen=True)
class DecoderRows:
    """The rows of the decoder.

    Attributes:
        tokens: its tokens.
        context: for each row, the number of its context among those that the encoder reads.
        request: (R, L) the request of each token, -1 on padding; None: each has a row.
        depth: (R, L) number of the request's tokens before each; None with a row per request.
    """

    tokens: PartTokens
    context: list[int]
    request: Tensor | None = None
    depth: Tensor | None = None

    @classmethod
    def joined(cls, tokens: PartTokens, context: Sequence[int], longest: int) -> DecoderRows:
        """Puts requests with the same context one after another, into rows of `longest` tokens.

        The first request of a row is its longest, so all others have some of its positions.
        """
        lengths = tokens.row.bincount(minlength=len(context)).tolist()
        rows: list[int] = []  # the context of each
        filled: list[int] = []
        row, start = torch.zeros(2, len(context), dtype=torch.int64).unbind()
        last: dict[int, int] = {}
        for i in sorted(range(len(context)), key=lambda i: -lengths[i]):
            here = last.get(context[i])
            if here is None or filled[here] + lengths[i] > longest:
                here = last[context[i]] = len(rows)
                rows.append(context[i])
                filled.append(0)
            row[i], start[i] = here, filled[here]
            filled[here] += lengths[i]
        row, start = (x.to(tokens.row.device)[tokens.row] for x in (row, start))
        made = PartTokens(tokens.at, row, start + tokens.column, (len(rows), max(filled)))
        request = row.new_full(made.shape, -1)
        request[made.row, made.column] = tokens.row
        depth = row.new_zeros(made.shape)
        depth[made.row, made.column] = tokens.column
        return cls(made, rows, request, depth)

    def attention(self, dtype: torch.dtype) -> Tensor:
        """The mask: (R, 1, L, L), added to the attention's scores; or (R, L) ones of plain rows.

        Without a mask, some models take a start token that is also the pad token for padding.
        """
        if self.request is None:
            return self.tokens.row.new_ones(self.tokens.shape)
        seen = (self.request[:, :, None] == self.request[:, None, :]).tril()
        scores = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return scores.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)

    def positions(self, output: Tensor) -> Tensor:
        """(R, L, H) from (1 or R, L, H), in which the model counts the tokens of a row."""
        assert self.depth is not None
        depth = self.depth.to(output.device)
        rows = output.expand(len(depth), *output.shape[-2:])
        return rows.take_along_dim(depth[..., None], 1)
