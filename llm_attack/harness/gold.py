"""Gold labels from the task itself, whatever its fields are called.

lm-eval gives requests to a model, but not their tasks. So `patches.note_tasks` stores the task on
each request. If lm-eval judges a task by its own rules, the task states its gold label. If a task
has its own `process_results`, this function judges made-up answers. The choices that it calls right
when the model prefers them are the gold ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask, Task

from llm_attack.base.errors import UsageError
from llm_attack.base.failures import one_line
from llm_attack.harness.patches import Noted, noted

# The made-up log-likelihood of the other choices. It is low enough to decide every metric, and high
# enough that exp() of it is finite.
_REJECTED = -1e4
# For these metrics, a question's value is a tuple that begins with the gold label.
_WITH_GOLD = ("f1", "mcc", "brier_score", "likelihood")


class Unlabelled(Exception):
    """A question has no gold label, or none can be found.

    The text gives the reason. It continues a sentence that begins with the question.

    Attributes:
        remedy: the requirement that the question does not meet.
    """

    remedy = "must be a task in which every question has choices and a label"


class Unjudged(Unlabelled):
    """The task itself fails on a question."""

    remedy = "must be a task that lm-eval can judge"


def siblings(request: Instance) -> list[Instance]:
    """All requests of the question that `request` belongs to, in the order of the choices.

    Raises:
        UsageError: see `task_of`.
    """
    return _noted(request).requests


def task_of(request: Instance) -> Task:
    """The task that built `request`.

    Raises:
        UsageError: no task built it, or the task built it before this package was imported.
    """
    return _noted(request).task


def _noted(request: Instance) -> Noted:
    note = noted(request)
    if note is None:
        raise UsageError(
            f"task {request.task_name}: loss=choice and context=shared need requests of an"
            " lm-eval task that was built after the import of llm_attack.harness.model"
        )
    return note


def gold_choices(requests: Sequence[Instance]) -> list[bool]:
    """Whether each choice of a question is right; shorter than `requests` if some are no choices.

    For example, lm-eval's acc_mutual_info adds a request without context for each choice.

    Raises:
        Unlabelled: the task is not multiple choice, or has no gold label for this question.
    """
    first = requests[0]
    task = task_of(first)
    if first.request_type != "loglikelihood":
        raise Unlabelled(f"has no choices (its requests are {first.request_type})")
    choices = choices_of(task, first.doc)
    if len(requests) == 1 and not choices:
        raise Unlabelled(
            f"has one continuation and no choices (output_type: {task.OUTPUT_TYPE}), so it has no"
            " chance level to compare with"
        )
    n = len(choices) or len(requests)
    if len(requests) not in (n, 2 * n):
        raise Unlabelled(f"has {n} choices but {len(requests)} requests")
    if by_lm_eval(task):
        return _named(_target(task, first.doc), choices)
    gold = _asked(task, first, n, len(requests))
    if not any(gold):
        raise Unlabelled("has no choice that the task's process_results calls right")
    return gold


def judged(request: Instance, results: Sequence[Any]) -> dict[str, Any]:
    """The task's metrics for made-up answers to the question of `request`.

    Raises:
        Unjudged: the task raises an exception.
    """
    try:
        metrics: dict[str, Any] = task_of(request).process_results(request.doc, list(results))
    except Exception as error:  # a user's own Python
        raise Unjudged(
            f"cannot be judged, because process_results of the task raises {one_line(error)}"
        ) from error
    return metrics


def choice_lengths(requests: Sequence[Instance], octets: bool = False) -> list[float]:
    """The length of each choice in characters, by which lm-eval's acc_norm divides log-likelihoods.

    Args:
        requests: the requests of a question.
        octets: whether to count bytes in UTF-8 instead, as acc_bytes does.

    Raises:
        UsageError: the task does not list its choices.
    """
    first = requests[0]
    choices = choices_of(task_of(first), first.doc)
    if not choices or not all(isinstance(c, str) and c for c in choices):
        name = "acc_bytes" if octets else "acc_norm"
        raise UsageError(
            f"score={name}: task {first.task_name} does not list its choices; use score=acc"
        )
    return [float(len(choice.encode() if octets else choice)) for choice in choices]


def choices_of(task: Task, doc: Any) -> Sequence[str]:
    """The texts of a question's choices; empty if the task does not list them."""
    if getattr(task.config, "doc_to_choice", None) is None:
        return []
    choices: Sequence[str] = task.doc_to_choice(doc)
    return choices


def by_lm_eval(task: Task) -> bool:
    """Whether lm-eval judges the task by its own rules for multiple choice."""
    return (
        isinstance(task, ConfigurableTask)
        and type(task).process_results is ConfigurableTask.process_results
        and task.OUTPUT_TYPE == "multiple_choice"
        and not callable(task.config.process_results)
    )


def _target(task: Task, doc: Any) -> Any:
    """A question's gold label in the task's own form: a number, a text, or a list of them."""
    return task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)


def _named(target: Any, choices: Sequence[str]) -> list[bool]:
    """Whether `target` names each choice, by the rules of lm-eval."""
    targets = list(target) if isinstance(target, (list, tuple)) else [target]
    if not targets or any(label is None for label in targets):
        raise Unlabelled(f"has no label (doc_to_target gives {target})")
    if isinstance(target, str):
        targets = [i for i, choice in enumerate(choices) if choice == target][:1]
    gold = [i in targets for i in range(len(choices))]
    if not any(gold):
        listed = (
            ", ".join(map(repr, choices)) if isinstance(target, str) else f"0 to {len(gold) - 1}"
        )
        raise Unlabelled(f"has the label {target!r}, which is none of its choices ({listed})")
    return gold


def _asked(task: Task, request: Instance, n: int, asked: int) -> list[bool]:
    """Whether the task calls each of `n` choices right, according to made-up answers."""
    gold = []
    for preferred in range(n):
        results = [(0.0 if i == preferred else _REJECTED, i == preferred) for i in range(asked)]
        verdict = _verdict(judged(request, results), preferred)
        if verdict is None:  # no score tells right from wrong
            return _stated(task, request)
        gold.append(verdict)
    return gold


def _stated(task: Task, request: Instance) -> list[bool]:
    """The gold label that the task states, if its process_results does not show it."""
    target = None
    with suppress(Exception):  # such a task need not have a target
        target = _target(task, request.doc)
    if target is None:
        raise Unlabelled("has no label: process_results and doc_to_target give none")
    return _named(target, choices_of(task, request.doc))


def _verdict(metrics: dict[str, Any], preferred: int) -> bool | None:
    """Whether the metrics call the choice `preferred` right; None if no metric shows it."""
    for name, value in metrics.items():
        if name in _WITH_GOLD and isinstance(value, tuple):
            gold = value[0]
            return preferred in gold if isinstance(gold, list) else preferred == gold
        if name.startswith("acc") or name == "exact_match":
            with suppress(TypeError, ValueError):
                return float(value) > 0.5
    return None
