"""The change from one condition, or one run, to another. Imports neither torch nor lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llm_attack.stats import (
    design_effect,
    detectable,
    mean_of,
    paired_error,
    paired_interval,
    sign_test,
    standard_error,
)
from llm_attack.suite.analysis.outcomes import HIGHER, LOWER, Columns, counted

# Names of differences (after minus before), and of their negatives (before minus after).
DROPS = {"difference": "drop", "gold_difference": "gold_probability_drop"}


class Change(NamedTuple):
    """The changes of one task's questions, from which tests over several tasks start.

    Attributes:
        net: (sources,) number of questions gained minus lost per source, or sum of the changes of
            their scores. Above 0 if the answers got better.
        error: standard error of the mean change.
        gold: (n,) change of `gold_probability`.
        source: (n,) label of each question's source.
    """

    net: np.ndarray
    error: float
    gold: np.ndarray
    source: np.ndarray


def compared(pairs: Columns, before: Mapping[str, str], after: Mapping[str, str]) -> Any:
    """Compares one task's questions before and after: entries of a row, and a `Change`.

    Args:
        pairs: columns with one entry per question: `source`, `kind`, `better`, and those that the
            other arguments name.
        before: names of the columns with `acc` and `gold_probability` before.
        after: names of the columns with `acc` and `gold_probability` after.

    Returns:
        `lost` and `gained`: number of questions whose answers got worse and better, null if the
            score cannot be counted. `difference` (after minus before, in percentage points) with
            `difference_low` and `_high`, `detectable`, `design_effect`, `p_mcnemar`,
            `gold_difference` with `_low` and `_high`, `p_gold_probability`; `_change`, a `Change`.
    """
    sign = -1 if pairs["better"][0] == LOWER else 1
    step, gold = (pairs[after[name]] - pairs[before[name]] for name in ("acc", "gold_probability"))
    source = np.unique(pairs["source"], return_inverse=True)[1]
    net = sign * np.bincount(source, step)
    columns = (_of_counts if counted(pairs) else _of_numbers)(step, source, sign)
    error = columns.pop("_error")
    return {
        **columns,
        "detectable": 100 * detectable([error]),
        "p_mcnemar": sign_test([net], [len(step)]),
        **_of_gold([(gold, source)]),
        "_change": Change(net, error, gold, source),
    }


def _of_counts(step: np.ndarray, source: np.ndarray, sign: int) -> dict[str, Any]:
    """The entries for scores that are 0 or 1."""
    down, up, n = int((step < 0).sum()), int((step > 0).sum()), len(step)
    effect = design_effect(step, source)
    low, high = paired_interval(down / effect, up / effect, n / effect)
    return {
        **dict(zip(("lost", "gained"), (down, up)[::sign], strict=True)),
        **{"difference": 100 * (up - down) / n},
        **{"difference_low": 100 * low, "difference_high": 100 * high},
        "design_effect": effect,
        "_error": float(paired_error(down / effect, up / effect, n / effect)),
    }


def _of_numbers(step: np.ndarray, source: np.ndarray, sign: int) -> dict[str, Any]:
    """The entries for all other scores."""
    mean, error = mean_of([(step, source)]), standard_error(step, source)
    low, high = (mean.low, mean.high) if error > 0 else (np.nan, np.nan)
    return {
        **dict.fromkeys(("lost", "gained"), pd.NA),
        **{"difference": 100 * mean.value},
        **{"difference_low": 100 * low, "difference_high": 100 * high},
        "design_effect": design_effect(step, source),
        "_error": error,
    }


def _of_gold(tasks: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    mean = mean_of(tasks)
    ends = (mean.value, mean.low, mean.high)
    names = ("gold_difference", "gold_difference_low", "gold_difference_high")
    return {k: 100 * x for k, x in zip(names, ends, strict=True)} | {
        "p_gold_probability": mean.p_value
    }


def pooled(group: Columns) -> dict[str, Any]:
    """The entries of a mean over tasks that are no means: tests, and detectable differences."""
    changes = list(group["_change"])
    if any(change is None for change in changes):
        return {}
    p_value = sign_test([change.net for change in changes], group["n"].tolist())
    gold = _of_gold([(change.gold, change.source) for change in changes])
    columns = {"p_mcnemar": p_value, "p_mcnemar_holm": p_value}
    columns["detectable"] = 100 * detectable([change.error for change in changes])
    return columns | (gold if "gold_difference" in group else as_drops(gold))


def as_drops(columns: dict[str, Any], better: str = HIGHER) -> dict[str, Any]:
    """Turns differences of `compared` into drops. A drop is above 0 if the score is worse."""
    rest = dict(columns)
    for name, drop in DROPS.items():
        if name in rest:
            value, low, high = (rest.pop(f"{name}{end}") for end in ("", "_low", "_high"))
            if name == "gold_difference" or better != LOWER:
                value, low, high = -value, -high, -low
            rest[drop], rest[f"{drop}_low"], rest[f"{drop}_high"] = value, low, high
    return rest
