"""Gold labels from the task itself, whatever its fields are called.

lm-eval hands a model requests, not tasks; and a task keeps its gold labels inside
`process_results`. So the task is noted on each request (`patches.note_tasks`), and asked to judge
made-up results: the choices that it calls right when the model prefers them are its gold ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

from llm_attack.errors import UsageError
from llm_attack.harness.patches import Noted, noted

# The made-up log-likelihood of the choices that are not preferred; far enough to decide every
# metric, near enough that exp() of it is a number.
_REJECTED = -1e4


def siblings(request: Instance) -> list[Instance]:
    """All requests of the question that `request` belongs to, in the order of the choices.

    Raises:
        UsageError: as of `task_of`.
    """
    return _noted(request).requests


def task_of(request: Instance) -> Task:
    """The task that built `request`.

    Raises:
        UsageError: none did, or it did before it could be noted.
    """
    return _noted(request).task


def _noted(request: Instance) -> Noted:
    found = noted(request)
    if found is None:
        raise UsageError(
            f"task {request.task_name}: loss=choice and context=shared need requests that an"
            " lm-eval task built after llm_attack.harness.model was imported"
        )
    return found


def gold_choices(requests: Sequence[Instance]) -> list[bool]:
    """Whether each choice of a question is right; shorter than `requests` if some are no choices.

    (lm-eval's acc_mutual_info adds a request without context for each choice.)

    Raises:
        UsageError: the task is not multiple choice, or has no gold label for this question.
    """
    first = requests[0]
    task = task_of(first)
    n = len(_choices(task, first.doc)) or len(requests)
    if n < 2 or len(requests) not in (n, 2 * n) or first.request_type != "loglikelihood":
        raise _not_multiple_choice(first)
    gold = [_judged_right(task, first, i, len(requests)) for i in range(n)]
    if not any(gold):
        raise UsageError(
            f"loss=choice: task {first.task_name} has no gold label for question {first.doc_id};"
            " use loss=sequence or loss=continuation"
        )
    return gold


def choice_lengths(requests: Sequence[Instance]) -> list[float]:
    """Characters of each choice: what lm-eval's acc_norm divides log-likelihoods by.

    Raises:
        UsageError: the task does not list its choices.
    """
    first = requests[0]
    choices = _choices(task_of(first), first.doc)
    if not choices or not all(isinstance(c, str) and c for c in choices):
        raise UsageError(
            f"score=acc_norm: task {first.task_name} does not list its choices; use score=acc"
        )
    return [float(len(choice)) for choice in choices]


def _choices(task: Task, doc: Any) -> Sequence[str]:
    if getattr(task.config, "doc_to_choice", None) is None:
        return []
    return task.doc_to_choice(doc)


def _judged_right(task: Task, request: Instance, preferred: int, n: int) -> bool:
    """Whether the task calls a model right that prefers the choice `preferred`."""
    results = [(0.0 if i == preferred else _REJECTED, i == preferred) for i in range(n)]
    try:
        metrics = task.process_results(request.doc, results)
    except Exception as error:
        raise _not_multiple_choice(request) from error
    for name, value in metrics.items():
        if isinstance(value, tuple):  # f1, mcc, brier_score: (gold, prediction)
            gold = value[0]
            return preferred in gold if isinstance(gold, list) else preferred == gold
        if name.startswith("acc") or name == "exact_match":
            return float(value) > 0.5
    raise _not_multiple_choice(request)


def _not_multiple_choice(request: Instance) -> UsageError:
    return UsageError(
        f"loss=choice: task {request.task_name} is not a multiple-choice task with gold labels; use"
        " loss=sequence or loss=continuation"
    )
