"""Is a model as often right as it is sure, without an attack and under it?

A question's confidence is the probability of the choice that is answered, by the likelihoods that
`acc` compares. It needs no more than `samples.parquet` holds, so runs of earlier versions have it.
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
    """Questions of about the same confidence: their number, and two means."""

    n: int
    confidence: float
    accuracy: float


def bins(confidences: np.ndarray, right: np.ndarray, number: int = BINS) -> list[np.ndarray]:
    """Questions in bins of equal size, by their confidence: the places of each bin's questions.

    Equal mass, and not equal width (Nixon et al. 2019, arXiv 1904.01685): no bin is nearly empty.
    Equal confidences that a boundary divides are ordered by the answer, wrong before right, so that
    the order of the questions does not matter.

    Args:
        confidences: (n,) of questions.
        right: (n,) whether they are right.
        number: of bins; with fewer questions there is one for each.
    """
    order = np.lexsort((right, confidences))
    return [part for part in np.array_split(order, number) if len(part)]


def reliability(samples: pd.DataFrame, number: int = BINS) -> list[Bin]:
    """The reliability diagram of one condition, whose tasks are taken together.

    Args:
        samples: of `judged`.
        number: of bins.
    """
    sure, right = samples["confidence"].to_numpy(float), samples["right"].to_numpy(float)
    return [
        Bin(len(part), float(sure[part].mean()), float(right[part].mean()))
        for part in bins(sure, right, number)
    ]


def expected_error(confidences: np.ndarray, parts: Sequence[np.ndarray]) -> float:
    """The expected calibration error of a model that is calibrated, with these confidences.

    It is above 0, as the share of right answers in a bin varies by chance. The sum over the bins of
    the mean absolute value of a normal distribution with the variance sum p (1 - p).

    Args:
        confidences: (n,) of independent questions.
        parts: of `bins`.
    """
    spread = [np.sqrt((confidences[part] * (1 - confidences[part])).sum()) for part in parts]
    return float(np.sqrt(2 / np.pi) * np.sum(spread) / len(confidences))


def judged(samples: pd.DataFrame) -> pd.DataFrame:
    """The rows of `samples` that have a confidence, with it, `right`, `brier` and `source`.

    `right` is whether the likeliest choice is gold. Questions with one choice have no confidence.
    """
    sure, brier = confidence(samples)
    pairs = zip(samples["prediction"], samples["gold"], strict=True)
    right = [float(prediction in set(gold)) for prediction, gold in pairs]
    found = samples[[*_PLACE, "condition", "attack", "epsilon", "n_choices"]].assign(
        confidence=sure, brier=brier, right=right, source=sources(samples)
    )
    return found[found["confidence"].notna() & (found["n_choices"] > 1)]


def calibration(samples: pd.DataFrame) -> pd.DataFrame:
    """Calibration of each task under each condition, and the mean over tasks.

    Args:
        samples: as in `samples.parquet`.

    Returns:
        A row per task and condition. `n` questions; `acc` and `confidence`, their means; `gap`,
        confidence less accuracy; `ece`, the expected calibration error: mean over questions of
        |confidence - accuracy| of their bin; `ece_by_chance` of `expected_error`; `brier`. The last
        three but one have 95 % intervals `*_low` and `*_high` by Student's t over the sources of
        the questions; that of `ece` takes the bins and the signs of their differences as they are.
        `fallen`, questions that are right without an attack and wrong under it, `fallen_before` and
        `fallen_after`: their mean confidence, before in the right answer and after in the wrong
        one; NaN where there are none, or no condition without an attack.
    """
    known = judged(samples)
    rows, terms = [], {}
    for (task, condition), group in known.groupby(["task", "condition"], sort=False):
        row, terms[task, condition] = _of(group)
        clean = known[(known["task"] == task) & (known["attack"] == "none")]
        rows.append({"task": task, "condition": condition, **row, **_fallen(clean, group)})
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
    """The numbers of one task's questions under one condition, and what their means are of."""
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
    both = clean.merge(attacked, on="doc_id", suffixes=("_before", "_after"))
    fallen = both[(both["right_before"] == 1) & (both["right_after"] == 0)]
    means = {f"fallen_{t}": float(fallen[f"confidence_{t}"].mean()) for t in ("before", "after")}
    return {"fallen": len(fallen), **means}
