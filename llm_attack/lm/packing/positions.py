"""Positions: the tokens of a request that an attack may move."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from llm_attack.base.declare import is_plain
from llm_attack.base.errors import invalid
from llm_attack.lm.packing.questions import Question, Request

ALL, QUESTION = "all", "question"

# All count from the end, because prompts that are too long are cut at the start.
NAMED: dict[str, Callable[[Request], slice]] = {
    ALL: lambda request: slice(None),
    "context": lambda request: slice(_from_end(request, request.n_continuation)),
    "continuation": lambda request: slice(_from_end(request, request.n_continuation), None),
    QUESTION: lambda request: slice(_from_end(request, request.n_question), None),
    "not_first": lambda request: slice(1, None),
}
_OF_REQUEST = ("context", "continuation", QUESTION)  # the others count what the hookpoint holds


def _from_end(request: Request, n: int) -> int:
    return max(0, len(request.tokens) - n)


def check_positions(positions: str) -> None:
    """Raises a `UsageError` unless it is a key of `NAMED` or a slice."""
    if positions not in NAMED:
        _slice(positions)


def _slice(positions: str) -> slice:
    parts = positions.split(":")
    try:
        parsed = slice(*(int(part) if part else None for part in parts))
        parsed.indices(1)  # a step of 0 is refused
    except (TypeError, ValueError):
        parts = []
    if len(parts) < 2 or not all(map(is_plain, parts)):
        raise invalid("positions", positions, [*NAMED, "a slice such as 2:-1"])
    return parsed


def of_request(request: Request, positions: str) -> NDArray[np.bool_]:
    """(tokens,) booleans: whether each token that the model reads for `request` may move."""
    named = NAMED.get(positions)
    moves = np.zeros(len(request.inputs), np.bool_)
    hooked = np.zeros_like(moves)
    hooked[request.hooked] = True
    counted = moves if positions in _OF_REQUEST else moves[request.hooked]
    counted[_slice(positions) if named is None else named(request)] = True
    return moves & hooked


def of_question(question: Question, positions: str) -> NDArray[np.bool_]:
    """(nodes,) booleans for a question's trie. A shared token moves if it may in every request."""
    moves = np.ones(len(question.trie), np.bool_)
    for request, path in zip(question.requests, question.trie.paths, strict=True):
        moves[path] &= of_request(request, positions)
    return moves
