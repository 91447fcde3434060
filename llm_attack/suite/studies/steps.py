"""Accuracy after each number of steps: the table, and the figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from llm_attack.attacks.settings import condition_name
from llm_attack.suite.analysis.conditions import Conditions, steps_told
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.report.figures import draw_amplitudes, draw_levels
from llm_attack.suite.report.layout import handles, legend, panels, print_style
from llm_attack.suite.report.tables import Cells, named_by_score, score_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "accuracy by steps"


def by_steps(table: pd.DataFrame, known: Conditions) -> pd.DataFrame:
    """The rows of conditions that differ only in their steps.

    Args:
        table: the result of `summarise`.
        known: the conditions of the run.

    Returns:
        The rows of the table with two more columns: `steps`, and `attacked`, the condition without
            its steps.
    """
    told = steps_told(known)
    rows = table[table["condition"].isin(told) & table["acc"].notna()]
    attacked = {
        name: condition_name(known[name].attack, str(known[name].amplitude)) for name in told
    }
    return rows.assign(
        steps=rows["condition"].map(told), attacked=rows["condition"].map(attacked)
    ).sort_values("steps", kind="stable")


def cells(table: pd.DataFrame, known: Conditions) -> Cells | None:
    """A row for each number of steps, a column for each attack and amplitude; None if empty."""
    means = by_steps(table[table["task"] == MEAN], known)
    if means.empty:
        return None
    shown = {
        (row["steps"], row["attacked"]): f"{row['acc']:.3f}"
        + ("" if pd.isna(row["acc_low"]) else f" ({row['acc_low']:.3f}–{row['acc_high']:.3f})")
        for row in means.to_dict("records")
    }
    columns = list(dict.fromkeys(name for _, name in shown))
    rows = [
        [f"{n}", *(shown.get((n, name), "–") for name in columns)]
        for n in dict.fromkeys(n for n, _ in shown)
    ]
    score = score_of(means) if "score" in table else "acc"
    notes = [f"{score} (95 % interval), mean over tasks, after so many steps"]
    return Cells(["steps", *columns], rows, notes)


def figure(table: pd.DataFrame, known: Conditions) -> Figure | None:
    """Accuracy against steps, a panel per task and one for their mean; None without such a curve.

    There is a line for each attack and amplitude, with its 95 % interval as a band. Smaller
    amplitudes are paler. Dashed lines are the accuracies without an attack and of random guesses.

    Args:
        table: the result of `summarise`.
        known: the conditions of the run.
    """
    curves = by_steps(named_by_score(table), known)
    if curves.empty:
        return None
    counts = sorted(curves["steps"].unique())
    with print_style():
        drawn, grid = panels(list(curves["task"].unique()))
        named = named_by_score(table)
        for task, axes in grid.items():
            some, of_task = curves[curves["task"] == task], named[named["task"] == task]
            draw_amplitudes(axes, some, "steps")
            draw_levels(axes, of_task)
            axes.set_xscale("log")
            axes.set_xticks(counts, [f"{n}" for n in counts])
            axes.minorticks_off()
            if "score" not in table:
                axes.set(ylim=(0, 1.03), yticks=np.arange(0, 1.01, 0.25))
        drawn.supxlabel("steps")
        drawn.supylabel("score" if "score" in table else "accuracy")
        legend(drawn, handles(next(iter(grid.values()))))
    return drawn
