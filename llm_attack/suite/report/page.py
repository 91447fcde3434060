"""`report.html`: a run as one page that needs no network, for a browser and for print.

The page is `page.html.j2`, its style `page.css`, and its table of questions `page.js`. This module
collects their content. No foreign code can run in the page: text is escaped, and questions are
compressed data. A content security policy allows only these two files and the images in the page,
and no connections.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llm_attack.base.record import write_text
from llm_attack.stats import ALPHA
from llm_attack.suite.analysis import flags
from llm_attack.suite.analysis.conditions import of_run
from llm_attack.suite.analysis.outcomes import ACC, BINARY, CHOICE, with_scores
from llm_attack.suite.analysis.summary import ABOVE, MEAN
from llm_attack.suite.report.tables import OF_SCORES, WARNED, Cells, means, score_of, warned
from llm_attack.suite.report.words import headlines, in_words, of_fixed, strongest

PERTURBATIONS = "perturbations.html"
_HERE = Path(__file__).parent
_KEY = ["task", "doc_id"]
_OF_TEXTS = ("text", "parts_at", "parts_from", "parts_none", "parts_token")
_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}

# Columns of the table of questions: key (in page.js and in links), heading, whether it holds
# numbers, and whether it compares with the clean model.
_COLUMNS = [
    ("task", "Task", False, False),
    ("id", "Id", True, False),
    ("question", "Question", False, False),
    ("gold", "Gold", False, False),
    ("before", "Prediction before", False, True),
    ("after", "Prediction after", False, False),
    ("change", "Flipped", False, True),
    ("value_before", "Score before", True, True),
    ("value_after", "Score after", True, False),
    ("margin_before", "Margin before", True, True),
    ("margin_after", "Margin after", True, False),
    ("margin_change", "Margin change", True, True),
]

# The possible changes of an answer, in the order of sorting; the keys are those of page.js.
_CHANGES = [
    ("lost", "right → wrong"),
    ("gained", "wrong → right"),
    ("moved", "wrong → other wrong"),
    ("swapped", "right → other right"),  # questions with several right choices
    ("same", "no"),
]

_ABREAST = 6  # most conditions of the first table; if there are more, it has one of each attack

# Entries of run.json that are not listed, because the page shows them elsewhere or not at all.
_PLACED = ("command", "attacks", "conditions", "warnings", "fingerprint", "of_tasks")


class Picture(NamedTuple):
    """A figure of the report.

    Attributes:
        title: caption of the figure.
        description: text for readers who cannot see the figure.
        path: an SVG or PNG file, which is copied into the page.
    """

    title: str
    description: str
    path: Path


def write_report(
    folder: Path,
    samples: pd.DataFrame,
    questions: pd.DataFrame,
    table: pd.DataFrame,
    figures: Sequence[tuple[str, str, Path]],
    run: dict[str, Any],
    tables: Mapping[str, Cells] | None = None,
) -> Path:
    """Writes `report.html` into `folder`, whole or not at all; equal input gives equal bytes.

    Args:
        folder: the folder of the run.
        samples: a row per question and condition, with the columns `task, doc_id, condition,
            prediction, log_likelihoods, cosine`. The page has the questions in this order.
        questions: a row per question, with the columns `task, doc_id, question, choices, gold`.
        table: the accuracies (see `in_words`), with `acc_low` and `acc_high`.
        figures: `Picture`s, or tuples of the same parts. The first is shown beside the summary.
        run: the content of `run.json`. `command` (a string, or a list of arguments), `model_name`
            (or `model`), `warnings` (sentences) and `attacks` (settings and diagnostics of each
            condition) have places of their own. The page shows only the hash of the weights of
            `fingerprint`, and lists all other entries.
        tables: more tables, by their titles.

    Returns:
        The path of the report.

    Raises:
        ValueError: `questions` lacks a question of `samples`, or a figure is no SVG or PNG file.
    """
    from markupsafe import Markup

    data = columns(samples, questions)
    attacks = run.get("attacks", {})
    command = run.get("command")
    style, script = ((_HERE / name).read_text("utf-8") for name in ("page.css", "page.js"))
    known = of_run(run, table)
    shown = _abreast(table)
    names = [c for c in data["conditions"] if c != "none"] or data["conditions"]
    page = page_template().render(
        model=run.get("model_name") or run.get("model"),
        warnings=run.get("warnings") or (),
        warned=warned(run.get("warnings") or ()),
        mark=WARNED,
        headlines=headlines(table, known),
        words=[*in_words(table, known), *of_fixed(run)],
        accuracies=_accuracies(table),
        shown=shown,
        measures=_measures(table),
        tables=tables or {},
        statistics={"level": ALPHA, "mean": MEAN, "expected": ABOVE},
        figures=[{"title": t, "alt": d, "source": _data_uri(path)} for t, d, path in figures],
        tasks=data["tasks"],
        conditions=names,
        strongest=strongest(table) or names[0],
        clean="none" in data["conditions"],
        changes=_CHANGES,
        columns=[
            column for column in _COLUMNS if "value" in data or not column[0].startswith("value_")
        ],
        scored="score" in table,
        failed=flags.in_words(run),
        score_notes=OF_SCORES if "score" in table else [],
        count=len(data["id"]),
        data=packed(data),
        command=command if isinstance(command, (str, type(None))) else shlex.join(command),
        attacks=attacks,
        common=_common(attacks),
        settings=_different(attacks),
        run={**{k: v for k, v in run.items() if k not in _PLACED}, **_hash_of_weights(run)},
        perturbations=(folder / PERTURBATIONS).exists(),
        style=Markup(style),
        script=Markup(script),
        style_hash=hashed(style),
        script_hash=hashed(script),
    )
    path = folder / "report.html"
    # text from models and command lines may hold half of a surrogate pair, which is no character
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path


@functools.cache
def page_template(name: str = "page.html.j2") -> Any:
    """The template of a page, for jinja2."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        value=_value, label=lambda key: str(key).replace("_", " "), width=_width
    )
    return environment.get_template(name)


