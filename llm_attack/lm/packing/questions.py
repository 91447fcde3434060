"""Requests and questions: what is asked, in tokens, and which requests belong together."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from llm_attack.lm.packing.trie import Trie, build


@dataclass(frozen=True)
class Request:
    """One (context, continuation) pair in tokens, or a prompt to be continued.

    Attributes:
        tokens: context and continuation, truncated from the left to the model's length + 1.
        n_continuation: how many of the last tokens are the continuation; these are scored. A
            prompt has none.
        n_question: how many of the last are the question's own and the continuation's: not few-shot
            examples, nor a system prompt. 0 where nobody asks.
    """

    tokens: tuple[int, ...]
    n_continuation: int
    n_question: int = 0

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tokens that the model reads: not a continuation's last, which is only predicted."""
        return self.tokens[:-1] if self.n_continuation else self.tokens


@dataclass
class Question:
    """Requests that one perturbation serves: a benchmark's question, or a request alone.

    Attributes:
        requests: the first `len(gold)` are the choices in order; what follows is answered too.
        answers: for each request, the indices of the answers that it gives in the caller's list.
        gold: for each choice, whether it is right; empty when no gold labels are needed.
        lengths: for each choice, what its score is divided by; empty: nothing.
    """

    requests: list[Request]
    answers: list[list[int]]
    gold: list[bool] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)

    @cached_property
    def trie(self) -> Trie:
        """The tokens that the model reads for the requests, shared prefixes once."""
        return build([r.inputs for r in self.requests])

    @property
    def longest(self) -> int:
        """Tokens that the model reads for the longest request."""
        return max(len(r.inputs) for r in self.requests)
