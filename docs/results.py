"""Draws the files that `results/` does not keep, in place: report and figures of each folder.

    python docs/results.py

A run gets all files that `llm-attack report` writes. Comparisons of models and checkpoints, and the
other experiments, get their figures, from their CSV files. Fig. 1 gets none, because its pixels are
not stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from llm_attack.base.drawing import draw
from llm_attack.suite import commands
from llm_attack.suite.report.layout import print_style
from llm_attack.suite.studies import models, revisions
from llm_attack.theory import fig4, fig6, relation
from llm_attack.theory.settings import ToySettings
from llm_attack.vision import fig2, fig5, tradeoff

RESULTS = Path(__file__).parents[1] / "results"


def toy(folder: Path, settings: dict[str, Any]) -> None:
    """Draws Fig. 4."""
    fig4.draw(folder, ToySettings(**settings))


def features(folder: Path, settings: dict[str, Any]) -> None:
    """Draws Fig. 5, and the comparison of all blocks."""
    fig2.draw(folder, settings["width"], settings["at"], settings["epsilon_unit"])
    fig5.draw_splits(folder)


# By the name of the command: functions that draw a folder, given the settings of its record.
FIGURES: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "fig2": lambda folder, settings: fig2.draw(folder, settings["width"]),
    "fig4": toy,
    "fig5": features,
    "fig6": lambda folder, _: fig6.draw(folder),
    "relation": lambda folder, _: relation.draw(folder),
    "tradeoff": lambda folder, _: tradeoff.draw(folder),
}


def compared(path: Path, name: str, figure: Callable[[pd.DataFrame], Figure]) -> None:
    """Draws the figure beside a table of `llm-attack compare` or of revisions."""
    frame = pd.read_csv(path)
    frame["attack"] = frame["condition"].str.partition("@")[0]
    with print_style():
        draw(path.parent, name, lambda: figure(frame))


def main() -> None:
    """Draws all folders, then the figures without their own record."""
    for path in sorted(RESULTS.glob("*/*/run.json")):
        record = json.loads(path.read_text("utf-8"))
        _, kind, name, *_ = record["command"].split()
        if kind == "run":
            commands.report(path.parent, None)
        elif kind == "reproduce" and name in FIGURES:
            FIGURES[name](path.parent, record["settings"])
            print(f"{path.parent}: figures")
    for kind in ("demo", "choice"):
        compared(RESULTS / f"demo/models/{kind}.csv", kind, models.figure)
    for kind in ("sequence", "choice"):  # of the first of three trainings
        compared(RESULTS / f"demo/training/{kind}-1.csv", kind, revisions.figure)


if __name__ == "__main__":
    main()
