"""The few-shot prefix cache: tokens that questions begin with and no attack moves, computed once.

Their keys and values are kept. The rows of a batch hold only the tokens after them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile
from typing import Any

import numpy as np

from llm_attack.lm.packing.positions import of_request
from llm_attack.lm.packing.questions import Question

# So many tokens of a prefix take as much memory as one token of a row. A row keeps only the keys
# and values of a prefix, which are few of the activations that a gradient needs.
TOKENS_AS_ONE = 8


def space(length: int, prefix: int) -> int:
    """The number of tokens that a row of `length` counts for; the first `prefix` are shared."""
    return length - prefix + prefix // TOKENS_AS_ONE


def start(question: Question, positions: str | None) -> tuple[int, ...]:
    """The tokens that all requests of `question` begin with, before any that moves or is scored.

    Args:
        question: the question.
        positions: the tokens that may be perturbed (`lm.packing.positions`); None: no token.
    """
    first = question.requests[0].tokens
    end = len(first)
    for request in question.requests:
        end = min(end, len(request.tokens) - request.n_continuation - 1)
        if positions is not None:
            moves = of_request(request, positions)
            end = min(end, int(moves.argmax()) if moves.any() else end)
        end = _common(first[:end], request.tokens)
    return first[:end]


def groups(starts: Sequence[tuple[int, ...]], least: int) -> list[tuple[int, list[int]]]:
    """Groups questions by a shared prefix, to compute few tokens.

    Args:
        starts: for each question, the tokens that may be shared.
        least: number of tokens that a group must save, because its last batch is not full.

    Returns:
        For each group, the length of the prefix and the numbers of its questions. The last group
        has a prefix of 0, and holds the questions that share none.
    """
    order = sorted(range(len(starts)), key=lambda i: starts[i])
    # if they are sorted, neighbours share most, and a stretch shares as much as its neighbours do
    common = np.array([_common(starts[a], starts[b]) for a, b in pairwise(order)], np.int64)

    def saved(a: int, b: int) -> int:
        tokens = (b - a - 1) * int(common[a : b - 1].min()) if b - a > 1 else 0
        return tokens if tokens >= least else 0

    sharing, alone, waiting = [], list[int](), [(0, len(order))]
    while waiting:
        a, b = waiting.pop()
        if b - a < 2:
            alone += order[a:b]
            continue
        shared = common[a : b - 1]
        cuts = a + 1 + np.flatnonzero(shared == shared.min())
        parts = list(pairwise([a, *cuts.tolist(), b]))
        whole = saved(a, b)
        if not whole or sum(saved(*part) for part in parts) > whole:
            waiting += parts
        else:
            sharing.append((int(shared.min()), sorted(order[a:b])))
    return [*sorted(sharing), (0, sorted(alone))]


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    """The number of tokens that both begin with."""
    pairs = zip(some, others, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class Prefixes:
    """Holds the keys and values of the last prefix."""

    def __init__(self) -> None:
        self._tokens: tuple[int, ...] = ()
        self._cache: Any = None

    def remember(self, tokens: tuple[int, ...], run: Callable[[], Any]) -> None:
        """Keeps the result of `run`, a `Cache` of transformers with one row, if it is not there."""
        if tokens != self._tokens:
            self._cache = None  # frees the memory first
            self._cache, self._tokens = run(), tokens

    def rows(self, n: int) -> Any:
        """The cache for `n` rows, which a forward may write to."""
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(n)
        return cache
