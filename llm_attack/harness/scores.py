"""Chooses the score of a task that is reported, and reads its value for one question.

lm-eval computes a dictionary of metrics for each question, and aggregates each metric over the
task. If a question's value is a number, the metric is a score, and tests can compare it. Otherwise
(mcc, f1) only the aggregate exists. It is reported beside the score, without a test.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import brier_score, mean
from numpy.typing import NDArray

from llm_attack.base.errors import UsageError, hint
from llm_attack.base.failures import one_line
from llm_attack.harness.gold import (
    Unjudged,
    Unlabelled,
    by_lm_eval,
    choice_lengths,
    gold_choices,
    judged,
    task_of,
)

_Floats = NDArray[np.float64]

ACC, _BRIER, _MUTUAL = "acc", "brier_score", "acc_mutual_info"
# By lm-eval's own rules, these judge the choice that the model prefers.
_OF_CHOICES = (ACC, "acc_norm", "acc_bytes", _MUTUAL)
_PROBED = 5  # number of questions that show the scores of a process_results
_STEP = 0.7  # nats between the log-likelihoods of made-up answers
_TRIALS = 3  # tried sets of made-up answers; lm-eval must aggregate one of them


@dataclass(frozen=True)
class Score:
    """The metric that a task's questions are judged by.

    Attributes:
        name: name of lm-eval's metric.
        reported: whether the task reports it. Otherwise it is acc of the likeliest choice.
        lower: whether lower is better.
        choice: whether it is 1 if the model prefers a gold choice, and 0 otherwise.
        counted: whether it is 0 or 1.
    """

    name: str = ACC
    reported: bool = True
    lower: bool = False
    choice: bool = True
    counted: bool = True

    def value(self, metrics: Mapping[str, Any], right: bool) -> float:
        """The score of one question.

        Args:
            metrics: lm-eval's metrics of its answers.
            right: whether the likeliest choice is a gold one.
        """
        return number(self.name, metrics[self.name]) if self.reported else float(right)

    def of_answers(
        self, asked: Sequence[Instance], answers: Sequence[Any], gold: Sequence[bool]
    ) -> float:
        """The score of one question, from the model's answers.

        Args:
            asked: the question's requests, those of the choices first.
            answers: the model's answers to them.
            gold: whether each choice is right.
        """
        metrics = task_of(asked[0]).process_results(asked[0].doc, list(answers))
        compared = self.compared(np.array([value for value, _ in answers]), asked)
        return self.value(metrics, gold[int(compared[: len(gold)].argmax())])

    def compared(self, log_likelihoods: _Floats, asked: Sequence[Instance]) -> _Floats:
        """The numbers that the score compares: log-likelihoods, or for some scores a normed form.

        Args:
            log_likelihoods: log-likelihoods of a question's requests.
            asked: these requests, those of the choices first.
        """
        if self.name == _MUTUAL and len(asked) % 2 == 0:
            n = len(asked) // 2
            return log_likelihoods[:n] - log_likelihoods[n:]
        lengths = self.lengths(asked)
        return log_likelihoods if lengths is None else log_likelihoods / np.asarray(lengths)

    def lengths(self, asked: Sequence[Instance]) -> list[float] | None:
        """The lengths that the score divides log-likelihoods by; None if it does not divide.

        Raises:
            UsageError: see `choice_lengths`.
        """
        if self.name not in ("acc_norm", "acc_bytes"):
            return None
        return choice_lengths(asked, octets=self.name == "acc_bytes")


def of_task(questions: Iterable[Sequence[Instance]], asked: str = ACC) -> Score:
    """The score of a task.

    The score is the first of these that exists: the one asked for, acc, a score that judges a
    choice, a score that is 0 or 1, any score of a question. If there is none, it is acc of the
    likeliest choice.

    Args:
        questions: requests of each question of the task; a few questions are looked at.
        asked: name of a score.

    Raises:
        Unlabelled: a question cannot be judged, or has no gold label.
    """
    some = [requests for requests, _ in zip(questions, range(_PROBED), strict=False)]
    scores = {score.name: score for score in _reported(some)}
    ranked = sorted(scores.values(), key=lambda score: (not score.choice, not score.counted))
    return scores.get(asked) or scores.get(ACC) or next(iter(ranked), Score(reported=False))


def _reported(questions: Sequence[Sequence[Instance]]) -> list[Score]:
    """The scores that a task has for one question, as far as a few questions show."""
    task, first = task_of(questions[0][0]), questions[0]
    lower = {name for name, higher in task.higher_is_better().items() if higher is False}
    names = [k for k, v in judged(first[0], made_up(len(first))).items() if has_number(k, v)]
    if by_lm_eval(task):
        traits = {name: (name in _OF_CHOICES, name != _BRIER) for name in names}
        return [Score(name, True, name in lower, *traits[name]) for name in names]
    trials = [trial for requests in questions for trial in _preferring_each(requests)]
    scores = []
    for name in names:
        values = [
            (number(name, metrics[name]), right) for metrics, right in trials if name in metrics
        ]
        counted = all(value in (0, 1) for value, _ in values)
        choice = counted and name not in lower and all(value == right for value, right in values)
        scores.append(Score(name, True, name in lower, choice, counted))
    return scores


def _preferring_each(requests: Sequence[Instance]) -> list[tuple[dict[str, Any], bool]]:
    """For each choice, metrics as if the model preferred it, and whether it is right.

    In the made-up answers, no choice is the greedy continuation.
    """
    trials = []
    for preferred, right in enumerate(gold_choices(requests)):
        trials.append((judged(requests[0], made_up(len(requests), preferred)), right))
    return trials


def made_up(n: int, preferred: int = 0) -> list[tuple[float, bool]]:
    """Answers to `n` requests. One is the likeliest, and none is the greedy continuation."""
    return [(-_STEP * ((i - preferred) % n), False) for i in range(n)]


def has_number(name: str, value: Any) -> bool:
    """Whether the metric's value for a question is a number."""
    try:
        number(name, value)
    except (TypeError, ValueError, LookupError):
        return False
    return True


