"""How many tokens make answers wrong, and which: numbers from the frame of `tokens.parquet`."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llm_attack.attacks.settings import OF_TOKENS
from llm_attack.suite.analysis.critical import ALL

COLUMNS = (
    *("task", "doc_id", "condition", "attack", "tokens", "place", "old", "new", "rms", "linf"),
    *("tried", "wrong", "nearest_rms", "nearest_linf", "of_question", "saliency"),
)
MOST = 3  # numbers of tokens up to this have their own column


def chooses(samples: pd.DataFrame) -> bool:
    """Whether an attack of the run chooses tokens."""
    return bool({*samples["attack"]} & {*OF_TOKENS})


def counts(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each task and condition, and one for all tasks together if there are several.

    Columns:
        task, condition, attack: the condition and its task.
        n: number of questions.
        right: number of questions whose clean answer is right.
        at_most_1, at_most_2, ...: right ones for which so few tokens were enough.
        fell: right ones for which any number was enough.
        median: median number of tokens of those that fell.
        rms, linf: medians of the largest change of a token of those that fell, in units of the RMS
            of the embeddings.
        least_linf: the smallest of these largest changes of a coordinate.
        nearest_rms, nearest_linf: medians over all tokens of the prompts of the smallest change by
            a swap.
        least_nearest: the smallest change by any swap of these tokens, as largest coordinate.
        tried, wrong: number of evaluated swaps of the right ones, and of wrong answers among them.
        first: share of those that fell in which the changed tokens include the most salient one,
            with which the greedy search begins.
    """
    by_task = frame.groupby(["task", "condition"], sort=False)
    rows = [_row(str(task), str(name), group) for (task, name), group in by_task]
    if frame["task"].nunique() > 1:
        every = frame.groupby("condition", sort=False)
        rows += [_row(ALL, str(name), group) for name, group in every]
    return pd.DataFrame(rows)


def _row(task: str, condition: str, group: pd.DataFrame) -> dict[str, object]:
    right = group[group["tokens"].isna() | (group["tokens"] > 0)]
    fell = right[right["tokens"].notna()]
    few = {f"at_most_{n}": int((fell["tokens"] <= n).sum()) for n in range(1, MOST + 1)}
    largest = {name: fell[name].map(max).astype(float) for name in ("rms", "linf")}
    shown = [
        int(np.argmax(saliency)) in {*place}
        for saliency, place in zip(fell["saliency"], fell["place"], strict=True)
        if saliency is not None and len(saliency)
    ]
    return {
        "task": task,
        "condition": condition,
        "attack": group["attack"].iloc[0],
        "n": len(group),
        "right": len(right),
        **few,
        "fell": len(fell),
        "median": float(fell["tokens"].median()) if len(fell) else np.nan,
        **{name: float(values.median()) for name, values in largest.items()},
        "least_linf": float(largest["linf"].min()),
        "nearest_rms": float(_joined(group["nearest_rms"]).median()),
        "nearest_linf": float(_joined(group["nearest_linf"]).median()),
        "least_nearest": float(_joined(group["nearest_linf"]).min()),
        **{name: float(_joined(right[name]).sum(min_count=1)) for name in ("tried", "wrong")},
        "first": float(np.mean(shown)) if shown else np.nan,
    }


def _joined(lists: pd.Series) -> pd.Series:
    """The numbers of all lists."""
    return lists.explode().dropna().astype(float)
