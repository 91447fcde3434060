"""Do perturbations that were found under one model also harm another? A matrix of drops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from llm_attack.base.errors import UsageError
from llm_attack.suite.analysis.drops import differences
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.report.tables import Cells
from llm_attack.suite.results import Result
from llm_attack.suite.studies.models import name_of

PERTURBATION = "perturbation"  # the key in run.json
TITLE = "drop in points: found under (row), scored under (column)"
CONTROL = "drop with shuffled signs"
DIFFERENCE = "difference of the two"
COLUMNS = [
    *("found_under", "found_by", "scored_under", "same_weights", "task", "n", "acc", "acc_fixed"),
    *("drop", "drop_low", "drop_high", "drop_shuffled", "drop_random"),
    *("difference", "difference_low", "difference_high", "p"),
]
_FIXED, _SHUFFLED, _RANDOM = "fixed", "fixed-shuffled", "fixed-random"


def transfers(runs: Mapping[str, Result]) -> pd.DataFrame:
    """The drop of every run under a perturbation that was found before.

    Args:
        runs: finished runs with `perturbation`, by folder.

    Returns:
        A row per run and task; of several tasks, their mean is last. Columns:

        - `found_under`, `found_by`: the model and the condition or kind of the perturbation
        - `scored_under`: the model of the run
        - `same_weights`: whether the two are the same; null if it is not known
        - `task`, `n`: the task, and its number of questions
        - `acc`, `acc_fixed`: accuracy without and with the perturbation
        - `drop`, `drop_low`, `drop_high`: their difference in points, with its paired interval
        - `drop_shuffled`, `drop_random`: drop of the controls
        - `difference`, `_low`, `_high`, `p`: drop minus that with shuffled signs, paired by
          question (`analysis.drops.differences`)

    Raises:
        UsageError: a run has no such perturbation, or two runs are of the same pair of models.
    """
    rows: list[dict[str, Any]] = []
    for folder, result in runs.items():
        rows += _rows(folder, result)
    frame = pd.DataFrame(rows, columns=COLUMNS)
    pair = ["found_under", "found_by", "scored_under", "task"]
    if frame.duplicated(pair).any():
        twice = frame[frame.duplicated(pair)].iloc[0]
        raise UsageError(
            f"transfer: two runs score perturbations of {twice['found_under']}"
            f" ({twice['found_by']}) under {twice['scored_under']}; must be one"
        )
    return frame


def _rows(folder: str, result: Result) -> list[dict[str, Any]]:
    about = result.run.get(PERTURBATION)
    if not isinstance(about, Mapping):
        raise UsageError(f"{folder}: has no fixed perturbation; must be a run with perturbation")
    table = result.table.set_index(["task", "attack"])
    of_control = _against(result, _SHUFFLED).set_index("task")
    tasks = [task for task in of_control.index if task != MEAN or len(of_control) > 2]
    source, here = about.get("weights"), result.run["fingerprint"].get("weights")
    rows = []
    for task in tasks:
        fixed, control = table.loc[(task, _FIXED)], of_control.loc[task]
        ends = {name: control[name] for name in ("difference", "difference_low", "difference_high")}
        rows.append(
            {
                "found_under": about["model"],
                "found_by": about.get("condition") or f"universal, {about.get('share')}",
                "scored_under": name_of(result.run),
                "same_weights": None if source is None else source == here,
                "task": task,
                "n": int(control["n"]),
                "acc": table.loc[(task, "none"), "acc"],
                "acc_fixed": fixed["acc"],
                **{name: fixed[name] for name in ("drop", "drop_low", "drop_high")},
                "drop_shuffled": table.loc[(task, _SHUFFLED), "drop"],
                "drop_random": table.loc[(task, _RANDOM), "drop"],
                **ends,
                "p": control["p"],
            }
        )
    return rows


def _against(result: Result, control: str) -> pd.DataFrame:
    """The drop of the perturbation minus that of a control, as if they were two models."""
    samples = result.samples
    sides = []
    for attack in (control, _FIXED):
        side = samples[samples["attack"].isin(["none", attack])]
        sides.append(side.assign(condition=side["condition"].where(side["attack"] == "none", "x")))
    return differences(sides[0], result.questions, sides[1], result.questions)


def matrices(frame: pd.DataFrame) -> dict[str, Cells]:
    """Matrices by title: drops, those of the control, and their differences.

    They show the mean over tasks, or the only task.

    Args:
        frame: the result of `transfers`.
    """
    whole = frame.groupby(["found_under", "found_by", "scored_under"], sort=False).last()
    by_condition = frame["found_by"].nunique() > 1
    whole = whole.reset_index()
    names = whole["found_under"]
    whole["row"] = names + (", " + whole["found_by"] if by_condition else "")
    n = ", ".join(map(str, sorted(set(whole["n"]))))
    tasks = set(frame["task"]) - {MEAN}
    notes = [
        "drop: points of accuracy lost compared with none (paired 95 % interval)",
        "=: scored under the weights with which it was found",
        f"{n} questions of {', '.join(sorted(tasks))}",
    ]
    beside = ["drop of the first matrix minus drop of the second, paired by question"]
    return {
        TITLE: _matrix(whole, notes, lambda row: _shown(row, "drop", mark=_same(row))),
        CONTROL: _matrix(whole, [], lambda row: f"{row['drop_shuffled'] + 0:.1f}"),
        DIFFERENCE: _matrix(whole, beside, lambda row: _shown(row, "difference", "+")),
    }


def _matrix(whole: pd.DataFrame, notes: Sequence[str], text: Any) -> Cells:
    columns = list(dict.fromkeys(whole["scored_under"]))
    cells: dict[str, dict[str, str]] = {}
    for row in whole.to_dict("records"):
        cells.setdefault(row["row"], {})[row["scored_under"]] = text(row)
    lines = [[name, *(of_row.get(c, "") for c in columns)] for name, of_row in cells.items()]
    return Cells(["found under", *columns], lines, list(notes))


def _same(row: Mapping[Any, Any]) -> str:
    return "=" if row["same_weights"] is True else ""


def _shown(row: Mapping[Any, Any], name: str, sign: str = "", mark: str = "") -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    interval = "" if np.isnan(low) else f" ({low:{sign}.1f} to {high:{sign}.1f})"
    return f"{row[name] + 0:{sign}.1f}{mark}{interval}"  # a drop of -0 is 0
