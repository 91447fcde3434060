"""What changed from one condition, or one run, to another. Imports neither torch nor lm-eval."""

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

# Differences, after minus before, and what they are called before minus after.
DROPS = {"difference": "drop", "gold_difference": "gold_probability_drop"}


class Change(NamedTuple):
    """A question's outcomes before and after, and its source: what tests over tasks start from.

    Attributes:
        net: (sources,) questions gained less those lost, or sums of the changes of their scores;
            above 0 where the answers got better.
        error: standard error of the mean change.
        gold: (n,) change of `gold_probability`.
        source: (n,) labels.
    """

    net: np.ndarray
    error: float
    gold: np.ndarray
    source: np.ndarray


def compared(pairs: Columns, before: Mapping[str, str], after: Mapping[str, str]) -> Any:
    """One task's questions before and after: a row's entries, and a `Change` as `_change`.

    Args:
        pairs: of each question: `source`, `kind`, `better`, and the columns named by the others.
        before: the columns of `acc` and `gold_probability`.
        after: likewise.

    Returns:
        `lost` and `gained`: questions whose answer got worse and better, null where the score does
        not count; `difference` (after minus before, in points of a percent) with `difference_low`
        and `_high`, `detectable`, `design_effect`, `p_mcnemar`, `gold_difference` with `_low` and
        `_high`, `p_gold_probability`.
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
    """What is said of a change of scores that are 0 or 1."""
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
    """What is said of a change of any other scores."""
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
    """Of the mean over tasks what is not a mean: the tests, and what they can detect."""
    changes = list(group["_change"])
    if any(change is None for change in changes):
        return {}
    p_value = sign_test([change.net for change in changes], group["n"].tolist())
    gold = _of_gold([(change.gold, change.source) for change in changes])
    columns = {"p_mcnemar": p_value, "p_mcnemar_holm": p_value}
    columns["detectable"] = 100 * detectable([change.error for change in changes])
    return columns | (gold if "gold_difference" in group else as_drops(gold))


def as_drops(columns: dict[str, Any], better: str = HIGHER) -> dict[str, Any]:
    """Differences of `compared` as drops: how much worse, whichever direction is better."""
    rest = dict(columns)
    for name, drop in DROPS.items():
        if name in rest:
            value, low, high = (rest.pop(f"{name}{end}") for end in ("", "_low", "_high"))
            if name == "gold_difference" or better != LOWER:
                value, low, high = -value, -high, -low
            rest[drop], rest[f"{drop}_low"], rest[f"{drop}_high"] = value, low, high
    return rest
