"""From the engine's answers back to the requests that were asked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from llm_attack.lm.engine import Answer, Answered


class Scattered(NamedTuple):
    """What was found for a request: an answer for each attack, and its question's alignment."""

    answers: list[Answer]
    alignment: tuple[float, ...] | None


def by_index(answered: Iterable[Answered]) -> dict[int, Scattered]:
    """What was found, by the indices in `Question.answers`."""
    return {
        index: Scattered([of_attack[i] for of_attack in answers], alignment)
        for question, answers, alignment in answered
        for i, indices in enumerate(question.answers)
        for index in indices
    }