def _width(heading: Sequence[str]) -> str:
    """The class in page.css for this number of columns; it decides when rows become blocks."""
    return next((f"c{most}" for most in (4, 8, 12) if len(heading) <= most), "c99")


def _hash_of_weights(run: dict[str, Any]) -> dict[str, str]:
    known = (run.get("fingerprint") or {}).get("weights")
    return {"hash of weights": known} if known else {}


def columns(samples: pd.DataFrame, questions: pd.DataFrame) -> dict[str, Any]:
    """The questions and their answers, column by column, as page.js reads them.

    Returns:
        `tasks` and `conditions` are names, in the order of `samples`. `task` (index into `tasks`),
            `id`, `question`, `choices`, `gold` (list) and `cosine` have one value per question.
            `prediction` and `log_likelihoods` (lists, rounded to four decimals) have one list per
            condition, with one value per question. So has `value`, the score, if it is not plain
            accuracy. None stands for a value that is missing or not finite. Runs with generated
            texts also have the entries of `_texts`.

    Raises:
        ValueError: `questions` lacks a question of `samples`.
    """
    keys = samples[_KEY].drop_duplicates()
    texts = keys.merge(questions, on=_KEY, validate="one_to_one")
    if len(texts) < len(keys):
        missing = len(keys) - len(texts)
        raise ValueError(
            f"questions: {missing} of {len(keys)} questions of the samples are missing"
        )
    read = [*_KEY, "condition", "prediction", "log_likelihoods", "acc", *_OF_TEXTS]
    answers = samples[[name for name in read if name in samples]]
    of_conditions = {
        str(condition): keys.merge(rows, on=_KEY, how="left", validate="one_to_one")
        for condition, rows in answers.groupby("condition", sort=False)
    }
    scored = with_scores(samples)
    plain = ((scored["score"] == ACC) & (scored["kind"] == CHOICE)).all()
    values = [] if plain else [_finite(rows["acc"]) for rows in of_conditions.values()]
    generated = _texts(of_conditions, texts) if "text" in samples else {}
    tasks = list(dict.fromkeys(texts["task"]))
    number = {task: i for i, task in enumerate(tasks)}
    cosine = samples.groupby(_KEY, sort=False)["cosine"].first().astype(float)
    return {
        "tasks": tasks,
        "conditions": list(of_conditions),
        "task": [number[task] for task in texts["task"]],
        "id": texts["doc_id"].tolist(),
        "question": ["" if pd.isna(text) else str(text) for text in texts["question"]],
        "choices": [[str(choice) for choice in choices] for choices in texts["choices"]],
        "gold": [[int(g) for g in gold] for gold in texts["gold"]],
        "cosine": _finite(cosine),
        "prediction": [
            [None if math.isnan(p) else int(p) for p in rows["prediction"].astype(float)]
            for rows in of_conditions.values()
        ],
        "log_likelihoods": [_lists(rows["log_likelihoods"]) for rows in of_conditions.values()],
        **({"value": values} if values else {}),
        **generated,
    }


