"""Decides which questions share a batch, and in which layout, by pure functions of tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from llm_attack.lm.packing.prefix import space
from llm_attack.lm.packing.questions import Question, Request


@dataclass(frozen=True)
class Shape:
    """The space that a batch of questions takes up.

    Attributes:
        rows: number of rows of the model's input.
        length: length of each row, padding included.
    """

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def __add__(self, other: Shape) -> Shape:
        return Shape(self.rows + other.rows, max(self.length, other.length))


def of_rows(question: Question, prefix: int = 0) -> Shape:
    """The shape with a row per request; `prefix` tokens are computed once."""
    return Shape(len(question.requests), space(question.longest, prefix))


def of_tree(question: Question, prefix: int = 0) -> Shape:
    """The shape as a tree; `prefix` tokens are computed once."""
    return Shape(1, space(len(question.trie), prefix))


@dataclass(frozen=True)
class Batch:
    """Questions that go through the model together, as trees or with a row per request.

    Attributes:
        questions: the questions.
        trees: whether they are trees.
        prefix: number of first tokens that all rows share, and that are computed once.
        limit: largest number of tokens of a forward, unless one row has more.
    """

    questions: list[Question]
    trees: bool
    prefix: int = 0
    limit: int = sys.maxsize

    @property
    def tokens(self) -> int:
        """Number of tokens of the model's input, padding included."""
        shape = of_tree if self.trees else of_rows
        return sum((shape(q, self.prefix) for q in self.questions), Shape(0, 0)).tokens

    def halves(self) -> list[Batch]:
        """Two batches, the last first."""
        middle = len(self.questions) // 2
        parts = self.questions[middle:], self.questions[:middle]
        return [replace(self, questions=part) for part in parts]


Family = list[Question]
"""A question, or the single requests of one. It stays together in a batch if it fits."""


def layouts(
    questions: Iterable[Question], takes_tree: Callable[[Question], bool], shared: bool
) -> tuple[list[Family], list[Family]]:
    """The questions that become trees, and the others, which get a row per request.

    Args:
        questions: the questions.
        takes_tree: says whether a question with several requests may be a tree.
        shared: whether the requests of a question are attacked together. If not, the others are
            single requests. The different requests of a question form a family.
    """
    alone: dict[Request, Question] = {}
    trees, others = [], []
    for q in questions:
        if len(q.requests) > 1 and takes_tree(q):
            trees.append([q])
        elif shared:
            others.append([q])
        else:
            family = []
            for request, answers in zip(q.requests, q.answers, strict=True):
                if request not in alone:
                    alone[request] = Question([request], [[]])
                    family.append(alone[request])
                alone[request].answers[0].extend(answers)
            if family:
                others.append(family)
    return trees, others


def batched(
    families: Sequence[Family], shape: Callable[[Question], Shape], rows: int, tokens: int
) -> list[list[Question]]:
    """Puts questions into batches of at most `rows` rows and `tokens` tokens, longest first.

    `tokens` includes padding. A question is never split. If it is too large, it has its own batch.
    A family is sorted by its longest member, and is split if a batch is full. The batches depend
    only on the tokens of the questions.
    """
    shapes = {id(q): shape(q) for family in families for q in family}

    def key(question: Question) -> tuple[int, list[tuple[tuple[int, ...], int]]]:
        tokens = [(r.tokens, r.n_continuation) for r in question.requests]
        return -shapes[id(question)].length, tokens

    ordered = sorted(
        (sorted(family, key=key) for family in families), key=lambda family: key(family[0])
    )
    result: list[list[Question]] = []
    filled = Shape(0, 0)
    for question in (q for family in ordered for q in family):
        filled += shapes[id(question)]
        if not result or filled.rows > rows or filled.tokens > tokens:
            result.append([])
            filled = shapes[id(question)]
        result[-1].append(question)
    return result
