"""A run's requests as numbered batches, and how answers are stored and put together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from operator import itemgetter
from typing import Any, NamedTuple

from llm_attack.harness import texts
from llm_attack.harness.generation import Prompts, check_generation
from llm_attack.harness.model import AttackedHFLM, check_rolling
from llm_attack.harness.requests import Instance, by_question, distinct, encode, questions_of
from llm_attack.harness.scores import Score
from llm_attack.lm.engine.diagnostics import Diagnostics
from llm_attack.lm.engine.engine import BatchResult
from llm_attack.lm.engine.scatter import by_index
from llm_attack.lm.engine.tokens import Changes
from llm_attack.lm.packing.batches import Batch
from llm_attack.suite.run import steps
from llm_attack.suite.run.store import Key

AnyBatch = Batch | Prompts


class Work(NamedTuple):
    """A batch of one task.

    Attributes:
        key: task and number.
        batch: the questions.
        numbers: the numbers of the task's requests among all requests of the run.
            `Question.answers` holds indices into this list.
        places: for tasks that score whole texts, the number of each window within its text.
            `numbers` then has the number of the text for each window.
    """

    key: Key
    batch: AnyBatch
    numbers: Sequence[int]
    places: Sequence[int] = ()

    def asked(self) -> list[list[list[int]]]:
        """The numbers of the run's requests, per question and request of the model."""
        return [
            [[self.numbers[i] for i in indices] for indices in question.answers]
            for question in self.batch.questions
        ]

    def content(self, result: BatchResult) -> dict[str, Any]:
        """The finished batch in the form that the store keeps: results by numbers of requests."""
        found = by_index(result.answered)
        requests = [(self.numbers[i], parts) for i, parts in found.items()]
        if self.places:
            return {
                "answers": [],
                "windows": [
                    (
                        self.numbers[i],
                        self.places[i],
                        [a for a, _ in parts.answers],
                        parts.alignment,
                    )
                    for i, parts in found.items()
                ],
                "diagnostics": [asdict(d) for d in result.diagnostics],
            }
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
            **steps.content(requests),
            "votes": [(n, parts.votes) for n, parts in requests if parts.votes is not None],
            "changes": [(n, parts.changes) for n, parts in requests if any(parts.changes)],
            "diagnostics": [asdict(d) for d in result.diagnostics],
        }

    def __len__(self) -> int:
        """The number of the run's requests in this batch."""
        return sum(len(indices) for q in self.batch.questions for indices in q.answers)


def work_of(lm: AttackedHFLM, requests: Sequence[Instance]) -> Iterator[Work]:
    """Yields all batches, task by task. They depend only on the requests and the settings.

    Raises:
        UsageError: settings have no meaning for a task, or a request cannot be answered.
    """
    by_task: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        by_task.setdefault(str(request.task_name), []).append(number)
    for task, numbers in by_task.items():
        batches, places, owners = _batches(lm, task, [requests[n] for n in numbers])
        of_windows = [numbers[i] for i in owners]
        for i, batch in enumerate(batches):
            yield Work((task, i), batch, of_windows or numbers, places)


def _batches(
    lm: AttackedHFLM, task: str, asked: Sequence[Instance]
) -> tuple[Sequence[AnyBatch], Sequence[int], Sequence[int]]:
    """The batches of a task, and for each window of a text its place in the text and the text's
    number.

    The last two are empty for tasks that score no whole texts.
    """
    if asked[0].request_type == texts.GENERATE:
        check_generation(lm.settings, task)
        return lm.prompts(asked), (), ()
    if asked[0].request_type != texts.ROLLING:
        return lm.batches(questions_of(asked, encode(lm, asked), lm.settings)), (), ()
    check_rolling(lm.settings, task)
    alone = distinct(asked, range(len(asked)))
    windows = texts.windows_of(lm, [asked[n] for n in alone])
    return lm.batches(windows.questions), windows.place, [alone[i] for i in windows.text]


