"""A CSV file to which every run adds a row for each of its conditions."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from llm_attack.base.errors import UsageError
from llm_attack.base.folder import claim_file
from llm_attack.base.record import without_formulas, write_text
from llm_attack.suite.analysis.conditions import Condition
from llm_attack.suite.analysis.flags import FAILED, in_words
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.report import tables
from llm_attack.suite.results import Result
from llm_attack.suite.studies.models import across

_FIRST = ["model", "weights", "tasks", "n", "loss", "positions", "hookpoint", "condition"]
_USED = ("llm-attack", "torch", "transformers", "lm-eval")
# The last columns identify a row. Rows of earlier versions lack them, or the failed checks.
_KEY = "identity"
_NEW = ["settings", FAILED, _KEY]
_LACKING: tuple[tuple[str, ...], ...] = ((), (FAILED,), (*_NEW,))  # by the latest, and earlier ones
# The parts of a run's fingerprint that decide its numbers, besides the conditions: the model and
# the questions.
_OF_MODEL = ("weights", "config", "tokenizer", "dtype", "model_args", "tasks")
_PATIENCE = 60.0  # seconds to wait for another process that writes


def entries(runs: Mapping[str, Result]) -> pd.DataFrame:
    """Rows of a leaderboard: for each model and condition the mean over all tasks of its run.

    Columns: `model`, `weights` (their hash), `tasks`, `n`, `loss`, `positions`, `hookpoint`,
    `condition`, `epsilon_relative`, and accuracies, drops and p-values with their intervals, as in
    `across`. `versions` has this package, torch, transformers and lm-eval. `settings` are all that
    the condition's numbers depend on. `failed_checks` is empty unless the run is of a standard.
    `identity` is a hash of the settings, the model and the questions.
    """
    parts = []
    for name, result in runs.items():
        known, plan, mark = result.conditions, result.run["settings"], result.run["fingerprint"]
        named = tables.named_by_score(result.table[result.table["task"] != MEAN])
        rows = across({name: result})
        conditions = [known[condition] for condition in rows["condition"]]
        versions = result.run.get("versions", {})
        parts.append(
            rows.assign(
                weights=mark.get("weights", ""),
                tasks=",".join(named["task"].unique()),
                loss=plan.get("loss"),
                positions=plan.get("positions", "all"),
                hookpoint=[condition.get("hookpoint") for condition in conditions],
                versions=" ".join(f"{name}={versions.get(name, '')}" for name in _USED),
                settings=[
                    " ".join(f"{k}={v}" for k, v in condition.values) for condition in conditions
                ],
                **{FAILED: in_words(result.run)},
                identity=[_identity(name, mark, condition) for condition in conditions],
            )
        )
    frame = pd.concat(parts, ignore_index=True)
    # names of tasks contain the score, so all leaderboards have the same columns
    rest = [name for name in frame if name not in (*_FIRST, "versions", "score", *_NEW)]
    return frame[[*_FIRST, *rest, "versions", *_NEW]]


def _identity(model: str, mark: Mapping[str, Any], condition: Condition) -> str:
    of_model = {name: mark.get(name) for name in _OF_MODEL}
    whole = ["" if mark.get("weights") else model, of_model, condition.settings()]
    text = json.dumps(whole, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check(path: Path, runs: Mapping[str, Result]) -> None:
    """Raises `UsageError` if `add` would; writes nothing."""
    _with(path, entries(runs))


def add(path: Path, runs: Mapping[str, Result]) -> None:
    """Appends the rows of `runs`. Rows of the same model, questions and condition are replaced.

    Processes that write at the same time wait for each other.

    Args:
        path: path of the file; it need not exist.
        runs: runs by the names of the models.

    Raises:
        UsageError: the file is no leaderboard, or another process keeps it locked.
    """
    new = entries(runs)
    _with(path, new)  # before anything is written, even a lock
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    if lock.is_symlink() or (lock.exists() and (not lock.is_file() or lock.stat().st_size)):
        raise UsageError(
            f"leaderboard={path}: {lock} is not a lock of llm-attack; must be moved away"
        )
    try:
        with FileLock(lock, timeout=_PATIENCE):
            write_text(path, _with(path, new))
    except Timeout:
        raise UsageError(
            f"leaderboard={path}: another process has held {lock} for {_PATIENCE:g} s; try again"
            " when it has ended"
        ) from None


def _with(path: Path, new: pd.DataFrame) -> str:
    """The content of the file at `path` with the new rows at its end."""
    text = tables.csv(new)
    heading, *rows = _rows(text)
    there = _there(path, heading)
    replacing = {row[-1]: row for row in rows}  # of two equal rows, the last counts
    kept = [row for row in there if row[-1] not in replacing]
    if kept:  # others may have written into these rows
        frame = pd.DataFrame(kept, columns=heading)
        texts = [*_FIRST, "versions", *_NEW]
        kept = frame.assign(**without_formulas(frame[texts])).to_numpy().tolist()
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows([heading, *kept, *replacing.values()])
    return file.getvalue()


def _there(path: Path, heading: list[str]) -> list[list[str]]:
    """The rows of the file at `path`; empty in the columns that earlier versions lack."""
    headings = [[name for name in heading if name not in lacking] for lacking in _LACKING]
    there = next((known for known in headings if _is(path, known)), heading)
    claim_file(path, ",".join(there), "a leaderboard", "leaderboard")
    if not path.exists():
        return []
    try:
        rows = _rows(path.read_text("utf-8"))
        fault = next((i for i, row in enumerate(rows, 1) if len(row) != len(rows[0])), None)
        if fault is not None:
            raise ValueError(f"row {fault} has {len(rows[fault - 1])} cells, not {len(rows[0])}")
    except (ValueError, csv.Error) as error:  # ValueError includes text that is not UTF-8
        raise UsageError(
            f"leaderboard={path}: cannot be read ({error}); must be a CSV file that"
            " `compare --leaderboard` wrote"
        ) from None
    named = [dict(zip(there, row, strict=True)) for row in rows[1:]]
    return [[row.get(name, "") for name in heading] for row in named]


def _is(path: Path, heading: list[str]) -> bool:
    """Whether a file begins with a heading."""
    if not path.is_file():  # a pipe would make the reader wait
        return False
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.readline() == ",".join(heading) + "\n"
    except OSError:
        return False


def _rows(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline=""), strict=True))
