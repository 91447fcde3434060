"""Accuracy under roundings of a format: its own, drawn, and the worst within its cells."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from llm_attack.attacks.formats import Format
from llm_attack.attacks.settings import ROUNDINGS, condition_name
from llm_attack.base.record import write_text
from llm_attack.suite.analysis.conditions import FITTED_TO, Conditions
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.report.tables import Cells

TITLE = "accuracy under roundings"
FILE = "roundings.md"


def cells(table: pd.DataFrame, known: Conditions, run: Mapping[str, Any]) -> Cells | None:
    """A row for each task and format; None if no attack stays in cells.

    Args:
        table: the result of `summarise`.
        known: the conditions of the run.
        run: the content of `run.json`.
    """
    units = dict.fromkeys(known[name].get("epsilon_unit") for name in known)
    formats = [unit for unit in units if Format.known(unit)]
    if not formats:
        return None
    infos: Mapping[str, Any] = run.get("attacks") or {}
    names = [name for name in ROUNDINGS if name in set(table["attack"])]
    rows = []
    if table["task"].nunique() == 2:  # one task and its mean
        table = table[table["task"] != MEAN]
    groups = table.groupby("task", sort=False)
    for task, group, name in ((*of_task, name) for of_task in groups for name in formats):
        accuracy = group.drop_duplicates("condition").set_index("condition")["acc"]
        conditions = {attack: condition_name(attack, name) for attack in names}
        of = [info for c in conditions.values() if (info := infos.get(c))]
        size = float(of[0].get("embedding_rms") or of[0].get("hookpoint_rms")) if of else 0.0
        row = [str(task), name, f"{group['n'].iloc[0]}"]
        row += [_number(of[0].get("half_cell_rms"), size) if of else "–"]
        row += [_number(of[0].get("rounding_rms"), size) if of else "–"]
        row += [_number(accuracy.get(c), 1.0, ".3f") for c in ("none", *conditions.values())]
        worst = infos.get(condition_name("worst_rounding", name)) or {}
        rows.append([*row, _number(worst.get("rounding_cosine"), 1.0, ".3f")])
    heading = ["task", "format", "n", "half cell, RMS", "error, RMS", "clean", *names, "cosine"]
    notes = [
        "half cell: half the width of a rounding cell; error: change by the format's own rounding;"
        " both are root mean squares over the coordinates, in units of the RMS of the embeddings",
        "rounding: every coordinate as the format rounds it; random_rounding: at the lower or upper"
        " end of its cell, drawn; fgsm_rounding: at the end to which the gradient's sign points;"
        " worst_rounding: the point of the cells with the greatest loss that was found",
        f"tied_rounding: one table of embeddings for all questions, fitted to {_fitted_to(run)}",
        "tied_random_rounding: one table, with each coordinate at the lower or upper end of its"
        " cell, drawn",
        "cosine: between the format's own rounding errors and the way of worst_rounding from the"
        " middle of the cells; 0 for errors that have nothing to do with it",
    ]
    return Cells(heading, rows, [note for note in notes if _about(note, names)])


def _fitted_to(run: Mapping[str, Any]) -> str:
    """The questions to which tables were fitted, in words."""
    fitted_to = run.get(FITTED_TO) or {}
    if "half" in fitted_to:
        return f"{fitted_to['questions']} questions of the other half"
    return "these questions"


def _about(note: str, names: Collection[str]) -> bool:
    """Whether a note is about attacks of the run."""
    kind, _, _ = note.partition(":")
    return not kind.startswith("tied") or any(name.startswith(kind) for name in names)


def save(shown: Cells | None, folder: Path) -> None:
    """Writes `roundings.md`; nothing without attacks in cells."""
    if shown is not None:
        write_text(folder / FILE, f"{TITLE.capitalize()}\n\n{shown.markdown()}")


def _number(value: Any, size: float, form: str = ".2g") -> str:
    return "–" if value is None or pd.isna(value) or not size else format(value / size, form)
