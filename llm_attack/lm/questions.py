"""Requests and questions: what is asked, in tokens, and which requests belong together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from llm_attack.lm.trie import Trie, build


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

    @cached_property
    def trie(self) -> Trie:
        """What the model reads for the requests, shared prefixes once."""
        return build([r.inputs for r in self.requests])

    @property
    def longest(self) -> int:
        """Tokens that the model reads for the longest request."""
        return max(len(r.inputs) for r in self.requests)


@dataclass(frozen=True)
class Shape:
    """What a batch of questions takes up.

    Attributes:
        rows: of the model's input.
        length: of each row, padding included.
    """

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def __add__(self, other: Shape) -> Shape:
        return Shape(self.rows + other.rows, max(self.length, other.length))


def of_rows(question: Question) -> Shape:
    """The shape with a row per request."""
    return Shape(len(question.requests), question.longest)


def of_tree(question: Question) -> Shape:
    """The shape as a tree."""
    return Shape(1, len(question.trie))


def batches(
    questions: Sequence[Question], shape: Callable[[Question], Shape], rows: int, tokens: int
) -> list[list[Question]]:
    """Questions in batches, longest first, of at most `rows` rows and `tokens` tokens with padding.

    A question is never split, and has a batch of its own where it is larger than that. Which
    questions share a batch depends on nothing but their tokens.
    """
    shapes = {id(q): shape(q) for q in questions}
    order = sorted(
        questions,
        key=lambda q: (-shapes[id(q)].length, [(r.tokens, r.n_continuation) for r in q.requests]),
    )
    result: list[list[Question]] = []
    filled = Shape(0, 0)
    for question in order:
        filled += shapes[id(question)]
        if not result or filled.rows > rows or filled.tokens > tokens:
            result.append([])
            filled = shapes[id(question)]
        result[-1].append(question)
    return result
