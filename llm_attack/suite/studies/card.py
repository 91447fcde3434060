"""Cards: the result of a standard for one model as one JSON file. Boards consist of cards.

`card.schema.json`, a JSON Schema beside this file, describes the form of a card, and
docs/standard.md the meaning of its fields. The module needs neither torch nor lm-eval.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from llm_attack.base.errors import UsageError, as_path
from llm_attack.base.failures import one_line
from llm_attack.base.folder import check_readable
from llm_attack.base.record import finite
from llm_attack.lm.standard import STANDARDS, Standard
from llm_attack.suite.analysis.conditions import STANDARD, Condition
from llm_attack.suite.analysis.flags import failed
from llm_attack.suite.analysis.outcomes import BROKEN_BY
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.results import Result
from llm_attack.suite.studies.plausible import VERSION, fault_of_author, faults, identity, read

FILE = "card.json"
_DIGITS = 12  # significant digits, which stay equal between releases of the libraries
_LARGEST = 2**25  # bytes of a card at most
_HASHED = ("weights", "config", "tokenizer", "dtype")


def of_result(
    result: Result, name: str | None = None, link: str | None = None, source: str = "run"
) -> dict[str, Any]:
    """The card of a finished run.

    Args:
        result: the run.
        name: name of the person or group that submits the card.
        link: an address of them or of the paper.
        source: name of the run in messages.

    Raises:
        UsageError: the standard does not allow the run, or its record is damaged.
    """
    wrong = fault_of_author(name, link)
    if wrong is not None:
        raise UsageError(wrong)
    try:
        reason = refusal(result)
        if reason is not None:
            raise UsageError(f"{source}: {reason}")
        card = _made(result, name, link)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{source}: its record cannot be read ({one_line(error)})") from error
    for line in faults(card):
        raise UsageError(f"{source}: no card can be made ({line})")
    return card


def _made(result: Result, name: str | None, link: str | None) -> dict[str, Any]:
    run, table = result.run, result.table
    mark, settings, versions = run["fingerprint"], run["settings"], run.get("versions") or {}
    model: dict[str, Any] = {"name": str(run["model_name"]), "source": str(run["model"])}
    model |= {"revision": (settings.get("model_args") or {}).get("revision")}
    model |= dict(run.get("of_model") or {"family": None, "parameters": None})
    model |= {key: mark.get(key) for key in _HASHED}
    tasks = _tasks(table, run)
    card = {
        "card_version": VERSION,
        "id": identity(run[STANDARD], model, tasks),
        "standard": run[STANDARD],
        "package": {"name": "llm-attack", "version": versions.get("llm-attack")},
        "git_revision": run.get("git_revision"),
        "date": (run.get("timings") or {}).get("date"),
        "model": model,
        "tasks": tasks,
        "n": sum(task["n"] for task in tasks),
        "limit": settings.get("limit"),
        "clean": _accuracy(result, "none"),
        "robust": [
            _robust(condition, result)
            for condition in result.conditions.values()
            if condition.attack != "none"
        ],
        "checks": run.get("checks") or [],
        "failed_checks": failed(run),
        "warnings": list(run.get("warnings") or ()),
        "hardware": run.get("hardware") or {},
        "seconds": ((run.get("timings") or {}).get("seconds") or {}).get("answers"),
        "versions": versions,
        "settings": settings,
        "submitted_by": {"name": name, "link": link} if name or link else None,
    }
    plain: dict[str, Any] = finite(json.loads(json.dumps(card, default=str)))
    return plain


def refusal(result: Result) -> str | None:
    """The reason why the standard does not allow a run, in one line; None if it does."""
    run = result.run
    standard = STANDARDS.get(str(run.get(STANDARD)))
    if standard is None:
        attacks = ",".join(map(str, run["settings"].get("attacks") or ()))
        return (
            f"the run has attacks={attacks}, and is not of a standard; must be made with"
            " --attacks standard"
        )
    version = standard.version
    if run["settings"].get("allow_missing_weights"):
        return f"allow_missing_weights=True: {version} needs a complete checkpoint"
    if run["fingerprint"].get("sources"):
        return f"the run uses functions of your own, which {version} does not allow"
    wrong = _differing(standard, result.conditions)
    if wrong is not None:
        return wrong
    infinite = [name for name, info in run["attacks"].items() if info.get("not_finite")]
    if infinite:
        return f"{infinite[0]}: answers have a log-likelihood that is not finite"
    others = result.samples.loc[result.samples["score"] != "acc", "task"].unique()
    if len(others):
        return f"{others[0]}: has no acc, which {version} is about"
    return None


def _differing(standard: Standard, conditions: Mapping[str, Condition]) -> str | None:
    """The first condition that is missing or differs from the standard; None if there is none."""
    if "none" not in conditions:
        return f"the run lacks the condition none, which {standard.version} needs"
    found: dict[tuple[Any, ...], Condition] = {}
    for condition in conditions.values():
        if condition.attack != "none":
            amplitude = condition.amplitude
            size = None if amplitude is None else (amplitude.epsilon.number, amplitude.epsilon.unit)
            found[condition.attack, condition.get("norm"), size] = condition
    wanted = {
        (attack, norm, (epsilon.number, epsilon.unit))
        for attack in standard.attacks
        for norm in standard.norms
        for epsilon in standard.epsilons
    }
    for attack, norm, size in sorted(wanted - found.keys(), key=str):
        return f"the run lacks {attack} at {size[0]:g}{size[1]} in {norm}, which is part of it"
    for place, condition in found.items():
        if place not in wanted or condition.get(STANDARD) != standard.version:
            return f"{condition.name} is no condition of {standard.version}"
        for name, value in standard.fixed.items():
            given = condition.get(name)
            if name in ("loss", "seed", "positions", "score") and given not in (None, value):
                return f"{condition.name} has {name}={given}, not {value}"
    return None


def _tasks(table: pd.DataFrame, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, version, size and hash of each task."""
    known, hashes = run.get("tasks") or {}, run["fingerprint"].get("tasks") or {}
    rows = table[(table["condition"] == "none") & (table["task"] != MEAN)]
    return [
        {
            "name": row["task"],
            "version": known.get(row["task"], {}).get("version"),
            "num_fewshot": known.get(row["task"], {}).get("num_fewshot"),
            "n": int(row["n"]),
            "clusters": int(row["clusters"]),
            "baseline": _number(row["baseline"]),
            "questions": hashes.get(row["task"]),
        }
        for row in rows.to_dict("records")
    ]


