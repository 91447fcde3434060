"""Assigns the engine's answers to the requests that were asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from llm_attack.lm.engine.attacked import Curve
from llm_attack.lm.engine.engine import Answer, Answered
from llm_attack.lm.engine.tokens import Changes


class OfRequest(NamedTuple):
    """An answer for each attack, and the values of its question; see `Answered`."""

    answers: list[Answer]
    alignment: tuple[float, ...] | None
    critical_epsilons: list[float | None]
    broken_by: list[str | None]
    curves: list[list[Curve]]
    votes: list[list[list[int]]] | None
    changes: Sequence[Changes | None]


def by_index(answered: Iterable[Answered]) -> dict[int, OfRequest]:
    """The answers by the indices in `Question.answers`."""
    return {
        index: OfRequest(
            [of_attack[i] for of_attack in parts.answers],
            parts.alignment,
            parts.critical_epsilons,
            parts.broken_by,
            [
                [curve._replace(values=curve.values[:, i]) for curve in of_attack]
                for of_attack in parts.curves
            ],
            parts.votes,
            parts.changes,
        )
        for parts in answered
        for i, indices in enumerate(parts.question.answers)
        for index in indices
    }
