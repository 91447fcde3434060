"""From the engine's answers back to the requests that were asked."""

from __future__ import annotations

from collections.abc import Iterable

from llm_attack.lm.engine import Answer, Answered


def by_index(
    answered: Iterable[Answered],
) -> dict[int, tuple[list[Answer], tuple[float, ...] | None]]:
    """By the indices in `Question.answers`: an answer for each attack, and the alignment."""
    return {
        index: ([of_attack[i] for of_attack in answers], alignment)
        for question, answers, alignment in answered
        for i, indices in enumerate(question.answers)
        for index in indices
    }