def _robust(condition: Condition, result: Result) -> dict[str, Any]:
    amplitude = condition.amplitude
    assert amplitude is not None
    robust = {
        "condition": condition.name,
        "attack": condition.attack,
        "norm": amplitude.norm,
        "epsilon": {"number": amplitude.epsilon.number, "unit": amplitude.epsilon.unit},
        **_accuracy(result, condition.name),
    }
    if BROKEN_BY in result.samples:
        rows = result.samples[result.samples["condition"] == condition.name]
        counts = rows[BROKEN_BY].value_counts()
        robust["broken_by"] = {str(name): int(n) for name, n in counts.items()}
    return robust


def _accuracy(result: Result, condition: str) -> dict[str, Any]:
    """Accuracy under a condition: the mean over tasks, and each task's with its questions."""
    rows = result.table[result.table["condition"] == condition].to_dict("records")
    of_tasks = {
        str(row["task"]): {
            end: _number(row[column])
            for end, column in (("value", "acc"), ("low", "acc_low"), ("high", "acc_high"))
        }
        for row in rows
    }
    mean = of_tasks.pop(MEAN)
    samples = result.samples[result.samples["condition"] == condition].sort_values("doc_id")
    right = {
        str(task): {"right": "".join("1" if value > 0 else "0" for value in values)}
        for task, values in samples.groupby("task")["acc"]
    }
    return {
        "accuracy": mean,
        "tasks": {task: part | right[task] for task, part in of_tasks.items()},
    }


def _number(value: Any) -> float | None:
    return None if pd.isna(value) else float(f"{value:.{_DIGITS}g}") + 0.0


def load_card(path: str | Path) -> dict[str, Any]:
    """Reads a card, and checks it by its schema (if jsonschema is installed) and by `faults`.

    Args:
        path: path of the file.

    Raises:
        UsageError: the file cannot be read, or is no card.
    """
    path = as_path("card", path)
    check_readable(path, "card")
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError(f"has more than {_LARGEST:,} bytes")
        card = read(content.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"card={path}: cannot be read ({one_line(error)})") from error
    wrong = faults(card)
    if wrong:
        raise UsageError(f"card={path}: {wrong[0]}")
    checked: dict[str, Any] = card
    return checked
