"""`perturbations.html`: each token of a question, its perturbation, and the effect.

The page is `perturbations.html.j2` with the style of `page.css`. Files beside it hold the
questions, several in each. A script loads the file of the question that is shown. This also works
if a browser opens the page from a disk. The script gets only compressed data from the file. The
content security policy allows our script, and the files that it loads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llm_attack.base.record import write_text
from llm_attack.suite.analysis import perturbations
from llm_attack.suite.analysis.perturbations import FOLDER, Perturbations
from llm_attack.suite.report.page import PERTURBATIONS, hashed, packed, page_template

PAGES = "pages"
_HERE = Path(__file__).parent
_NUMBERS = 60_000  # tokens times conditions in a file: about half a megabyte
_SHOWN = 90  # characters of a question in the list
_DIGITS = 4


def write_page(folder: Path, samples: pd.DataFrame, questions: pd.DataFrame, model: str) -> bool:
    """Writes the page of a run's saved perturbations, if there are any.

    Args:
        folder: the folder of the run.
        samples: a row per question and condition.
        questions: a row per question.
        model: name of the model.

    Returns:
        Whether the run has saved perturbations.

    Raises:
        UsageError: a file of perturbations cannot be read.
    """
    from markupsafe import Markup

    tasks = perturbations.tasks_in(folder)
    if not tasks:
        return False
    order = list(dict.fromkeys(questions["task"]))
    tasks.sort(key=lambda task: order.index(task) if task in order else len(order))
    index: list[list[Any]] = []
    conditions: list[str] = []
    number = 0
    for i, task in enumerate(tasks):
        of_task = _Task(folder, task, samples, questions)
        conditions += [name for name in of_task.conditions if name not in conditions]
        for piece in of_task.pieces():
            _write_piece(folder, number, piece)
            index += [[i, q["id"], _line(q), number, q["right"]] for q in piece]
            number += 1
    for old in sorted((folder / FOLDER / PAGES).glob("*.js")):
        if int(old.stem) >= number:
            old.unlink()
    style = (_HERE / "page.css").read_text("utf-8")
    style += (_HERE / "perturbations.css").read_text("utf-8")
    script = (_HERE / "perturbations.js").read_text("utf-8")
    page = page_template(f"{PERTURBATIONS}.j2").render(
        model=model,
        tasks=tasks,
        conditions=conditions,
        count=len(index),
        data=packed({"tasks": tasks, "index": index, "folder": f"{FOLDER}/{PAGES}"}),
        style=Markup(style),
        script=Markup(script),
        style_hash=hashed(style),
        script_hash=hashed(script),
    )
    write_text(folder / PERTURBATIONS, page.encode("utf-8", "replace").decode("utf-8"))
    return True


def _write_piece(folder: Path, number: int, piece: Sequence[Mapping[str, Any]]) -> None:
    """Writes a file that passes its questions to the page's script."""
    data = {f"{q['task']}/{q['id']}": q for q in piece}
    text = f'perturbations({number}, "{packed(data)}");\n'
    write_text(folder / FOLDER / PAGES / f"{number}.js", text)


