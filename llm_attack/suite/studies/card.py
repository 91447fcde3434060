"""Cards: the result of a standard for one model as one JSON file. Boards consist of cards.

`card.schema.json`, a JSON Schema beside this file, describes the form of a card, and
docs/standard.md the meaning of its fields. The module needs neither torch nor lm-eval.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from llm_attack.base.errors import UsageError, as_path
from llm_attack.base.failures import one_line
from llm_attack.base.record import finite
from llm_attack.lm.standard import STANDARDS, Standard
from llm_attack.suite.analysis.conditions import STANDARD, Condition
from llm_attack.suite.analysis.flags import failed
from llm_attack.suite.analysis.outcomes import BROKEN_BY
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.results import Result

FILE = "card.json"
SCHEMA = Path(__file__).parent / "card.schema.json"
VERSION = 1  # raised if a field is removed or changes its meaning; new fields do not raise it

_DIGITS = 12  # significant digits, which stay equal between releases of the libraries
_TIES = 0.01  # of the questions; a plausible card may have so many with equal scores
_OF_MODEL = ("weights", "config", "tokenizer", "dtype")


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
        UsageError: the standard does not allow the run.
    """
    reason = refusal(result)
    if reason is not None:
        raise UsageError(f"{source}: {reason}")
    run, table = result.run, result.table
    mark, settings, versions = run["fingerprint"], run["settings"], run.get("versions") or {}
    model: dict[str, Any] = {"name": str(run["model_name"]), "source": str(run["model"])}
    model |= {"revision": (settings.get("model_args") or {}).get("revision")}
    model |= dict(run.get("of_model") or {"family": None, "parameters": None})
    model |= {key: mark.get(key) for key in _OF_MODEL}
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


def identity(version: str, model: Mapping[str, Any], tasks: list[dict[str, Any]]) -> str:
    """A hash of the standard, the model and the questions."""
    of_model = [model.get(key) for key in _OF_MODEL]
    questions = [[task["name"], task["questions"], task["n"]] for task in tasks]
    text = json.dumps([version, of_model, questions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"card={path}: cannot be read ({one_line(error)})") from error
    wrong = faults(card)
    if wrong:
        raise UsageError(f"card={path}: {wrong[0]}")
    checked: dict[str, Any] = card
    return checked


def faults(card: Any) -> list[str]:
    """The faults of a card, a line each. If its form is wrong, only the first fault of the form.

    Beyond the form, the identity must match the content, the numbers must fit each other, and every
    condition of the standard must be there.
    """
    form = _fault_of_form(card)
    if form is not None:
        return [form]
    lines = []
    if card["id"] != identity(card["standard"], card["model"], card["tasks"]):
        lines.append("id: is not the hash of its standard, model and questions")
    if card["n"] != sum(task["n"] for task in card["tasks"]):
        lines.append("n: is not the sum over its tasks")
    standard = STANDARDS[card["standard"]]
    wanted = {
        (a, n, e.number)
        for a in standard.attacks
        for n in standard.norms
        for e in standard.epsilons
    }
    found = [(row["attack"], row["norm"], row["epsilon"]["number"]) for row in card["robust"]]
    if sorted(found) != sorted(wanted):
        lines.append(f"robust: must have the {len(wanted)} conditions of {standard.version}")
    if set(card["failed_checks"]) != set(failed(card)):
        lines.append("failed_checks: are not those that its checks name")
    for row in ({"condition": "none", **card["clean"]}, *card["robust"]):
        lines += [f"{row['condition']}: {text}" for text in _implausible(row, card)]
    return lines


def _fault_of_form(card: Any) -> str | None:
    if not isinstance(card, dict) or card.get("card_version") != VERSION:
        return f"must be a card of llm-attack, with card_version {VERSION}"
    if card.get("standard") not in STANDARDS:
        return f"standard={card.get('standard')}: must be one of {', '.join(STANDARDS)}"
    if find_spec("jsonschema") is not None:
        validator: Any = import_module("jsonschema").Draft202012Validator
        schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
        for error in validator(schema).iter_errors(card):
            place = ".".join(map(str, error.absolute_path)) or "card"
            return f"{place}: {error.message.splitlines()[0]}"
    return None


def _implausible(row: Mapping[str, Any], card: Mapping[str, Any]) -> list[str]:
    """Impossible values of an accuracy: its interval, counts, mean, and the questions that fell."""
    lines = []
    of_tasks = {task["name"]: task["n"] for task in card["tasks"]}
    if row["tasks"].keys() != of_tasks.keys():
        return ["its tasks are not those of the card"]
    for name, part in {"mean": row["accuracy"], **row["tasks"]}.items():
        if not 0 <= part["low"] <= part["value"] <= part["high"] <= 1:
            lines.append(f"{name}: the interval does not hold its accuracy")
    for name, n in of_tasks.items():
        right, value = row["tasks"][name]["right"], row["tasks"][name]["value"]
        if len(right) != n or abs(right.count("1") / n - value) > 1e-9:
            lines.append(f"{name}: the accuracy is not that of its {n} questions")
    mean = sum(part["value"] for part in row["tasks"].values()) / len(row["tasks"])
    if abs(mean - row["accuracy"]["value"]) > 1e-9:
        lines.append("the accuracy is not the mean of its tasks")
    broken = row.get("broken_by")
    if broken is not None:
        pairs = [
            pair
            for name, part in card["clean"]["tasks"].items()
            for pair in zip(part["right"], row["tasks"][name]["right"], strict=False)
        ]
        lost = pairs.count(("1", "0"))
        # these may include an answer that was wrong only by rounding
        if abs(sum(broken.values()) - lost) > _TIES * card["n"]:
            lines.append(f"broken_by: names {sum(broken.values())} questions, but {lost} fell")
    return lines
