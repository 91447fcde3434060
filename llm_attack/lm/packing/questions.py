"""Requests and questions in tokens. A question holds the requests that belong together."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from llm_attack.lm.packing.trie import Trie, build


@dataclass(frozen=True)
class Request:
    """One (context, continuation) pair in tokens, or a prompt to be continued.

    Attributes:
        tokens: context and continuation, truncated from the left to the model's length + 1.
        n_continuation: number of last tokens that are the continuation; these are scored. A prompt
            has none.
        n_question: number of last tokens that belong to the question or the continuation, and not
            to few-shot examples or a system prompt. 0 if it is not needed.
    """

    tokens: tuple[int, ...]
    n_continuation: int
    n_question: int = 0

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tokens that the model reads. A continuation's last token is only predicted."""
        return self.tokens[:-1] if self.n_continuation else self.tokens

    @property
    def predicted(self) -> tuple[int, ...]:
        """The tokens that the model predicts."""
        return self.tokens[1:]

    @property
    def predicts(self) -> slice:
        """The places of `predicted` among `inputs`: at each the model predicts one of them."""
        return slice(len(self.tokens) - 1)

    @property
    def hooked(self) -> slice:
        """The part of `inputs` that the hookpoint holds."""
        return slice(None)


@dataclass(frozen=True)
class PairRequest(Request):
    """A request to an encoder-decoder model, whose encoder reads the context.

    Its `tokens` are the context and the continuation.

    Attributes:
        decoder: the tokens that the decoder reads: a start token, and the continuation without its
            last token. As many as the continuation has.
        parts: which parts of the model the hookpoint is in: encoder, decoder.
    """

    decoder: tuple[int, ...] = ()
    parts: tuple[bool, bool] = (True, False)

    @property
    def context(self) -> tuple[int, ...]:
        """The tokens that the encoder reads."""
        return self.tokens[: len(self.tokens) - self.n_continuation]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tokens that both parts read; of the decoder's the complements, which are below 0.

        So a token of the decoder never shares a node with one of the encoder.
        """
        return (*self.context, *(~token for token in self.decoder))

    @property
    def predicted(self) -> tuple[int, ...]:
        return self.tokens[len(self.context) :]

    @property
    def predicts(self) -> slice:
        return slice(len(self.context), None)

    @property
    def hooked(self) -> slice:
        n = len(self.context)
        return slice(0 if self.parts[0] else n, None if self.parts[1] else n)


@dataclass
class Question:
    """The requests of a benchmark's question, or a single request.

    Attributes:
        requests: the first `len(gold)` are the choices in order. Further requests are also
            answered.
        answers: for each request, the indices of its answers in the caller's list.
        gold: for each choice, whether it is right; empty if no gold labels are needed.
        lengths: for each choice, the divisor of its score; empty: no division.
        stored: (task, number) of its perturbation in the files of a run; None: it has none.
    """

    requests: list[Request]
    answers: list[list[int]]
    gold: list[bool] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    stored: tuple[str, int] | None = None

    @cached_property
    def trie(self) -> Trie:
        """The tokens that the model reads for the requests, with shared prefixes once."""
        return build([r.inputs for r in self.requests])

    @property
    def longest(self) -> int:
        """The number of tokens that the model reads for the longest request."""
        return max(len(r.inputs) for r in self.requests)