def _texts(of_conditions: Mapping[str, pd.DataFrame], texts: pd.DataFrame) -> dict[str, Any]:
    """Generated texts, and their first difference from the text without an attack.

    Returns:
        `target` is the expected answer of each question, or None. `text` and `parts` have one list
            per condition, with one value per question, which is None if nothing was generated.
            `parts` is (number of the first different token, the character where it starts, the
            token without and with the attack).
    """
    names = [*_OF_TEXTS]
    plain = {
        name: rows[names].astype(object).where(rows[names].notna(), None)
        for name, rows in of_conditions.items()
    }
    return {
        "target": [None if pd.isna(target) else str(target) for target in texts["target"]],
        "text": [rows["text"].tolist() for rows in plain.values()],
        "parts": [
            [None if part[0] is None else list(part) for part in rows[names[1:]].values.tolist()]
            for rows in plain.values()
        ],
    }


def _lists(column: pd.Series) -> list[list[float | None] | None]:
    """`_finite` for each list in a column, computed at once; None for a missing list."""
    there = column.notna().tolist()
    lists = column[there].to_list()
    flat = iter(_finite(np.concatenate(lists)) if lists else ())
    lengths = iter(map(len, lists))
    return [list(islice(flat, next(lengths))) if known else None for known in there]


def _finite(values: Iterable[float]) -> list[float | None]:
    """Rounds to four decimals, the precision of float32 log-likelihoods of whole texts."""
    numbers = np.asarray(values, dtype=float)
    # `round` is exact and ten times slower. It is used for values half-way between two results, and
    # for values that are not finite
    with np.errstate(invalid="ignore", over="ignore"):
        rounded: list[float | None] = numbers.round(4).tolist()
        scaled = np.abs(numbers) * 1e4
        sure = np.abs(scaled % 1 - 0.5) > 1e-9 * (1 + scaled)
    for i in np.flatnonzero(~sure):
        x = float(numbers[i])
        rounded[i] = round(x, 4) if math.isfinite(x) else None
    return rounded


def packed(data: dict[str, Any]) -> str:
    """Compressed JSON in base64. It is half as long, and has no special characters of HTML."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("ascii"), compresslevel=5, mtime=0)).decode(
        "ascii"
    )


def _accuracies(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The table of accuracies: a row for each task and the mean, a cell for each condition."""
    return [
        {
            "task": task,
            "score": score_of(rows) if "score" in rows else "",
            "counts": "kind" not in rows or rows["kind"].isin([CHOICE, BINARY]).all(),
            "cells": rows.to_dict("records"),
            "baseline": rows["baseline"].iloc[0],
        }
        for task, rows in table.groupby("task", sort=False)
    ]


def _abreast(table: pd.DataFrame) -> list[str]:
    """The conditions of the first table: all, or the largest epsilon of each attack."""
    rows = table.drop_duplicates("condition")
    if len(rows) > _ABREAST:
        last = rows.sort_values("epsilon", kind="stable").drop_duplicates("attack", keep="last")
        rows = rows[rows["condition"].isin(last["condition"])]
    return list(rows["condition"])


def _measures(table: pd.DataFrame) -> Cells:
    """Further measurements over all tasks: a row for each condition."""
    columns = means(table)
    rows = [[str(c), *(columns[name][c] for name in columns)] for c in table["condition"].unique()]
    return Cells(["condition", *columns], rows, [])


def _common(attacks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that all attacks share, if there are two or more attacks."""
    attacked = [settings for name, settings in attacks.items() if name != "none"]
    if len(attacked) < 2:
        return {}
    return {k: v for k, v in attacked[0].items() if all(k in x and x[k] == v for x in attacked)}


def _different(attacks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The settings and diagnostics that differ between attacks."""
    keys = dict.fromkeys(key for settings in attacks.values() for key in settings)
    named = all(settings.get("condition") == name for name, settings in attacks.items())
    hidden = {*_common(attacks), *(["condition"] if named else [])}  # the names of the rows show it
    return [key for key in keys if key not in hidden]


def _data_uri(path: Path) -> str:
    suffix = Path(path).suffix
    if suffix not in _TYPES:
        raise ValueError(f"figures: {path}: must be a file of type {' or '.join(_TYPES)}")
    content = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    return f"data:{_TYPES[suffix]};base64,{content}"


def hashed(text: str) -> str:
    """The source expression that allows `text` in a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def _value(value: Any) -> str:
    """A setting or a measured number as text."""
    if value is None or value == "":
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value(entry)}" for key, entry in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value)) or "–"
    return str(value)
