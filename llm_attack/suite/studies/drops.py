"""Table and figure of the difference of drops: which of two models is more robust?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.report.figures import look
from llm_attack.suite.report.layout import handles, legend, panels, print_style, wrapped
from llm_attack.suite.report.tables import Cells
from llm_attack.suite.results import Result
from llm_attack.suite.studies.models import EVEN, rms_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "drop of b minus drop of a: above 0, a is more robust"
RELATIVE = "for equal relative amplitudes, run both with --epsilon_unit rms"


def cells(frame: pd.DataFrame, notes: list[str]) -> Cells:
    """The table: a row per task and condition.

    Args:
        frame: the result of `analysis.drops.differences`.
        notes: the result of `amplitudes`.
    """
    rows = []
    for row in frame.to_dict("records"):
        ends = row["difference_low"], row["difference_high"]
        interval = "" if np.isnan(ends[0]) else f" ({ends[0]:+.1f} to {ends[1]:+.1f})"
        drops = [f"{row[key]:.1f}" for key in ("drop_a", "drop_b")]
        said = f"{row['difference']:+.1f}{interval}"
        rows.append(
            [row["task"], row["condition"], f"{row['n']}", *drops, said, f"{row['p_holm']:.2g}"]
        )
    explained = [
        "drop: points lost compared with none; difference: b minus a, paired by question (95 %"
        " interval)",
        "p: exact test by signs of clusters of questions, Holm over tasks; for the mean,"
        " stratified by task",
    ]
    heading = ["task", "condition", "n", "drop a", "drop b", "difference", "p"]
    return Cells(heading, rows, [*explained, *notes])


def amplitudes(frame: pd.DataFrame, a: Result, b: Result) -> list[str]:
    """Sentences on amplitudes that differ between the two models, or on a lack of shared attacks.

    Args:
        frame: the result of `analysis.drops.differences`.
        a: the first run.
        b: the second.
    """
    if frame.empty:
        return [
            f"the runs share no attack with the same settings: only none is compared; {RELATIVE}"
        ]
    sentences = []
    for condition in frame["condition"].unique():
        relative = [_relative(run.run.get("attacks") or {}, condition) for run in (a, b)]
        if abs(relative[0] - relative[1]) > EVEN * max(relative):
            sentences.append(
                f"{condition} is {relative[0]:.3g} RMS of the embeddings in a and {relative[1]:.3g}"
                f" in b: the attacks are not equally strong; {RELATIVE}"
            )
    return sentences


def _relative(attacks: Mapping[str, Mapping[str, object]], condition: str) -> float:
    attack = attacks.get(condition) or {}
    absolute = attack.get("epsilon_absolute")
    if not isinstance(absolute, (int, float)):
        return np.nan
    return absolute / rms_of(attacks, str(attack.get("hookpoint") or "embed"))


def figure(frame: pd.DataFrame) -> Figure:
    """The differences with their intervals, a panel per condition, a line per task.

    Args:
        frame: the result of `analysis.drops.differences`.
    """
    tasks = list(frame["task"].unique())
    height = 0.4 + 0.14 * len(tasks)
    with print_style():
        drawn, grid = panels(list(frame["condition"].unique()), height)
        for condition, axes in grid.items():
            rows = frame[frame["condition"] == condition].set_index("task").reindex(tasks)
            at = np.arange(len(tasks))[::-1]
            ends = [
                (rows["difference"] - rows["difference_low"]).fillna(0),
                (rows["difference_high"] - rows["difference"]).fillna(0),
            ]
            mean = np.array([task == MEAN for task in tasks])
            for which, label, name in ((~mean, "task", "random"), (mean, "mean over tasks", "bim")):
                like, values = look(name), rows["difference"].to_numpy(float)
                some = [end.to_numpy(float)[which] for end in ends]
                axes.errorbar(
                    values[which], at[which], xerr=some, ls="", marker=like.marker, ms=3, lw=0.8,
                    color=like.colour, label=label,
                )  # fmt: skip
            axes.axvline(0, color="k", lw=0.5)
            axes.set_ylim(-0.6, len(tasks) - 0.4)
            axes.set_yticks(at, [wrapped(task, 18) for task in tasks])
        drawn.supxlabel("drop of b minus drop of a, points: above 0, a is more robust", size=7)
        legend(drawn, handles(next(iter(grid.values()))))
    return drawn
