"""Calibration: is a model right as often as it is confident, without and under an attack?

The confidence in an answer is the probability of the chosen option, from the log-likelihoods that
`acc` compares. It needs only `samples.parquet`, so older runs have it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llm_attack.stats import Mean, mean_of
from llm_attack.suite.analysis.outcomes import confidence, sources
from llm_attack.suite.analysis.summary import MEAN

BINS = 10
_PLACE = ["task", "doc_id"]
_NUMBERS = ("gap", "ece", "brier")


class Bin(NamedTuple):
    """Number, mean confidence and accuracy of questions with similar confidence."""

    n: int
    confidence: float
    accuracy: float


def bins(confidences: np.ndarray, right: np.ndarray, number: int = BINS) -> list[np.ndarray]:
    """Sorts questions by confidence into bins of equal size, and returns the indices of each bin.

    Bins have equal mass instead of equal width, so none is nearly empty (Nixon et al. 2019, arXiv
    1904.01685). If a boundary divides questions of equal confidence, wrong answers come first. So
    the order of the questions does not matter.

    Args:
        confidences: (n,) confidence in each answer.
        right: (n,) whether each answer is right.
        number: number of bins; at most one per question.
    """
    order = np.lexsort((right, confidences))
    return [part for part in np.array_split(order, number) if len(part)]


def reliability(samples: pd.DataFrame, number: int = BINS) -> list[Bin]:
    """The reliability diagram of one condition, over the questions of all tasks.

    Args:
        samples: the result of `judged`.
        number: number of bins.
    """
    sure, right = samples["confidence"].to_numpy(float), samples["right"].to_numpy(float)
    return [
        Bin(len(part), float(sure[part].mean()), float(right[part].mean()))
        for part in bins(sure, right, number)
    ]


def expected_error(confidences: np.ndarray, parts: Sequence[np.ndarray]) -> float:
    """The expected calibration error that a calibrated model has by chance, with these confidences.

    It is above 0, because the share of right answers in a bin varies. It sums, over the bins, the
    mean absolute value of a normal distribution with variance sum p (1 - p), and divides by n.

    Args:
        confidences: (n,) confidence in each answer. The questions are independent.
        parts: the result of `bins`.
    """
    spread = [np.sqrt((confidences[part] * (1 - confidences[part])).sum()) for part in parts]
    return float(np.sqrt(2 / np.pi) * np.sum(spread) / len(confidences))


def judged(samples: pd.DataFrame) -> pd.DataFrame:
    """The rows of `samples` with a confidence, and `confidence`, `right`, `brier`, `source`.

    `right` is whether the likeliest choice is gold. Questions with one choice have no confidence.
    """
    sure, brier = confidence(samples)
    pairs = zip(samples["prediction"], samples["gold"], strict=True)
    right = [float(prediction in set(gold)) for prediction, gold in pairs]
    found = samples[[*_PLACE, "condition", "attack", "epsilon", "n_choices"]].assign(
        confidence=sure, brier=brier, right=right, source=sources(samples)
    )
    return found[found["confidence"].notna() & (found["n_choices"] > 1)]


def calibration(known: pd.DataFrame) -> pd.DataFrame:
    """Calibration of each task under each condition, and the mean over tasks.

    Args:
        known: the result of `judged`.

    Returns:
        A row per task and condition. Columns:

        - `n`: number of questions
        - `acc`, `confidence`: accuracy and mean confidence
        - `gap`: confidence minus accuracy
        - `ece`: expected calibration error, the mean over questions of |confidence - accuracy| of
          their bin
        - `ece_by_chance`: the result of `expected_error`
        - `brier`: mean Brier score
        - `gap_low`, `gap_high` and the same for `ece` and `brier`: 95 % intervals by Student's t
          over the sources of the questions. For `ece`, the bins and the signs of their differences
          are fixed
        - `fallen`: number of questions that are right without an attack and wrong under it
        - `fallen_before`, `fallen_after`: their mean confidence in the right answer without an
          attack, and in the wrong one under it. NaN if there are none, or if `none` was not run
    """
    clean = {task: group for task, group in known[known["attack"] == "none"].groupby("task")}
    rows, terms = [], {}
    for (task, condition), group in known.groupby(["task", "condition"], sort=False):
        row, terms[task, condition] = _of(group)
        fallen = _fallen(clean.get(task, known.iloc[:0]), group)
        rows.append({"task": task, "condition": condition, **row, **fallen})
    frame = pd.DataFrame(rows)
    if frame.empty or frame["task"].nunique() == 1:
        return frame
    means = []
    for condition, group in frame.groupby("condition", sort=False):
        of_tasks = [terms[task, condition] for task in group["task"]]
        mean = group[["acc", "confidence", "ece_by_chance"]].mean().to_dict()
        mean |= {"n": int(group["n"].sum()), "fallen": int(group["fallen"].sum())}
        weights = group["fallen"] / max(1, group["fallen"].sum())
        for name in ("fallen_before", "fallen_after"):
            mean[name] = (group[name] * weights).sum(min_count=1)
        means.append({"task": MEAN, "condition": condition, **mean, **_intervals(of_tasks)})
    return pd.concat([frame, pd.DataFrame(means)], ignore_index=True)


_Terms = dict[str, tuple[np.ndarray, np.ndarray]]


def _of(group: pd.DataFrame) -> tuple[dict[str, Any], _Terms]:
    """One task's numbers under one condition, and the terms of the means with an interval."""
    sure, right = group["confidence"].to_numpy(float), group["right"].to_numpy(float)
    source, parts = group["source"].to_numpy(), bins(sure, right)
    away, sign = sure - right, np.empty(len(sure))
    for part in parts:
        sign[part] = 1.0 if away[part].sum() >= 0 else -1.0
    scored = group["brier"].notna().to_numpy()
    terms = {"gap": (away, source), "ece": (sign * away, source)}
    terms["brier"] = group["brier"].to_numpy(float)[scored], source[scored]
    row = {"n": len(group), "acc": right.mean(), "confidence": sure.mean()}
    row["ece_by_chance"] = expected_error(sure, parts)
    return row | _intervals([terms]), terms


def _intervals(tasks: Sequence[_Terms]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in _NUMBERS:
        values = [terms[name] for terms in tasks if len(terms[name][0])]
        mean = mean_of(values) if len(values) == len(tasks) else Mean(*4 * (np.nan,))
        least = -1.0 if name == "gap" else 0.0
        found |= {name: mean.value, f"{name}_low": max(least, mean.low), f"{name}_high": mean.high}
    return found


def _fallen(clean: pd.DataFrame, attacked: pd.DataFrame) -> dict[str, float]:
    places = pd.Index(clean["doc_id"]).get_indexer(pd.Index(attacked["doc_id"]))
    known = places >= 0
    before, after = clean.iloc[places[known]], attacked[known]
    fallen = (before["right"].to_numpy() == 1) & (after["right"].to_numpy() == 0)
    means = {
        f"fallen_{moment}": float(frame["confidence"][fallen].mean())
        for moment, frame in (("before", before), ("after", after))
    }
    return {"fallen": int(fallen.sum()), **means}
