"""Accuracy by hookpoint, as figure and table: Fig. 5 of arXiv 2205.01493 for language models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from llm_attack.base.record import write_text
from llm_attack.lm.settings import EMBED
from llm_attack.suite.analysis.conditions import Conditions, by_name
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.plan import WORST
from llm_attack.suite.report.figures import draw_amplitudes, draw_levels
from llm_attack.suite.report.layout import handles, legend, panels, print_style
from llm_attack.suite.report.tables import Cells, score_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "accuracy by hookpoint"


def at_first(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first hookpoint, of samples or of a table."""
    if "hookpoint" not in frame:
        return frame
    return frame[frame["hookpoint"] == frame["hookpoint"].iloc[0]].reset_index(drop=True)


def shown_of(run: dict[str, Any], table: pd.DataFrame) -> dict[str, Any]:
    """The record of a run with only the conditions at the first hookpoint."""
    conditions = set(at_first(table)["condition"])
    others = {name for name in run["attacks"] if name not in conditions}
    if not others:
        return run
    warnings = run.get("warnings") or []
    kept = [text for text in warnings if text.partition(": ")[0] not in others]
    left_out = len(warnings) - len(kept)
    more = [f"{left_out} of conditions at other hookpoints are in run.json"] if left_out else []
    attacks = {name: info for name, info in run["attacks"].items() if name not in others}
    return {**run, "attacks": attacks, "warnings": [*kept, *more]}


def by_hookpoint(table: pd.DataFrame, known: Conditions | None = None) -> pd.DataFrame:
    """The mean over tasks for each attack and hookpoint; empty if there is only one hookpoint.

    Args:
        table: the result of `summarise`.
        known: the conditions of the run; by default, those that the names show.

    Returns:
        The rows of the table with three more columns. `attacked` is the condition without its
            hookpoint, `kind` is the hookpoint with * for its number, and `depth` is the number of
            blocks up to and including this one.
    """
    attacked = table[(table["task"] == MEAN) & ~table["attack"].isin(["none", WORST])]
    if attacked["acc"].isna().all() or attacked["hookpoint"].nunique() < 2:
        return attacked.iloc[:0]
    known = by_name(attacked) if known is None else known
    numbers = attacked["hookpoint"].str.extract(r"\.(\d+)(?:\.|$)", expand=False)
    return attacked.assign(
        attacked=[known[name].elsewhere().name for name in attacked["condition"]],
        kind=[re.sub(r"\.\d+(?=\.|$)", ".*", name, count=1) for name in attacked["hookpoint"]],
        depth=numbers.astype(float).add(1).fillna(0).astype(int),
    )


def cells(table: pd.DataFrame, known: Conditions | None = None) -> Cells | None:
    """A row for each hookpoint, a column for each attack; None if there is only one hookpoint."""
    means = by_hookpoint(table, known)
    if means.empty:
        return None
    columns = list(means["attacked"].unique())
    rows = []
    for hookpoint, group in means.groupby("hookpoint", sort=False):
        row = {entry["attacked"]: entry for entry in group.to_dict("records")}
        rows.append([str(hookpoint), *(_accuracy(row[name]) for name in columns)])
    score = score_of(table[table["task"] == MEAN]) if "score" in table else "acc"
    notes = [
        f"{score} (95 % interval), mean over tasks. Each hookpoint has its own unit of epsilon",
        f"the other tables and figures show only {rows[0][0]}; table.csv has all hookpoints",
    ]
    clean = table[(table["task"] == MEAN) & (table["attack"] == "none")]
    if len(clean):
        notes.append(f"none: {_accuracy(clean.iloc[0])}")
        if pd.notna(clean["baseline"].iloc[0]):
            notes[-1] += f"; guessing: {clean['baseline'].iloc[0]:.3f}"
    return Cells(["hookpoint", *columns], rows, notes)


def _accuracy(row: Any) -> str:
    return f"{row['acc']:.3f} ({row['acc_low']:.3f}–{row['acc_high']:.3f})"


def figure(table: pd.DataFrame, known: Conditions | None = None) -> Figure | None:
    """Mean accuracy against depth, a panel for each kind of hookpoint; None for one hookpoint.

    There is a line for each attack and amplitude, with its 95 % interval as a band. Smaller
    amplitudes are paler. Dashed lines are the accuracies without an attack and of random guesses.
    The input embedding has depth 0. Modules outside of blocks are only in the table, unless all
    modules are outside.
    """
    means = by_hookpoint(table, known)
    if means.empty:
        return None
    names = (
        [] if means["kind"].str.contains("*", regex=False).any() else means["hookpoint"].unique()
    )
    if len(names):  # side by side, because none is in a block
        order = {name: i for i, name in enumerate(names)}
        means = means.assign(kind="hookpoints", depth=means["hookpoint"].map(order))
    kinds = [kind for kind in means["kind"].unique() if "*" in kind or len(names)]
    mean = table[table["task"] == MEAN]
    with print_style():
        drawn, grid = panels(kinds if len(names) else _titles(kinds), height=1.6)
        for kind, axes in zip(kinds, grid.values(), strict=True):
            some = means[means["kind"].isin([kind, EMBED])]
            draw_amplitudes(axes, some, "depth", size=2)
            draw_levels(axes, mean)
            if len(names):
                axes.set_xticks(range(len(names)), names, rotation=90)
            else:
                axes.locator_params("x", integer=True)
            axes.set(ylim=(0, 1.03), yticks=np.arange(0, 1.01, 0.25))
        drawn.supxlabel("" if len(names) else "block (0: the input embedding)")
        drawn.supylabel("accuracy")
        legend(drawn, handles(next(iter(grid.values()))))
    return drawn


def _titles(kinds: list[str]) -> list[str]:
    """The kinds without their common beginning, except for the name before the *."""
    parts = [kind.split(".") for kind in kinds]
    shared = 0
    while len({part[shared] for part in parts}) == 1 and "*" not in parts[0][shared : shared + 2]:
        shared += 1
    return [".".join(part[shared:]) for part in parts]


def save(means: Cells | None, folder: Path) -> None:
    """Writes `layers.md` into `folder`, if there is a table."""
    if means is not None:
        write_text(folder / "layers.md", means.markdown())