class Gathered(NamedTuple):
    """The answers and measurements of a whole run.

    Attributes:
        answers: for each condition, one per request, in the form that lm-eval expects from a model.
        diagnostics: one per condition.
        alignments, critical_epsilons, broken_by, votes, changes: see `Answered`; by numbers of
            requests.
        steps: the result of `steps.content`, by numbers of requests.
    """

    answers: list[list[Any]]
    diagnostics: list[Diagnostics]
    alignments: dict[int, Sequence[float]]
    critical_epsilons: dict[int, Sequence[float | None]]
    broken_by: dict[int, Sequence[str | None]]
    steps: dict[int, steps.OfRequest]
    votes: dict[int, list[list[list[int]]]]
    changes: dict[int, Sequence[Changes | None]]


def gather(contents: Mapping[Key, Any], work: Sequence[Work], n: int) -> Gathered:
    """Puts the finished batches of `n` requests together."""
    batches = [contents[key] for key in sorted(w.key for w in work)]
    conditions = len(batches[0]["diagnostics"])
    answers: list[list[Any]] = [[None] * n for _ in range(conditions)]
    alignments: dict[int, Sequence[float]] = {}
    critical_epsilons: dict[int, Sequence[float | None]] = {}
    windows: dict[int, list[Any]] = {}
    broken_by: dict[int, Sequence[str | None]] = {}
    curves: dict[int, steps.OfRequest] = {}
    votes: dict[int, list[list[list[int]]]] = {}
    changes: dict[int, Sequence[Changes | None]] = {}
    totals = [Diagnostics() for _ in range(conditions)]
    for content in batches:
        for number, of_request in content["answers"]:
            for of_condition, answer in zip(answers, of_request, strict=True):
                of_condition[number] = answer if isinstance(answer, str) else tuple(answer)
        for number, *window in content.get("windows", ()):
            windows.setdefault(number, []).append(window)
        alignments.update(content.get("alignments", ()))
        epsilons = content.get("critical_epsilons", content.get("needed", []))  # its earlier name
        critical_epsilons.update(epsilons)
        broken_by.update(content.get("broken_by", []))
        curves.update(content.get(steps.STEPS, []))
        votes.update(content.get("votes", []))
        changes.update(content.get("changes", []))
        for total, sums in zip(totals, content["diagnostics"], strict=True):
            total.add(sums)
    for number, parts in windows.items():
        _, of_windows, of_gradients = zip(*sorted(parts, key=itemgetter(0)), strict=True)
        for of_condition, values in zip(answers, zip(*of_windows, strict=True), strict=True):
            of_condition[number] = sum(values)  # in the order of the text, as in lm-eval
        if None not in of_gradients:
            *sums, _ = map(sum, zip(*of_gradients, strict=True))
            alignments[number] = [*sums, math.nan]
    gathered = answers, totals, alignments, critical_epsilons, broken_by, curves, votes, changes
    return Gathered(*gathered)


class RunningAccuracy:
    """Judges a question as soon as all its requests are answered.

    It leaves out texts that are scored as a whole, because nats per byte are no accuracy.
    """

    def __init__(
        self,
        requests: Sequence[Instance],
        scores: Mapping[str, Score],
        gold: Mapping[tuple[str, Any], list[bool]],
    ) -> None:
        self.requests, self.scores, self.gold = requests, scores, gold
        self.question = {n: numbers for numbers in by_question(requests) for n in numbers}
        self.answers: dict[int, list[Any]] = {}

    def add(self, answers: Sequence[tuple[int, list[Any]]]) -> list[list[float]]:
        """For each question that became complete, its score under each condition."""
        self.answers.update(answers)
        questions = {numbers[0]: numbers for numbers in (self.question[n] for n, _ in answers)}
        judged = []
        for numbers in questions.values():
            if all(n in self.answers for n in numbers):
                asked = [self.requests[n] for n in distinct(self.requests, numbers)]
                of_requests = {id(self.requests[n]): self.answers.pop(n) for n in numbers}
                by_condition = zip(*(of_requests[id(r)] for r in asked), strict=True)
                task, doc_id = str(asked[0].task_name), asked[0].doc_id
                score, gold = self.scores[task], self.gold[task, doc_id]
                judged.append([score.of_answers(asked, one, gold) for one in by_condition])
        return judged