def _line(question: Mapping[str, Any]) -> str:
    """A question in one line, for the list."""
    text = " ".join((question["question"] or question["choices"][0]).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"


class _Section(NamedTuple):
    """Tokens that belong to the same choices.

    Attributes:
        choices: numbers of the choices; empty for a request that is no choice.
        rows: rows of the tokens.
    """

    choices: list[int]
    rows: list[int]


class _Task:
    """The questions of a task in the form that the page shows.

    Args:
        folder: the folder of the run.
        task: name of the task.
        samples: the samples of the run.
        questions: the questions of the run.
    """

    def __init__(
        self, folder: Path, task: str, samples: pd.DataFrame, questions: pd.DataFrame
    ) -> None:
        self.task = task
        self.conditions = perturbations.conditions_in(perturbations.opened(folder, task))
        self.found = {c: perturbations.read(folder, task, c) for c in self.conditions}
        self.questions = questions[questions["task"] == task]
        self.answers = _answers(samples[samples["task"] == task], self.conditions)
        self.numbers = {name: _Numbers.of(of) for name, of in self.found.items()}

    @property
    def one(self) -> Perturbations:
        """The perturbations of any condition, for what all conditions share."""
        return self.found[self.conditions[0]]

    def pieces(self) -> Iterator[list[dict[str, Any]]]:
        """Yields the questions of each file."""
        piece: list[dict[str, Any]] = []
        size = 0
        where = _requests_of(self.one.doc_id)
        for question in self.questions.to_dict("records"):
            piece.append(self._question(question, where[question["doc_id"]]))
            size += len(self.conditions) * len(piece[-1]["tokens"])
            if size > _NUMBERS:
                yield piece
                piece, size = [], 0
        if piece:
            yield piece

    def _question(self, question: Mapping[str, Any], requests: range) -> dict[str, Any]:
        one, n = self.one, question["n_choices"]
        rows_of = [one.row[one.start[r] : one.start[r + 1]] for r in requests]
        tokens_of = [one.tokens[one.start[r] : one.start[r + 1]] for r in requests]
        token = {
            row: token
            for rows, tokens in zip(rows_of, tokens_of, strict=True)
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)
            if row >= 0
        }
        rows = sorted(token)
        place = {row: i for i, row in enumerate(rows)}
        units = list(dict.fromkeys(one.unit[requests.start : requests.stop].tolist()))
        sections = [
            [[s.choices, [place[row] for row in s.rows]] for s in _sections(rows_of, of_unit, n)]
            for of_unit in (
                [i for i, r in enumerate(requests) if one.unit[r] == unit] for unit in units
            )
        ]
        of_conditions = {
            name: numbers.of_rows(rows, units) for name, numbers in self.numbers.items()
        }
        ids = {*token.values(), *(i for of in of_conditions.values() for i in of["nearest"])}
        answers, texts = self.answers.get(question["doc_id"], {}), one.texts
        return {
            "task": self.task,
            "id": question["doc_id"],
            "question": "" if pd.isna(question["question"]) else str(question["question"]),
            "choices": [str(choice) for choice in question["choices"]],
            "gold": [int(g) for g in question["gold"]],
            "tokens": [token[row] for row in rows],
            "units": sections,
            "texts": {i: texts.get(i, "") for i in sorted(ids - {-1})},
            "conditions": of_conditions,
            "answers": answers,
            "right": {name: int(p in question["gold"]) for name, (p, _) in answers.items()},
        }


def _answers(samples: pd.DataFrame, conditions: Sequence[str]) -> dict[Any, dict[str, list[Any]]]:
    """The prediction and the log-likelihood of each choice, by question and condition."""
    asked = samples[samples["condition"].isin(["none", *conditions])]
    columns = ("doc_id", "condition", "prediction", "log_likelihoods")
    found: dict[Any, dict[str, list[Any]]] = {}
    for doc_id, name, prediction, values in zip(*(asked[c] for c in columns), strict=True):
        found.setdefault(doc_id, {})[name] = [int(prediction), [_one(x) for x in values]]
    return found


class _Numbers(NamedTuple):
    """The rounded numbers of each row, and the loss of each unit."""

    norm: list[float | None]
    nearest: list[int]
    distance: list[float | None]
    share: list[float | None]
    loss: list[list[float]]

    @classmethod
    def of(cls, found: Perturbations) -> _Numbers:
        parts = [_short(part) for part in (found.norm, found.distance, found.share)]
        loss = [[_one(x) for x in pair] for pair in found.loss.tolist()]
        return cls(parts[0], found.nearest.tolist(), parts[1], parts[2], loss)

    def of_rows(self, rows: Sequence[int], units: Sequence[int]) -> dict[str, Any]:
        """The numbers of these rows and units."""
        of_rows = {name: [getattr(self, name)[row] for row in rows] for name in self._fields[:-1]}
        return {**of_rows, "loss": [self.loss[unit] for unit in units]}


def _one(x: float) -> Any:
    return round(x, _DIGITS) if np.isfinite(x) else None


def _short(values: NDArray[Any]) -> list[float | None]:
    """Rounds to four digits; None for values that are not finite."""
    wide = np.asarray(values, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.floor(np.log10(np.abs(wide)))
        factor = 10.0 ** (_DIGITS - 1 - np.where(np.isfinite(size), size, 0))
        short = np.round(wide * factor) / factor
    return [float(f"{x:.{_DIGITS}g}") if np.isfinite(x) else None for x in short.tolist()]


def _requests_of(doc_ids: NDArray[Any]) -> dict[Any, range]:
    """The requests of each question, which follow each other."""
    found, start = {}, 0
    for doc_id, group in groupby(doc_ids.tolist()):
        end = start + len(list(group))
        found[doc_id] = range(start, end)
        start = end
    return found


def _sections(rows_of: Sequence[NDArray[Any]], requests: Sequence[int], n: int) -> list[_Section]:
    """The rows of a perturbation in the order of tokens, by the choices that contain them."""
    owners: dict[int, list[int]] = {}
    for request in requests:
        for row in rows_of[request].tolist():
            if row >= 0:
                owners.setdefault(row, []).append(request)
    sections = []
    for of, rows in groupby(sorted(owners), key=lambda row: tuple(owners[row])):
        sections.append(_Section([i for i in of if i < n], list(rows)))
    return sections
