"""One forward of an encoder-decoder model: the encoder reads contexts, the decoder continuations.

A pack holds a row for each request: the tokens of the encoder, and those of the decoder after them.
Its point has the same layout, so attacks do not know of the two parts. Requests that have the same
context, and the same perturbation of it, share a pass through the encoder.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from llm_attack.lm.engine.nearest import Nearest
from llm_attack.lm.engine.scoring import Forward, Scorer
from llm_attack.lm.network.hook import capture, edit_input, edit_output
from llm_attack.lm.network.pairs import DECODER, ENCODER, PARTS, embedding_of, part_of, places
from llm_attack.lm.packing.pack import Inputs, Pack, Twins
from llm_attack.lm.packing.questions import PairRequest, Request


@dataclass(frozen=True)
class _Tokens:
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
    def of(cls, inputs: Inputs, part: str) -> _Tokens:
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

    def some(self, rows: Tensor) -> _Tokens:
        """The tokens of some rows, which are in ascending order."""
        number = self.row.new_full((self.shape[0],), -1)
        number[rows] = torch.arange(len(rows), device=rows.device)
        kept = number[self.row] >= 0
        row = number[self.row[kept]]
        return _Tokens(self.at[kept], row, self.column[kept], (len(rows), self.shape[1]))


class PairScorer(Scorer):
    """Runs an encoder-decoder model on packs of `PairRequest`.

    Args:
        model: a transformers model (or a PEFT model round one).
        hookpoint: as for `places`.
        autocast, softmax_dtype: as for `Scorer`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        hookpoint: str | None,
        autocast: torch.dtype | None = None,
        softmax_dtype: torch.dtype | None = None,
    ) -> None:
        self.hooks = places(model, hookpoint)
        super().__init__(model, next(iter(self.hooks.values())), autocast, softmax_dtype)
        self.encoder = part_of(model, ENCODER)
        embeddings = [embedding_of(model, part) for part in self.hooks]
        one: Any = embeddings[0]
        same = all(getattr(e, "weight", None) is getattr(one, "weight", None) for e in embeddings)
        hooked = embeddings == [*self.hooks.values()]
        if same and hooked and isinstance(one, nn.Embedding):
            self.nearest = Nearest(one, one.num_embeddings)

    @property
    def parts(self) -> tuple[bool, bool]:
        """Whether the hookpoint is in the encoder, and whether it is in the decoder."""
        return ENCODER in self.hooks, DECODER in self.hooks

    def request(self, context: Sequence[int], continuation: Sequence[int]) -> Request:
        """The request in the form that this model reads."""
        decoder = decoder_inputs(self.model, continuation)
        n = len(continuation)
        return PairRequest((*context, *continuation), n, 0, tuple(decoder), self.parts)

    def point(self, pack: Pack) -> Tensor:
        """The clean point of `pack`, (B, L, H); zero at tokens that the hookpoint does not hold."""
        points = [self._captured(pack, forward) for forward in self._forwards(pack)]
        return self.whole(pack, *points)

    def _captured(self, pack: Pack, forward: Forward) -> Tensor:
        x: Tensor | None = None
        for part, module in self.hooks.items():
            tokens, run = _Tokens.of(forward.inputs, part), partial(self._encoded, pack, forward)
            if part == DECODER:
                run = partial(self._decoded, forward, run(None))
            output = capture(module, partial(run, None))
            if part == ENCODER:  # of contexts, each once
                _, number = self._distinct(pack, forward, None)
                output = output[torch.tensor(number, device=output.device)]
            if x is None:
                x = output.new_zeros(forward.inputs.tokens.numel(), output.shape[-1])
            x[tokens.at.to(x.device)] = tokens.take(output).to(x)
        assert x is not None
        return x.view(*forward.inputs.tokens.shape, -1)

    def _logits(
        self,
        pack: Pack,
        forward: Forward,
        positions: Tensor,
        point: Tensor | None,
        below: Tensor | None,
        twins: Twins | None = None,
    ) -> Tensor:
        inputs = forward.inputs
        if inputs.tokens.numel() != pack.input_ids.numel():
            _, positions = forward.among(positions, pack)
            point = None if point is None else point[forward.place]
        tokens = _Tokens.of(inputs, DECODER)
        number = torch.zeros_like(inputs.tokens).flatten()
        number[tokens.at] = tokens.row * tokens.shape[1] + tokens.column
        wanted, seen = number[positions], False

        def gather(hidden: Tensor) -> Tensor:
            nonlocal seen
            seen = True
            return hidden.flatten(0, 1)[wanted.to(hidden.device)].unsqueeze(0)

        with ExitStack() as stack:
            if self.head is not None:
                stack.enter_context(edit_input(self.head, gather))
            states = self._encoded(pack, forward, point)
            logits: Tensor = self._decoded(forward, states, point).logits
        logits = logits.flatten(0, 1)
        return logits if seen else logits[wanted.to(logits.device)]

    def _decoded(self, forward: Forward, states: Tensor, point: Tensor | None) -> Any:
        """The output of the model for some rows of a pack, given the states of the encoder."""
        inputs = forward.inputs
        encoder, decoder = (_Tokens.of(inputs, part) for part in PARTS)
        options = {
            "encoder_outputs": BaseModelOutput(last_hidden_state=states),
            "attention_mask": encoder.padded(torch.ones_like(inputs.tokens)),
            "decoder_input_ids": decoder.padded(inputs.tokens),
        }
        with self._set_up(inputs.tokens), self._placed(DECODER, decoder, point):
            return self.model(**options, **self.options)

    def _encoded(self, pack: Pack, forward: Forward, point: Tensor | None) -> Tensor:
        """The states of the encoder, (rows, longest context, H): equal ones are computed once."""
        inputs = forward.inputs
        tokens = _Tokens.of(inputs, ENCODER)
        first, number = self._distinct(pack, forward, point)
        some = tokens.some(torch.tensor(first, device=inputs.tokens.device))
        mask = some.padded(torch.ones_like(inputs.tokens))
        with self._set_up(inputs.tokens), self._placed(ENCODER, some, point):
            states: Tensor = self.encoder(
                input_ids=some.padded(inputs.tokens), attention_mask=mask
            ).last_hidden_state
        if len(first) == len(number):
            return states
        return states[torch.tensor(number, device=states.device)]

    def _distinct(
        self, pack: Pack, forward: Forward, point: Tensor | None
    ) -> tuple[list[int], list[int]]:
        """The rows whose pass through the encoder is needed, and for each row its number there."""
        rows = range(len(pack.requests)) if forward.rows is None else forward.rows
        question = [i for i, q in enumerate(pack.questions) for _ in q.requests]
        moved = point is not None and ENCODER in self.hooks
        seen: dict[Hashable, int] = {}
        first: list[int] = []
        number: list[int] = []
        for i, row in enumerate(rows):
            request = pack.requests[row]
            assert isinstance(request, PairRequest)
            # a perturbation belongs to a question if its requests share nodes, or else to a request
            owner = (question[row] if pack.node is not None else row) if moved else None
            key = owner, request.context
            if key not in seen:
                seen[key] = len(first)
                first.append(i)
            number.append(seen[key])
        return first, number

    @contextmanager
    def _placed(self, part: str, tokens: _Tokens, point: Tensor | None) -> Iterator[None]:
        """While the context lasts, the hookpoint in a part returns the point."""
        module = self.hooks.get(part)
        if module is None or point is None:
            yield
            return
        with edit_output(module, partial(tokens.put, point)):
            yield


def decoder_inputs(model: Any, continuation: Sequence[int]) -> list[int]:
    """The tokens that the decoder reads to predict `continuation`, as the model shifts labels."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        return [model.config.decoder_start_token_id, *continuation[:-1]]
    shifted: list[int] = shift(labels=torch.tensor([list(continuation)]))[0].tolist()
    return shifted
