"""`summary.json`: a run in numbers, for programs.

It has a row per task and condition, and rows for the mean over tasks. `summary.schema.json`, a JSON
Schema beside this file, describes its form, and docs/numbers.md the meaning of the fields. The same
run gives equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from llm_attack.base.record import write_json
from llm_attack.stats import ALPHA
from llm_attack.suite.analysis.conditions import Conditions
from llm_attack.suite.analysis.flags import CHECKS, FAILED, failed
from llm_attack.suite.analysis.outcomes import ACC, BINARY, CHOICE, HIGHER
from llm_attack.suite.analysis.summary import MEAN, SEVERAL

FILE = "summary.json"
SCHEMA = Path(__file__).parent / "summary.schema.json"
VERSION = 1  # raised if a field is removed or changes its meaning; new fields do not raise it

_DIGITS = 12  # significant digits, which stay equal between releases of the libraries

MCNEMAR = "McNemar, exact"
SIGNS = "signs of clusters, exact"
RANDOMIZATION = "Fisher's randomization test of paired differences"
STRATIFIED = "signs of clusters, stratified by task"


def save(table: pd.DataFrame, folder: Path, run: Mapping[str, Any], known: Conditions) -> None:
    """Writes `summary.json`, whole or not at all.

    Args:
        table: the result of `summarise`.
        folder: the folder of the run.
        run: the content of `run.json`.
        known: the conditions of the run.
    """
    write_json(folder / FILE, content(table, run, known))


def content(table: pd.DataFrame, run: Mapping[str, Any], known: Conditions) -> dict[str, Any]:
    """The content of `summary.json`; see `save` for the arguments."""
    mark, versions = run.get("fingerprint") or {}, run.get("versions") or {}
    return {
        "schema_version": VERSION,
        "package": {"name": "llm-attack", "version": versions.get("llm-attack")},
        "git_revision": run.get("git_revision"),
        "date": (run.get("timings") or {}).get("date"),
        "model": {
            "name": str(run.get("model_name") or run.get("model")),
            "weights": mark.get("weights"),
            "dtype": mark.get("dtype"),
        },
        "settings": run["settings"],
        "conditions": {
            name: known[name].settings() for name in table["condition"].unique() if name in known
        },
        **({"texts": run["texts"]} if "texts" in run else {}),
        "level": 1 - ALPHA,
        **({CHECKS: run[CHECKS]} if CHECKS in run else {}),
        "results": [
            _row(row) | ({FAILED: failed(run)} if CHECKS in run else {})
            for row in table.to_dict("records")
        ],
    }


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    drop = None
    if _number(row["drop"]) is not None:
        drop = {
            **_ends(row, "drop"),
            "test": _test(row),
            "p": _number(row["p_mcnemar"]),
            "p_holm": _number(row["p_mcnemar_holm"]),
            "detectable": _number(row["detectable"]),
        }
    mixed = row.get("score") == SEVERAL and pd.isna(row.get("kind"))
    return {
        "task": None if row["task"] == MEAN else str(row["task"]),
        "mean_over_tasks": row["task"] == MEAN,
        "condition": str(row["condition"]),
        "attack": str(row["attack"]),
        "epsilon": _number(row["epsilon"]),
        "hookpoint": str(row["hookpoint"]),
        "n": int(row["n"]),
        "clusters": _whole(row["clusters"]),
        "score": str(row.get("score", ACC)),
        "kind": None if mixed else str(row.get("kind", CHOICE)),
        "better": None if mixed else str(row.get("better", HIGHER)),
        "accuracy": _ends(row, "acc"),
        "baseline": _number(row["baseline"]),
        "drop": drop,
        "lost": _whole(row["lost"]),
        "gained": _whole(row["gained"]),
    }


def _test(row: Mapping[str, Any]) -> str:
    """The name of the test behind the p-value of a drop; see `stats.sign_test`."""
    if row["task"] == MEAN:
        return STRATIFIED
    if row.get("kind", CHOICE) not in (CHOICE, BINARY):
        return RANDOMIZATION
    return MCNEMAR if row["clusters"] == row["n"] else SIGNS


def _ends(row: Mapping[str, Any], key: str) -> dict[str, float | None]:
    names = {"value": key, "low": f"{key}_low", "high": f"{key}_high"}
    return {name: _number(row[column]) for name, column in names.items()}


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(f"{value:.{_DIGITS}g}") + 0.0  # no -0


def _whole(value: Any) -> int | None:
    return None if pd.isna(value) else int(value)
