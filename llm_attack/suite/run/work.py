"""A run's requests as batches: how they are numbered, kept when finished, and put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from llm_attack.harness.gold import task_of
from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.requests import Instance, by_question, distinct, encode, questions_of
from llm_attack.harness.scores import Score
from llm_attack.lm.engine.diagnostics import Diagnostics
from llm_attack.lm.engine.engine import Answer, BatchResult
from llm_attack.lm.engine.scatter import by_index
from llm_attack.lm.packing.batches import Batch
from llm_attack.suite.run.store import Key


class Work(NamedTuple):
    """A batch of one task.

    Attributes:
        key: task and number.
        batch: the questions.
        numbers: of the task's requests among all of the run; answers of the batch's questions are
            indices into these.
    """

    key: Key
    batch: Batch
    numbers: Sequence[int]

    def asked(self) -> list[list[list[int]]]:
        """Numbers of the run's requests, per question and request of the model."""
        return [
            [[self.numbers[i] for i in indices] for indices in question.answers]
            for question in self.batch.questions
        ]

    def content(self, result: BatchResult) -> dict[str, Any]:
        """The finished batch as it is kept: numbers of requests, and what belongs to each."""
        requests = [(self.numbers[i], parts) for i, parts in by_index(result.answered).items()]
        return {
            "answers": [(n, parts.answers) for n, parts in requests],
            "alignments": [
                (n, parts.alignment) for n, parts in requests if parts.alignment is not None
            ],
            "critical_epsilons": [
                (n, parts.critical_epsilons)
                for n, parts in requests
                if any(x is not None for x in parts.critical_epsilons)
            ],
            "broken_by": [(n, parts.broken_by) for n, parts in requests if any(parts.broken_by)],
            "diagnostics": [asdict(d) for d in result.diagnostics],
        }

    def __len__(self) -> int:
        """The number of the run's requests in this batch."""
        return sum(len(indices) for q in self.batch.questions for indices in q.answers)


def work_of(lm: AttackedHFLM, requests: Sequence[Instance]) -> Iterator[Work]:
    """Yields all batches, task by task; they depend on the requests and the settings alone."""
    by_task: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        by_task.setdefault(str(request.task_name), []).append(number)
    for task, numbers in by_task.items():
        asked = [requests[n] for n in numbers]
        questions = questions_of(asked, encode(lm, asked), lm.settings)
        for i, batch in enumerate(lm.batches(questions)):
            yield Work((task, i), batch, numbers)


class Gathered(NamedTuple):
    """The answers and measurements of a whole run.

    Attributes:
        answers: for each condition, one per request.
        diagnostics: for each condition.
        alignments, critical_epsilons, broken_by: see `Answered`, by the numbers of requests.
    """

    answers: list[list[Answer]]
    diagnostics: list[Diagnostics]
    alignments: dict[int, Sequence[float]]
    critical_epsilons: dict[int, Sequence[float | None]]
    broken_by: dict[int, Sequence[str | None]]


def gather(contents: Mapping[Key, Any], work: Sequence[Work], n: int) -> Gathered:
    """The finished batches of `n` requests put together."""
    batches = [contents[key] for key in sorted(w.key for w in work)]
    conditions = len(batches[0]["diagnostics"])
    answers: list[list[Any]] = [[None] * n for _ in range(conditions)]
    alignments: dict[int, Sequence[float]] = {}
    critical_epsilons: dict[int, Sequence[float | None]] = {}
    broken_by: dict[int, Sequence[str | None]] = {}
    totals = [Diagnostics() for _ in range(conditions)]
    for content in batches:
        for number, of_request in content["answers"]:
            for of_condition, (log_likelihood, greedy) in zip(answers, of_request, strict=True):
                of_condition[number] = (log_likelihood, greedy)
        alignments.update(content["alignments"])
        epsilons = content.get("critical_epsilons", content.get("needed", []))  # its earlier name
        critical_epsilons.update(epsilons)
        broken_by.update(content.get("broken_by", []))
        for total, sums in zip(totals, content["diagnostics"], strict=True):
            total.add(sums)
    return Gathered(answers, totals, alignments, critical_epsilons, broken_by)


class RunningAccuracy:
    """Judges a question as soon as all its requests are answered."""

    def __init__(
        self,
        requests: Sequence[Instance],
        scores: Mapping[str, Score],
        gold: Mapping[tuple[str, Any], list[bool]],
    ) -> None:
        self.requests, self.scores, self.gold = requests, scores, gold
        self.question = {n: numbers for numbers in by_question(requests) for n in numbers}
        self.answers: dict[int, list[Answer]] = {}

    def add(self, answers: Sequence[tuple[int, list[Answer]]]) -> list[list[float]]:
        """For each question that became complete, its score under each condition."""
        self.answers.update(answers)
        questions = {numbers[0]: numbers for numbers in (self.question[n] for n, _ in answers)}
        judged = []
        for numbers in questions.values():
            if all(n in self.answers for n in numbers):
                asked = [self.requests[n] for n in distinct(self.requests, numbers)]
                of_requests = {id(self.requests[n]): self.answers.pop(n) for n in numbers}
                by_condition = zip(*(of_requests[id(r)] for r in asked), strict=True)
                judged.append([self._score(asked, list(answered)) for answered in by_condition])
        return judged

    def _score(self, asked: list[Instance], answers: list[Answer]) -> float:
        task = str(asked[0].task_name)
        score, gold = self.scores[task], self.gold[task, asked[0].doc_id]
        metrics = task_of(asked[0]).process_results(asked[0].doc, answers)
        compared = score.compared(np.array([value for value, _ in answers]), asked)
        return score.value(metrics, gold[int(compared[: len(gold)].argmax())])
