"""Robustness curves and what predicts them, as a figure and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from llm_attack.base.record import write_text
from llm_attack.suite.analysis import critical
from llm_attack.suite.analysis.outcomes import right
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.report.figures import look
from llm_attack.suite.report.layout import (
    OF_POINT,
    Unit,
    epsilon_axis,
    handles,
    legend,
    panels,
    print_style,
)
from llm_attack.suite.report.tables import Cells, csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = "critical epsilon"
FORETOLD = "predicted from the clean point"
STALLED = "¶"  # the mark of conditions in `critical.stalled`
_FIXED = "apgd"  # drawn beside the curves; it should lie on them


def figure(
    samples: pd.DataFrame, unit: Unit = OF_POINT, score: str = critical.ACC
) -> Figure | None:
    """Robustness curves, a panel per task and one for their mean; None without critical epsilons.

    A curve is the share of questions whose critical epsilon is above epsilon. This is the accuracy
    under the strongest attack of that amplitude. Marks are accuracies under `apgd` in the same run.
    None also if no epsilon above 0 was tried.

    Args:
        samples: the result of `critical.of_score`.
        unit: the unit of the epsilon axis.
        score: the result of `critical.score_of`.
    """
    conditions = critical.looked_for(samples)
    some = samples[samples["condition"].isin(conditions)]
    if not some["epsilon"].max() > 0:
        return None
    epsilons = ["epsilon", "critical_epsilon"]
    samples = samples.assign(**{name: samples[name] / unit.size for name in epsilons})
    some, largest = samples.loc[some.index], some["epsilon"].max() / unit.size
    fixed = samples[samples["attack"] == _FIXED]
    tasks = list(some["task"].unique())
    finite = some["critical_epsilon"].replace([0, np.inf], np.nan).dropna()
    shortest = min(finite.quantile(0.05), largest) if len(finite) else largest
    decades = 10.0 ** np.arange(np.floor(np.log10(shortest)), np.ceil(np.log10(largest)))
    ticks = np.array([largest, *np.outer(decades, [1, 2, 5]).ravel()])
    with print_style():
        drawn, grid = panels([*tasks, MEAN] if len(tasks) > 1 else tasks)
        for task, axes in grid.items():
            of_task = some if task == MEAN else some[some["task"] == task]
            for condition, rows in of_task.groupby("condition", sort=False):
                values = list(critical.of_tasks(rows).values())
                steps = np.unique(np.concatenate([*values, [0.0, rows["epsilon"].iloc[0]]]))
                steps = steps[steps <= rows["epsilon"].iloc[0]]
                like = look(str(rows["attack"].iloc[0]))
                line: Any = {"color": like.colour, "ls": like.line, "lw": 1, "label": condition}
                axes.step(steps, critical.curve(values, steps), where="post", **line)
            points = fixed if task == MEAN else fixed[fixed["task"] == task]
            kept = points.assign(right=right(points)).groupby(["epsilon", "task"])["right"].mean()
            accuracies = kept.groupby("epsilon").mean()
            if len(accuracies):
                like = look(_FIXED)
                mark: Any = {"color": like.colour, "marker": like.marker, "ms": 3, "ls": ""}
                axes.plot(accuracies.index, accuracies, label=_FIXED, **mark)
            epsilon_axis(axes, ticks[(ticks >= shortest) & (ticks <= largest)], shortest, 0.3)
            axes.set(xlim=(0, largest * 1.05), ylim=(0, 1.03), yticks=np.arange(0, 1.01, 0.25))
        drawn.supxlabel(f"epsilon{unit.name}")
        of_score = "" if score == critical.ACC else f" ({score})"
        drawn.supylabel(f"share of questions still right{of_score}")
        legend(drawn, handles(axes))
    return drawn


def tables(
    samples: pd.DataFrame, score: str = critical.ACC
) -> dict[str, tuple[Cells, pd.DataFrame]]:
    """The tables of a run by their titles, as text and as frames; empty without critical epsilons.

    Args:
        samples: the result of `critical.of_score`.
        score: the result of `critical.score_of`.
    """
    curves, foretold = critical.robustness(samples), critical.foretold(samples)
    if curves.empty:
        return {}
    text = _curves(curves, critical.against_fixed(samples), critical.stalled(samples), score)
    written = {CURVES: (text, curves.rename(columns={critical.ACC: score}))}
    if not foretold.empty and foretold["value"].notna().any():
        written[FORETOLD] = _foretold(foretold, score), foretold
    return written


def save(written: Mapping[str, tuple[Cells, pd.DataFrame]], folder: Path) -> None:
    """Writes `critical.csv`, `foretold.csv` and `critical.md` into `folder`.

    Args:
        written: the result of `tables`. If it is empty, nothing is written.
        folder: the folder of the run.
    """
    for title, name in ((CURVES, "critical"), (FORETOLD, "foretold")):
        if title in written:
            write_text(folder / f"{name}.csv", csv(written[title][1]))
    texts = {title: cells for title, (cells, _) in written.items()}
    if texts:
        parts = [f"{title.capitalize()}\n\n{cells.markdown()}" for title, cells in texts.items()]
        write_text(folder / "critical.md", "\n".join(parts))


def _curves(
    frame: pd.DataFrame, beside: pd.DataFrame, stalled: Mapping[str, str], score: str
) -> Cells:
    rows = [
        [
            row["task"],
            row["condition"],
            f"{row['n']}",
            f"{row['acc']:.3f}",
            _with_interval(row, "median", ".3g"),
            _with_interval(row, "area", ".3f"),
            f"{row['censored']}{STALLED * (row['condition'] in stalled and row['censored'] > 0)}",
        ]
        for row in frame.to_dict("records")
    ]
    notes = [
        "median: epsilon at which half of the clean accuracy is left; area: mean accuracy over"
        " all epsilons up to the largest one (95 % bootstrap interval)",
        "beyond: questions that stay right at every epsilon up to the largest one",
        *(f"{STALLED} {condition}: {text}" for condition, text in stalled.items()),
    ]
    if score != critical.ACC:
        notes.append(f"all accuracies here are {score}, which also judges critical epsilons")
    notes += [
        f"accuracy at {row['epsilon']:.3g}: {row['curve']:.3f} on the curve of {row['condition']},"
        f" {row['acc']:.3f} under {row['fixed']}"
        for row in beside.to_dict("records")
        if row["attack"] == _FIXED
    ]
    clean = "clean" if score == critical.ACC else f"clean {score}"
    return Cells(["task", "condition", "n", clean, "median", "area", "beyond"], rows, notes)


def _foretold(frame: pd.DataFrame, score: str) -> Cells:
    together = frame[frame["task"] == critical.ALL]
    names = list(frame["predictor"].unique())
    rows = []
    for (condition, measure), group in together.groupby(["condition", "measure"], sort=False):
        if group["value"].isna().all():
            continue
        by_predictor = {row["predictor"]: row for row in group.to_dict("records")}
        cells = [_with_interval(by_predictor[name], "value", ".3f") for name in names]
        rows.append([condition, measure, f"{group['n'].iloc[0]}", *cells])
    notes = [
        "questions of all tasks that are right without an attack (95 % bootstrap interval)",
        "first_order: margin divided by the dual norm of its gradient; margin: log-likelihood of"
        " the right choice minus the best wrong one; cosine: negative absolute cosine of"
        " embeddings and gradient",
        "spearman: rank correlation with the critical epsilon; auroc: questions that become wrong"
        " against questions that stay right",
    ]
    if score != critical.ACC:
        notes.append(f"right, and the margin: by {score}")
    return Cells(["condition", "measure", "n", *names], rows, notes)


def _with_interval(row: dict[Any, Any], name: str, form: str) -> str:
    low, high = (row.get(f"{name}_{end}", row.get(end)) for end in ("low", "high"))
    if pd.isna(row[name]):
        return "–"
    return f"{row[name]:{form}} ({low:{form}} to {high:{form}})".replace("inf", "∞")
