"""What changed from one condition, or one run, to another. Imports neither torch nor lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llm_attack.inference import (
    design_effect,
    detectable,
    mean_of,
    paired_interval,
    sign_test,
)

# Differences, after minus before, and what they are called before minus after.
DROPS = {"difference": "drop", "gold_difference": "gold_probability_drop"}


class Change(NamedTuple):
    """A question's outcomes before and after, and its source: what tests over tasks start from.

    Attributes:
        net: (sources,) questions gained less those lost.
        gold: (n,) change of `gold_probability`.
        source: (n,) labels.
    """

    net: np.ndarray
    gold: np.ndarray
    source: np.ndarray


def compared(pairs: pd.DataFrame, before: Mapping[str, str], after: Mapping[str, str]) -> Any:
    """One task's questions before and after: a row's entries, and a `Change` as `_change`.

    Args:
        pairs: a row per question: `source`, and the columns named by the others.
        before: the columns of `acc` and `gold_probability`.
        after: likewise.

    Returns:
        `lost`, `gained`, `difference` (after minus before, in points of a percent) with
        `difference_low` and `_high`, `detectable`, `design_effect`, `p_mcnemar`, `gold_difference`
        with `_low` and `_high`, `p_gold_probability`.
    """
    step = (pairs[after["acc"]] - pairs[before["acc"]]).to_numpy(float)
    lost, gained, n = int((step < 0).sum()), int((step > 0).sum()), len(pairs)
    source = np.unique(pairs["source"], return_inverse=True)[1]
    effect = design_effect(step, source)
    low, high = paired_interval(lost / effect, gained / effect, n / effect)
    gold = (pairs[after["gold_probability"]] - pairs[before["gold_probability"]]).to_numpy(float)
    net = np.bincount(source, step).round().astype(int)
    return {
        **{"lost": lost, "gained": gained, "difference": 100 * (gained - lost) / n},
        **{"difference_low": 100 * low, "difference_high": 100 * high},
        "detectable": 100 * detectable([lost / effect], [gained / effect], [n / effect]),
        "design_effect": effect,
        "p_mcnemar": sign_test([net], [n]),
        **_of_gold([(gold, source)]),
        "_change": Change(net, gold, source),
    }


def _of_gold(tasks: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    found = mean_of(tasks)
    ends = (found.value, found.low, found.high)
    names = ("gold_difference", "gold_difference_low", "gold_difference_high")
    return {k: 100 * x for k, x in zip(names, ends, strict=True)} | {
        "p_gold_probability": found.p_value
    }


def effective(rows: pd.DataFrame) -> list[np.ndarray]:
    """Counts of lost, gained and all questions per task, as of questions that share no source."""
    effect = rows["design_effect"].to_numpy(float)
    return [rows[key].to_numpy(float) / effect for key in ("lost", "gained", "n")]


def pooled(group: pd.DataFrame) -> dict[str, Any]:
    """Of the mean over tasks what is not a mean: the tests, and what they can detect."""
    changes = list(group["_change"])
    if any(change is None for change in changes):
        return {}
    p_value = sign_test([change.net for change in changes], group["n"].tolist())
    gold = _of_gold([(change.gold, change.source) for change in changes])
    found = {"p_mcnemar": p_value, "p_mcnemar_holm": p_value}
    found["detectable"] = 100 * detectable(*effective(group))
    return found | (gold if "gold_difference" in group else as_drops(gold))


def as_drops(found: dict[str, Any]) -> dict[str, Any]:
    """Differences of `compared` with their signs turned."""
    rest = dict(found)
    for name, drop in DROPS.items():
        if name in rest:
            rest[drop] = -rest.pop(name)
            low, high = rest.pop(f"{name}_low"), rest.pop(f"{name}_high")
            rest[f"{drop}_low"], rest[f"{drop}_high"] = -high, -low
    return rest
