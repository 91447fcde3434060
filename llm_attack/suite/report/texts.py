"""Tasks without choices in a run: the loss that attacked their texts, and the changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from llm_attack.base.record import write_text
from llm_attack.suite.analysis.outcomes import goodness
from llm_attack.suite.report.tables import Cells

TITLE = "texts under attack"
FILE = "texts.md"
GENERATE = "generate_until"


def cells(samples: pd.DataFrame, run: Mapping[str, Any]) -> Cells | None:
    """The number of texts that each attack changed, and from which token; None without such tasks.

    Args:
        samples: a row per question and condition, as in `samples.parquet`.
        run: the content of `run.json`.
    """
    of_tasks = run.get("texts")
    if not of_tasks:
        return None
    rows, place = [], ["task", "doc_id"]
    good = samples.assign(good=goodness(samples))
    clean = good.loc[good["condition"] == "none", [*place, "good"]]
    paired = good.merge(clean, "left", place, suffixes=("", "_none"))
    attacked = paired[paired["task"].isin(of_tasks) & (paired["attack"] != "none")]
    for (task, condition), group in attacked.groupby(["task", "condition"], sort=False):
        known = group["good_none"].notna().all()
        worse = f"{int((group['good'] < group['good_none']).sum())}" if known else "–"
        generates = known and group["request"].iloc[0] == GENERATE
        changes = _changes(group["parts_at"]) if generates else ["–"] * 3
        rows.append([str(task), str(condition), f"{len(group)}", worse, *changes])
    if not rows:
        return None
    notes = [f"{task} {of_task['attack']}" for task, of_task in of_tasks.items()]
    notes += [
        "worse: texts with a worse score than without an attack",
        "texts changed: they differ from those without an attack; first changed token: number of"
        " the first token that differs, counted from 1, median over the changed texts; middle"
        " half: its quartiles",
    ]
    heading = ["task", "condition", "n", "worse", "texts changed", "first changed token"]
    return Cells([*heading, "middle half"], rows, notes)


def _changes(parts: pd.Series) -> list[str]:
    """The number of changed texts, and the number of the first changed token."""
    at = parts.dropna().astype(float) + 1
    count = f"{len(at)} ({len(at) / len(parts):.0%})"
    if at.empty:
        return [count, "–", "–"]
    low, middle, high = at.quantile([0.25, 0.5, 0.75])
    return [count, f"{middle:g}", f"{low:g} to {high:g}"]


def save(table: Cells | None, folder: Path) -> None:
    """Writes `texts.md` of a run into `folder`, if the run has such tasks."""
    if table is not None:
        write_text(folder / FILE, table.markdown())
