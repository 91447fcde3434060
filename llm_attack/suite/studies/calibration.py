"""Calibration of a run as a table and as a reliability diagram."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from llm_attack.base.drawing import COLOURS
from llm_attack.base.record import write_text
from llm_attack.suite.analysis.calibration import BINS, reliability
from llm_attack.suite.report.layout import handles, legend, panels, print_style
from llm_attack.suite.report.tables import Cells, csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "calibration"
_FEWEST = 10 * BINS  # fewest questions of a diagram; with fewer, chance bends it
_HEADING = ["task", "condition", "n", "accuracy", "confidence", "gap"]
_HEADING += ["ECE", "by chance", "Brier", "fallen", "before", "after"]
_NOTES = [
    "confidence: mean probability of the answered choice, by the likelihoods that acc compares;"
    " gap: confidence less accuracy, above 0 the model is too sure (95 % interval)",
    f"ECE: expected calibration error, of {BINS} bins with equally many questions; by chance: the"
    " ECE that a calibrated model with these confidences would show",
    "Brier: squared distance of the probabilities of all choices from the right answer; 0 is best,"
    " 2 is worst",
    "fallen: questions that are right without an attack and wrong under it; before, after: their"
    " mean confidence in the right answer before, and in the wrong one after",
]


def cells(frame: pd.DataFrame) -> Cells | None:
    """The table as text; None if no question has a confidence.

    Args:
        frame: the result of `analysis.calibration.calibration`.
    """
    if frame.empty:
        return None
    rows = []
    for row in frame.to_dict("records"):
        middle = [_interval(row, name) for name in ("gap", "ece")]
        middle += [_number(row["ece_by_chance"]), _interval(row, "brier")]
        ends = [_number(row[f"fallen_{moment}"]) for moment in ("before", "after")]
        means = [_number(row[name]) for name in ("acc", "confidence")]
        start = [str(row["task"]), str(row["condition"]), f"{row['n']}"]
        rows.append([*start, *means, *middle, f"{row['fallen']}", *ends])
    return Cells(_HEADING, rows, _NOTES)


def _interval(row: dict[Any, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if pd.isna(row[name]) or pd.isna(low):
        return _number(row[name])
    return f"{_number(row[name])} ({_number(low)} to {_number(high)})"


def _number(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.3f}"


def figure(known: pd.DataFrame) -> Figure | None:
    """Reliability diagrams, a panel per condition, all tasks together.

    A point is a bin; all bins have equally many questions. Its coordinates are mean confidence and
    accuracy. Below the diagonal, the model is overconfident. The curve without an attack is grey.
    None if a condition has fewer than 100 questions with a confidence, which is ten in each bin.

    Args:
        known: the result of `analysis.calibration.judged`.
    """
    if known.empty or known["condition"].value_counts().min() < _FEWEST:
        return None
    parts = {name: reliability(rows) for name, rows in known.groupby("condition", sort=False)}
    curves = {
        str(name): ([part.confidence for part in found], [part.accuracy for part in found])
        for name, found in parts.items()
    }
    clean = next(iter(known.loc[known["attack"] == "none", "condition"]), None)
    attacked = [name for name in curves if name != clean]
    with print_style():
        drawn, grid = panels(attacked or [*curves])
        for name, axes in grid.items():
            axes.plot([0, 1], [0, 1], color="k", ls="--", lw=0.7, label="calibrated")
            if clean is not None:
                axes.plot(*curves[clean], color="#8C8C8C", marker="o", ms=3, lw=1, label=clean)
            if name != clean:
                axes.plot(
                    *curves[name], color=COLOURS[0], marker="D", ms=2.5, lw=1, label="under attack"
                )
            axes.set(xlim=(0, 1.03), ylim=(0, 1.03), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        drawn.supxlabel("confidence")
        drawn.supylabel("accuracy")
        legend(drawn, handles(next(iter(grid.values()))))
    return drawn


def save(frame: pd.DataFrame, folder: Path) -> None:
    """Writes `calibration.csv` and `calibration.md` into `folder`, unless the frame is empty."""
    text = cells(frame)
    if text is not None:
        write_text(folder / "calibration.csv", csv(frame))
        write_text(folder / "calibration.md", text.markdown())
