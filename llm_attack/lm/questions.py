"""Requests and questions: what is asked, in tokens, and which requests belong together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """One (context, continuation) pair in tokens, or a prompt to be continued.

    Attributes:
        tokens: context and continuation, truncated from the left to the model's length + 1.
        n_continuation: how many of the last tokens are the continuation; these are scored. A
            prompt has none.
    """

    tokens: tuple[int, ...]
    n_continuation: int

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

    @property
    def longest(self) -> int:
        return max(len(r.tokens) for r in self.requests)


def batches(questions: Iterable[Question], rows: int) -> list[list[Question]]:
    """Questions in batches of at most `rows` requests each (one question at least), longest first.

    Which questions share a batch depends on nothing but their tokens.
    """
    order = sorted(
        questions, key=lambda q: (-q.longest, [(r.tokens, r.n_continuation) for r in q.requests])
    )
    result: list[list[Question]] = []
    room = 0
    for question in order:
        if len(question.requests) > room:
            result.append([])
            room = rows
        result[-1].append(question)
        room -= len(question.requests)
    return result
