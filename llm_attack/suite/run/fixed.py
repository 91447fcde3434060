"""Perturbations that were found before, in a run: their tensors, and the questions they are for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llm_attack.base.errors import UsageError
from llm_attack.base.tensors import TensorFile
from llm_attack.harness.halves import Chosen, fitted_half
from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.requests import Instance
from llm_attack.lm.engine.fixed import Fixed, Stored, Universal
from llm_attack.lm.fixed import DELTA, TOKEN
from llm_attack.lm.network.hook import vocabulary_of
from llm_attack.lm.packing.batches import Batch
from llm_attack.lm.packing.positions import of_question
from llm_attack.lm.packing.questions import Question
from llm_attack.suite.analysis import perturbations as saved
from llm_attack.suite.analysis.perturbations import Perturbations
from llm_attack.suite.plan import Plan
from llm_attack.suite.plan.fixed import ALL, FITTING, chosen_half
from llm_attack.suite.run.rows import grouped
from llm_attack.suite.run.work import Work

FIXED = "perturbation"  # the key in run.json


def chosen(plan: Plan) -> Chosen | None:
    """Says which documents a plan asks; None: all of them."""
    half, key, tasks = chosen_half(plan)
    if half == ALL:
        return None

    def asked(task: str, docs: Sequence[Any]) -> list[bool]:
        divided = tasks is None or task in tasks
        if half == FITTING and not divided:
            raise UsageError(
                f"half={FITTING}: task {task} must be one of the tasks to which the perturbation"
                f" was fitted, {', '.join(tasks or ())}"
            )
        fitted = fitted_half(docs, key) if divided else [False] * len(docs)
        return [in_half == (half == FITTING) for in_half in fitted]

    return asked


def others(plan: Plan) -> Chosen:
    """Says which documents a plan that asks a half does not ask."""
    of_plan = chosen(plan)
    assert of_plan is not None
    return lambda task, docs: [not asked for asked in of_plan(task, docs)]


def record(plan: Plan) -> dict[str, Any]:
    """The entry of `run.json` about the perturbation; empty if there is none."""
    return {} if plan.fixed is None else {FIXED: plan.fixed.record()}


def load(plan: Plan, lm: AttackedHFLM) -> Fixed | None:
    """The perturbation of a plan; None if it has none.

    Raises:
        UsageError: it does not fit the embeddings of the model.
    """
    found = plan.fixed
    if found is None:
        return None
    width, vocabulary = lm.signal.width, vocabulary_of(lm.model)
    if found.share is not None:
        file = TensorFile(found.path)
        table = torch.from_numpy(np.array(file.numbers(DELTA)))
        _check_width(plan, table.shape[1], width)
        if found.share == TOKEN and len(table) != vocabulary:
            raise UsageError(
                f"perturbation={plan.perturbation}: has {len(table)} vocabulary entries, and the"
                f" model has {vocabulary}; must be of a model with the same vocabulary"
            )
        return Universal(table, found.share)
    names = saved.tasks_in(found.path)
    parts = {name: _read(plan, name) for name in names or [""]}  # without tasks it is refused
    change = {name: part.stored for name, part in parts.items()}
    for of_task in change.values():
        _check_width(plan, of_task.shape[1], width)
    rows_of = {name: _ends(part) for name, part in parts.items()}
    sizes = np.cumsum([0, *map(len, change.values())]).tolist()
    return Stored(change, rows_of, dict(zip(change, sizes, strict=False)))


def _read(plan: Plan, task: str) -> Perturbations:
    assert plan.fixed is not None and plan.fixed.condition is not None
    return saved.read(plan.fixed.path, task, plan.fixed.condition)


def _check_width(plan: Plan, there: int, here: int) -> None:
    if there != here:
        raise UsageError(
            f"perturbation={plan.perturbation}: has {there} coordinates for each token, and the"
            f" model has {here}; must be of a model with the same hidden size"
        )


def _ends(part: Perturbations) -> np.ndarray:
    """(U + 1,) the first row of each unit, and the end. The rows of a unit follow each other."""
    return np.cumsum([0, *map(len, part.rows)], dtype=np.int64)


def assign(
    plan: Plan, lm: AttackedHFLM, work: Sequence[Work], requests: Sequence[Instance]
) -> None:
    """Looks up the stored perturbation of each question (`Question.stored`).

    Raises:
        UsageError: a question has no perturbation in the run, or has other tokens there.
    """
    if not isinstance(lm.fixed, Stored):
        return
    units = {name: _Units(plan, name, lm.fixed.rows_of[name]) for name in lm.fixed.change}
    places = {
        number: (doc_id, choice)
        for (_, doc_id), numbers in grouped(requests).items()
        for choice, number in enumerate(numbers)
    }
    for of_batch in work:
        task = of_batch.key[0]
        if task not in units or not isinstance(of_batch.batch, Batch):
            raise UsageError(
                f"perturbation={plan.perturbation}: has no task {task}; must be a run with the same"
                f" tasks. It has {', '.join(units)}"
            )
        for question, numbers in zip(of_batch.batch.questions, of_batch.asked(), strict=True):
            question.stored = task, units[task].of(question, [places[n[0]] for n in numbers])


class _Units:
    """The perturbations that a run stored for a task.

    Args:
        plan: the plan of this run.
        task: name of the task.
        rows_of: see `Stored`.
    """

    def __init__(self, plan: Plan, task: str, rows_of: np.ndarray) -> None:
        self.plan, self.task, self.rows_of = plan, task, rows_of
        self.part = _read(plan, task)
        pairs = zip(self.part.doc_id.tolist(), self.part.choice.tolist(), strict=True)
        self.number = {place: i for i, place in enumerate(pairs)}

    def of(self, question: Question, places: Sequence[tuple[Any, int]]) -> int:
        """The number of a question's perturbation.

        Args:
            question: the question.
            places: for each of its requests, its document and the number of the choice.
        """
        said = f"perturbation={self.plan.perturbation}: task {self.task}, question {places[0][0]}"
        numbers = [self.number.get(place) for place in places]
        units = set()
        for request, i in zip(question.requests, numbers, strict=True):
            if i is None:
                raise UsageError(f"{said}: is not in the run; must be one of its questions")
            stored = self.part.tokens[slice(*self.part.start[i : i + 2])]
            if request.tokens != tuple(stored.tolist()):
                raise UsageError(f"{said}: has other tokens in the run; must have the same prompt")
            units.add(int(self.part.unit[i]))
        start, *_ = units
        moving = int(of_question(question, self.plan.positions).sum())
        if len(units) > 1 or np.diff(self.rows_of[start : start + 2]) != moving:
            raise UsageError(f"{said}: the run perturbed other tokens together")
        return start
