"""Loss and margin at every step: stored with finished batches, and made a frame at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from llm_attack.lm.engine.scatter import OfRequest as Found

STEPS = "steps"  # the key of the curves in the content of a batch

OfRequest = Sequence[Sequence[tuple[str, int, Sequence[Sequence[float]]]]]
"""For each condition, the curves of one request.

A curve has the attack, the number of its first step, and (loss, log-likelihood) for every step.
"""


def content(requests: Iterable[tuple[int, Found]]) -> dict[str, Any]:
    """The curves of a finished batch, in the form that is stored; empty if there are none.

    Args:
        requests: (number of the request in the run, its results) pairs.
    """
    kept = [
        (
            number,
            [
                [(curve.attack, curve.first, curve.values.tolist()) for curve in of_condition]
                for of_condition in found.curves
            ],
        )
        for number, found in requests
        if any(found.curves)
    ]
    return {STEPS: kept} if kept else {}


def frame_of(
    groups: Mapping[tuple[str, Any], Sequence[int]],
    golds: Mapping[tuple[str, Any], Sequence[bool]],
    conditions: Sequence[str],
    curves: Mapping[int, OfRequest],
    shared: bool,
) -> pd.DataFrame:
    """A row for each question, condition and step.

    Args:
        groups: the result of `rows.grouped`.
        golds: the result of `rows.gold_of`.
        conditions: the names of the conditions.
        curves: the curves by numbers of requests.
        shared: whether the requests of a question share a perturbation, and so a loss.

    Returns:
        Columns `task`, `doc_id`, `condition`, `step`, and:

        - `attack`: the attack that made the step. A battery has several.
        - `loss`: the loss that the attack raises, summed over requests that have their own.
        - `margin`: log-likelihood of the right choice minus that of the best other one, in nats.
    """
    places: list[tuple[Any, ...]] = []
    numbers: list[np.ndarray] = [np.empty((0, 3))]
    for place, requests in groups.items():
        found = [curves[n] for n in requests if n in curves] if golds[place] else []
        for condition, of_requests in zip(conditions, zip(*found, strict=True), strict=False):
            for same in zip(*of_requests, strict=True):
                attack, first, _ = same[0]
                least = min(len(of_request) for *_, of_request in same)
                values = np.array([of_request[:least] for *_, of_request in same])
                if values.size:
                    numbers.append(_numbers(values, first, np.array(golds[place]), shared))
                    places.append((*place, condition, attack))
    lengths = [len(part) for part in numbers[1:]]
    columns = zip(*places, strict=True) if places else ((),) * 4
    names = ("task", "doc_id", "condition", "attack")
    frame = pd.DataFrame(
        {k: np.repeat(np.array(v, object), lengths) for k, v in zip(names, columns, strict=True)}
    ).infer_objects()
    step, loss, margin = np.concatenate(numbers).T
    return frame.assign(step=step.astype(int), loss=loss, margin=margin)


def _numbers(values: np.ndarray, first: int, right: np.ndarray, shared: bool) -> np.ndarray:
    """(steps, 3): step, loss and margin, of (requests, steps, 2) values of one question."""
    loss = values[0, :, 0] if shared else values[..., 0].sum(0)
    steps = np.arange(first, first + len(loss))
    return np.stack([steps, loss, _margins(values[..., 1], right)], 1)


def _margins(log_likelihoods: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(steps,) margins of (requests, steps) log-likelihoods; NaN without another choice."""
    choices = log_likelihoods[: len(right)]
    if right.all() or not right.any():
        return np.full(choices.shape[1], np.nan)
    margins: np.ndarray = choices[right].max(0) - choices[~right].max(0)
    return margins
