"""Differences of drops of all pairs of models: which models lose more under an attack?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd

from llm_attack.stats import holm
from llm_attack.suite.analysis.drops import differences
from llm_attack.suite.analysis.flags import FAILED, flagged
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.report.tables import Cells
from llm_attack.suite.results import Result

MOST = 10  # runs: more have too many pairs to be read, and to be tested in seconds
TITLE = "differences of drops, b minus a: above 0, a is more robust"
COLUMNS = [
    *("condition", "a", "b", "task", "n", "drop_a", "drop_b", "difference"),
    *("difference_low", "difference_high", "p", "p_holm"),
]


def pairs(runs: Mapping[str, Result]) -> pd.DataFrame:
    """The difference of drops of each pair of runs, on the questions that both asked.

    Args:
        runs: runs by the names of the models.

    Returns:
        A row per condition, pair of models `a` and `b`, and task; the mean over tasks is last.
            `p_holm` is `p` adjusted over the pairs, for each condition and task. The other columns
            come from `analysis.drops.differences`. Empty for more than `MOST` runs.
    """
    if len(runs) > MOST:
        return pd.DataFrame(columns=COLUMNS)
    found = []
    for (a, of_a), (b, of_b) in itertools.combinations(runs.items(), 2):
        content = (of_a.worst(), of_a.questions, of_b.worst(), of_b.questions)
        frame = differences(*content, conditions=(of_a.conditions, of_b.conditions))
        found.append(flagged(frame.assign(a=a, b=b), {"_a": of_a.run, "_b": of_b.run}))
    frame = pd.concat(found, ignore_index=True)
    frame = frame[[*COLUMNS, *(name for name in frame if name.startswith(FAILED))]]
    order = list(dict.fromkeys(frame["condition"]))
    frame["p_holm"] = frame.groupby(["condition", "task"])["p"].transform(holm)
    return frame.sort_values("condition", key=lambda names: names.map(order.index), kind="stable")


def cells(frame: pd.DataFrame) -> Cells:
    """The table of the means over tasks: a row per condition and pair.

    Args:
        frame: the result of `pairs`.
    """
    rows = []
    for row in frame[frame["task"] == MEAN].to_dict("records"):
        ends = row["difference_low"], row["difference_high"]
        interval = "" if np.isnan(ends[0]) else f" ({ends[0]:+.1f} to {ends[1]:+.1f})"
        rows.append(
            [
                *(row["condition"], row["a"], row["b"], f"{row['n']}"),
                *(f"{row[key]:.1f}" for key in ("drop_a", "drop_b")),
                *(f"{row['difference']:+.1f}{interval}", f"{row['p_holm']:.2g}"),
            ]
        )
    heading = ["condition", "a", "b", "n", "drop a", "drop b", "difference", "p"]
    notes = [
        "mean over tasks; drop: points lost compared with none; difference: paired by question on"
        " what both models answered (95 % interval)",
        "p: exact test by signs of clusters of questions, stratified by task; Holm over the pairs",
    ]
    return Cells(heading, rows, notes)
