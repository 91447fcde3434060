"""One forward of an encoder-decoder model: the encoder reads contexts, the decoder continuations.

A pack holds a row for each request: the tokens of the encoder, and those of the decoder after them.
Its point has the same layout, so attacks do not know of the two parts. Requests that have the same
context, and the same perturbation of it, share a pass through the encoder. If a trial allows it,
they also share rows of the decoder, one after another, and do not see each other there.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from llm_attack.base.failures import one_line
from llm_attack.lm.engine.nearest import Nearest
from llm_attack.lm.engine.pair_rows import DecoderRows, PartTokens
from llm_attack.lm.engine.probe import equal_logits, made_up, window
from llm_attack.lm.engine.scoring import Forward, Scorer
from llm_attack.lm.network.hook import capture, edit_input, edit_output
from llm_attack.lm.network.pairs import DECODER, ENCODER, embedding_of, part_of, places
from llm_attack.lm.packing.pack import Pack, Twins, pack_rows
from llm_attack.lm.packing.questions import PairRequest, Question, Request

log = logging.getLogger(__name__)


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
        self.longest_decoder = 0
        """Length up to which requests share a row of the decoder; 0: none do."""
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

    def prompt(self, tokens: Sequence[int], text: Sequence[int]) -> Request:
        """A prompt with the text that the model writes for it without an attack.

        Args:
            tokens: its tokens.
            text: the tokens of the decoder: the first, and those that it generates.
        """
        decoder, written = tuple(text[:-1]), tuple(text[1:])
        return PairRequest((*tokens, *written), len(written), 0, decoder, self.parts)

    def point(self, pack: Pack) -> Tensor:
        """The clean point of `pack`, (B, L, H); zero at tokens that the hookpoint does not hold."""
        points = [self._captured(pack, forward) for forward in self._forwards(pack)]
        return self.whole(pack, *points)

    def _captured(self, pack: Pack, forward: Forward) -> Tensor:
        x: Tensor | None = None
        for part, module in self.hooks.items():
            encoded = partial(self._encoded, pack, forward, None)
            if part == ENCODER:  # of contexts, each once
                output, tokens = capture(module, encoded), PartTokens.of(forward.inputs, part)
                _, number = self._distinct(pack, forward, None)
                output = output[torch.tensor(number, device=output.device)]
            else:
                rows = self._decoder(pack, forward, None)
                tokens = rows.tokens
                output = capture(module, partial(self._decoded, forward, encoded(), rows, None))
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
        rows = self._decoder(pack, forward, point)
        tokens = rows.tokens
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
            logits: Tensor = self._decoded(forward, states, rows, point).logits
        logits = logits.flatten(0, 1)
        return logits if seen else logits[wanted.to(logits.device)]

    def _decoder(self, pack: Pack, forward: Forward, point: Tensor | None) -> DecoderRows:
        """The rows of the decoder for some rows of a pack."""
        tokens = PartTokens.of(forward.inputs, DECODER)
        first, number = self._distinct(pack, forward, point)
        if len(first) == len(number) or self.longest_decoder < tokens.shape[1]:
            return DecoderRows(tokens, number)
        return DecoderRows.joined(tokens, number, self.longest_decoder)

    def _decoded(
        self,
        forward: Forward,
        states: tuple[Tensor, Tensor],
        rows: DecoderRows,
        point: Tensor | None,
    ) -> Any:
        """The output of the model for rows of the decoder, given the result of `_encoded`."""
        tokens = forward.inputs.tokens
        encoded, mask = (x[torch.tensor(rows.context, device=x.device)] for x in states)
        options = {
            "encoder_outputs": BaseModelOutput(last_hidden_state=encoded),
            "attention_mask": mask,
            "decoder_input_ids": rows.tokens.padded(tokens),
            "decoder_attention_mask": rows.attention(self.model.dtype),
        }
        counted = getattr(part_of(self.model, DECODER), "embed_positions", None)
        with ExitStack() as stack:
            stack.enter_context(self._set_up(tokens))
            stack.enter_context(self._placed(DECODER, rows.tokens, point))
            if rows.depth is not None and counted is not None:
                stack.enter_context(edit_output(counted, rows.positions))
            return self.model(**options, **self.options)

    def _encoded(self, pack: Pack, forward: Forward, point: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states of the encoder, (contexts, longest context, H), and their mask.

        Equal contexts are computed once; see `_distinct`.
        """
        inputs = forward.inputs
        first, _ = self._distinct(pack, forward, point)
        tokens = PartTokens.of(inputs, ENCODER).some(
            torch.tensor(first, device=inputs.tokens.device)
        )
        mask = tokens.padded(torch.ones_like(inputs.tokens))
        with self._set_up(inputs.tokens), self._placed(ENCODER, tokens, point):
            output = self.encoder(input_ids=tokens.padded(inputs.tokens), attention_mask=mask)
        return output.last_hidden_state, mask

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
    def _placed(self, part: str, tokens: PartTokens, point: Tensor | None) -> Iterator[None]:
        """While the context lasts, the hookpoint in a part returns the point."""
        module = self.hooks.get(part)
        if module is None or point is None:
            yield
            return
        with edit_output(module, partial(tokens.put, point)):
            yield


def longest_decoder(scorer: PairScorer, device: torch.device, pad: int = 0) -> int:
    """Tries up to which length requests with the same context may share a row of the decoder.

    A model does not support it (0) if its decoder ignores the mask, or counts positions by itself.
    """
    config = scorer.model.config
    most = min(window(scorer), getattr(config, "max_position_embeddings", None) or sys.maxsize)
    (several, _) = made_up(scorer)
    requests = [scorer.request(r.tokens[:12], r.tokens[12:]) for r in several.requests]
    pack = pack_rows([Question([r], [[i]]) for i, r in enumerate(requests)], pad).to(device)
    logits = []
    for longest in (0, most):
        scorer.longest_decoder = longest
        try:
            with torch.no_grad():
                logits.append(scorer.logits(pack, pack.scored.positions).float())
        except Exception as error:
            if should_reduce_batch_size(error):
                raise
            log.warning("decoder: a row for each request, because %s", one_line(error))
            return 0
        finally:
            scorer.longest_decoder = 0
    if equal_logits(scorer, logits[1], logits[0]):
        return most
    log.warning("decoder: a row for each request, because shared rows give other logits")
    return 0


def decoder_inputs(model: Any, continuation: Sequence[int]) -> list[int]:
    """The tokens that the decoder reads to predict `continuation`, as the model shifts labels."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        return [model.config.decoder_start_token_id, *continuation[:-1]]
    shifted: list[int] = shift(labels=torch.tensor([list(continuation)]))[0].tolist()
    return shifted
