"""What questions begin with and no attack moves, such as few-shot examples: computed once.

Its keys and values are kept, and the rows of a batch hold what stands behind it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile
from typing import Any

import numpy as np

from llm_attack.lm.packing.positions import of_request
from llm_attack.lm.packing.questions import Question

# Tokens of a prefix that take up the memory of one in the rows: of each, a row has keys and values
# alone, a few of the many activations that are kept for a gradient.
TOKENS_AS_ONE = 8


def space(length: int, prefix: int) -> int:
    """Tokens that a row of `length` counts for, the first `prefix` of which are computed once."""
    return length - prefix + prefix // TOKENS_AS_ONE


def start(question: Question, positions: str | None) -> tuple[int, ...]:
    """What all requests of `question` begin with, before anything that moves or is scored.

    Args:
        question: the question.
        positions: the tokens that may be perturbed, see `lm.packing.positions`; None: nothing is.
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
    """Which questions share a prefix, so that few tokens are computed.

    Args:
        starts: of each question what may be shared.
        least: tokens that a group must save, as its last batch is not full.

    Returns:
        Of each group the length of the prefix and the numbers of its questions; last, with a prefix
        of 0, those that share none.
    """
    order = sorted(range(len(starts)), key=lambda i: starts[i])
    # of sorted ones neighbours have most in common, and all in a stretch what its neighbours have
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
    """How many tokens they both begin with."""
    pairs = zip(some, others, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class Prefixes:
    """The keys and values of the prefix that was last asked for."""

    def __init__(self) -> None:
        self._tokens: tuple[int, ...] = ()
        self._cache: Any = None

    def remember(self, tokens: tuple[int, ...], run: Callable[[], Any]) -> None:
        """Keeps what `run` returns, transformers' `Cache` of one row, unless it is there."""
        if tokens != self._tokens:
            self._cache = None  # frees the memory first
            self._cache, self._tokens = run(), tokens

    def rows(self, n: int) -> Any:
        """The cache for `n` rows, which a forward may write to."""
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(n)
        return cache