def number(name: str, value: Any) -> float:
    """The value of a metric for one question, as a number."""
    if name == _BRIER and isinstance(value, tuple):  # lm-eval's aggregate is a mean of these
        return float(brier_score([value]))
    return float(value)


def of_whole_tasks(task: Any, metrics: Iterable[str]) -> list[str]:
    """The metrics of a task whose aggregate is not the mean over its questions."""
    aggregates = task.aggregation()
    plain = {_BRIER: brier_score}
    return [
        name
        for name in metrics
        if name in aggregates and aggregates[name] not in (mean, plain.get(name))
    ]


def check(name: str, questions: Sequence[Sequence[Instance]], score: Score) -> None:
    """Judges made-up answers to all questions of a task. So a failure comes at the start.

    Raises:
        UsageError: a question lacks the score, or lm-eval cannot aggregate a metric.
    """
    task = task_of(questions[0][0])
    failures = []
    for trial in range(_TRIALS):
        draws = np.random.default_rng(trial)
        judgements = []
        for requests in questions:
            answers = made_up(len(requests), int(draws.integers(len(requests))))
            try:
                metrics = judged(requests[0], answers)
            except Unlabelled as error:
                raise refused(name, requests[0], error) from error
            if score.reported and score.name not in metrics:
                raise refused(
                    name, requests[0], Unjudged(f"has no {score.name}, but other questions have it")
                )
            judgements.append(metrics)
        failure = not_aggregated(task.aggregation(), judgements)
        if failure is None:
            return
        failures.append(failure)
    metric, reason = failures[0]
    raise UsageError(
        f"tasks={name}: lm-eval cannot aggregate {metric} over {len(questions)} questions"
        f" ({one_line(reason)}); must be a task that lm-eval can judge"
    ) from reason


def not_aggregated(
    aggregates: Mapping[str, Any], judgements: Sequence[Mapping[str, Any]]
) -> tuple[str, Exception] | None:
    """The first metric that lm-eval cannot aggregate, with the exception; None if there is none."""
    for metric, aggregate in aggregates.items():
        values = [metrics[metric] for metrics in judgements if metric in metrics]
        try:
            with warnings.catch_warnings():  # made-up answers need not make sense
                warnings.simplefilter("ignore")
                if values:
                    aggregate(values)
        except Exception as error:  # a user's own Python
            return metric, error
    return None


def refused(task: str, request: Instance, reason: Unlabelled) -> UsageError:
    """The error for a question that cannot be part of a run."""
    return UsageError(f"tasks={task}: question {request.doc_id} {reason}; {reason.remedy}")


def check_asked(
    asked: str, tasks: Mapping[str, Sequence[Instance]], others: Iterable[str] = ()
) -> None:
    """Refuses the name of a score that no task has.

    Args:
        asked: the name.
        tasks: requests of one question of each task, by name of the task.
        others: scores of tasks without choices.

    Raises:
        UsageError: the message lists the names that exist.
    """
    names: dict[str, None] = dict.fromkeys((ACC, *others))
    for name, requests in tasks.items():
        try:
            metrics = judged(requests[0], made_up(len(requests)))
        except Unlabelled as error:
            raise refused(name, requests[0], error) from error
        numbers = [k for k, v in metrics.items() if has_number(k, v)]
        if asked in metrics and asked not in numbers:
            raise _no_number(asked, name, task_of(requests[0]), metrics[asked], numbers)
        names |= dict.fromkeys(numbers)
    if asked not in names:
        listed = f"one of {', '.join(names)}{hint(asked, names)}"
        raise UsageError(f"score={asked}: must be a score of the tasks, {listed}")


def _no_number(asked: str, name: str, task: Any, value: Any, numbers: Sequence[str]) -> UsageError:
    """The error for a score whose value for a question is no number that tests can compare."""
    if asked != ACC and of_whole_tasks(task, [asked]):
        return UsageError(
            f"score={asked}: {name} has this score only for the whole task, so no question has a"
            " value to compare; use score=acc, which also reports this score"
        )
    way_out = "must be left out of the tasks"
    if numbers:
        way_out = f"must be another score of this task, such as {', '.join(numbers)}"
    return UsageError(
        f"score={asked}: {name} gives a question the value {value!r:.60}, which is not a number;"
        f" {way_out}"
    )
