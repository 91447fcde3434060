"""Tasks without choices in a run: tasks that generate texts, and tasks that score whole texts.

A question of such a task has one request. Its score comes from the task's own `process_results`
(`generate_until`), or is nats per byte (`loglikelihood_rolling`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

from lm_eval import utils
from lm_eval.api.instance import Instance

from llm_attack.base.errors import UsageError
from llm_attack.base.failures import one_line
from llm_attack.harness.gold import Unjudged, judged, task_of
from llm_attack.harness.requests import truncated
from llm_attack.harness.scores import ACC, Score, has_number, not_aggregated, number, refused
from llm_attack.lm.packing.questions import Question

CHOICES, GENERATE, ROLLING = "loglikelihood", "generate_until", "loglikelihood_rolling"
NATS_PER_BYTE = "nats_per_byte"

_OCTETS = ("bits_per_byte", "byte_perplexity")  # their value for a text is (log-likelihood, bytes)


def without_choices(request: Instance) -> bool:
    """Whether the request's task generates texts or scores whole texts."""
    return request.request_type in (GENERATE, ROLLING)


@dataclass(frozen=True)
class TextScore(Score):
    """A metric of generated texts.

    Attributes:
        metric: lm-eval's name of the metric. If the task has several filters, `name` adds the
            filter, as lm-eval does.
        filter: the filter that lm-eval applies to a text before it judges the text.
    """

    metric: str = ""
    filter: str = "none"

    def value(self, metrics: Any, right: bool = False) -> float:
        """The score of one question, from lm-eval's metrics of its answer."""
        return number(self.metric, metrics[self.metric])

    def of_answers(self, asked: Sequence[Instance], answers: Sequence[Any], gold: Any) -> float:
        """The score of a question's answer."""
        return self.value(judged_text(asked[0], answers[0])[self.filter])


@dataclass(frozen=True)
class NatsPerByte(Score):
    """Negative log-likelihood of a text divided by its number of bytes, as the task counts them."""

    name: str = NATS_PER_BYTE
    lower: bool = True
    choice: bool = False
    counted: bool = False

    def of_answers(self, asked: Sequence[Instance], answers: Sequence[Any], gold: Any) -> float:
        """The score of a text with this log-likelihood."""
        return -float(answers[0]) / octets(asked[0])


def octets(request: Instance) -> int:
    """The number of bytes of a text as its task counts them. It may count the uncleaned text.

    Raises:
        Unjudged: the task fails, or the text is empty.
    """
    metrics = judged(request, (-1.0,))
    counts = [metrics[name][1] for name in _OCTETS if isinstance(metrics.get(name), tuple)]
    n = int(counts[0]) if counts else len(request.args[0].encode())
    if n < 1 or not request.args[0]:
        raise Unjudged("has an empty text")
    return n


def judged_text(request: Instance, text: str) -> dict[str, dict[str, Any]]:
    """The task's metrics for a text, by filter.

    Raises:
        Unjudged: a filter or `process_results` raises an exception.
    """
    task, answer = task_of(request), copy(request)
    answer.resps, answer.filtered_resps = [text], {}
    try:
        for ensemble in task._filters:
            ensemble.apply([answer])
    except Exception as error:  # a user's own Python
        raise Unjudged(
            f"cannot be judged, because a filter of the task raises {one_line(error)}"
        ) from error
    return {name: judged(request, [kept]) for name, kept in answer.filtered_resps.items()}


def target_of(request: Instance) -> str | None:
    """The answer that the task expects, as text; None if it has none."""
    target = None
    with suppress(Exception):  # such a task need not have a target
        target = task_of(request).doc_to_target(request.doc)
    if isinstance(target, (list, tuple)):
        target = target[0] if target else None
    return None if target is None else str(target)


def of_task(name: str, questions: Sequence[Sequence[Instance]], asked: str = ACC) -> Score:
    """The score of a task without choices.

    Whole texts have nats per byte. For generated texts, the score is the first of these that
    exists: the one asked for, a score that is 0 or 1, any score of a question.

    Args:
        name: name of the task.
        questions: the requests of each of its questions.
        asked: name of a score.

    Raises:
        UsageError: a question cannot be judged or has several requests, or the task has no score of
            a single question.
    """
    for requests in questions:
        with _named(name, requests[0]):
            if len(requests) > 1:
                raise Unjudged(f"has {len(requests)} requests of {requests[0].request_type}")
            if requests[0].request_type == ROLLING:
                octets(requests[0])
    first = [requests[0] for requests in questions]
    if first[0].request_type == ROLLING:
        return NatsPerByte()
    _check(name, first)
    scores = _scores(first)
    if not scores:
        names = ", ".join(task_of(first[0]).aggregation()) or "none"
        raise UsageError(
            f"tasks={name}: has no score of a single question ({names}), so there is nothing to"
            " compare; must be left out, or llm-attack eval evaluates it"
        )
    ranked = sorted(scores, key=lambda score: not score.counted)
    return next((s for s in scores if asked in (s.name, s.metric)), ranked[0])


def names_of(request: Instance) -> list[str]:
    """The names of the scores that a question has."""
    if request.request_type == ROLLING:
        return [NATS_PER_BYTE]
    return [name for s in _scores([request]) for name in dict.fromkeys((s.name, s.metric))]


def _scores(requests: Sequence[Instance], probed: int = 5) -> list[TextScore]:
    """The scores of generated texts, as far as a few questions show."""
    task = task_of(requests[0])
    lower = {name for name, higher in task.higher_is_better().items() if higher is False}
    trials = [
        judged_text(request, text) for request in requests[:probed] for text in _made_up(request)
    ]
    scores = []
    for kept, metrics in trials[0].items():
        for metric in (name for name, value in metrics.items() if has_number(name, value)):
            values = [number(metric, t[kept][metric]) for t in trials if metric in t.get(kept, {})]
            name = metric if len(trials[0]) == 1 else f"{metric},{kept}"
            counted = all(value in (0, 1) for value in values)
            how = {"lower": metric in lower, "choice": False, "counted": counted}
            scores.append(TextScore(name, metric=metric, filter=kept, **how))
    return scores


def _made_up(request: Instance) -> list[str]:
    """Answers that make a task show its scores: none, a word, and the expected one."""
    return ["", "word", target_of(request) or "0"]


def _check(name: str, requests: Sequence[Instance]) -> None:
    """Judges made-up answers to all questions. So a failure comes at the start.

    Raises:
        UsageError: the task fails on a question, or lm-eval cannot aggregate a metric.
    """
    of_filters: dict[str, list[dict[str, Any]]] = {}
    for request in requests:
        with _named(name, request):
            for text in _made_up(request):
                for kept, metrics in judged_text(request, text).items():
                    of_filters.setdefault(kept, []).append(metrics)
    aggregates = task_of(requests[0]).aggregation()
    for judgements in of_filters.values():
        failure = not_aggregated(aggregates, judgements)
        if failure is not None:
            metric, reason = failure
            raise UsageError(
                f"tasks={name}: lm-eval cannot aggregate {metric} over {len(requests)} questions"
                f" ({one_line(reason)}); must be a task that lm-eval can judge"
            ) from reason


@contextmanager
def _named(task: str, request: Instance) -> Iterator[None]:
    """Adds the question to the message of an `Unjudged`."""
    try:
        yield
    except Unjudged as error:
        raise refused(task, request, error) from error


class Windows(NamedTuple):
    """The windows of texts that are scored as a whole, as lm-eval cuts them.

    Attributes:
        questions: a question for each window. Its answer is the number of the window.
        text: for each window, the number of its request.
        place: for each window, its number within its text.
    """

    questions: list[Question]
    text: list[int]
    place: list[int]


def windows_of(lm: Any, requests: Iterable[Instance]) -> Windows:
    """The windows of each text. Each window is attacked by itself.

    Args:
        lm: the model.
        requests: `loglikelihood_rolling` requests.
    """
    windows = Windows([], [], [])
    for number_of_text, request in enumerate(requests):
        pairs = utils.get_rolling_token_windows(
            token_list=lm.tok_encode(request.args[0]),
            prefix_token=lm.prefix_token_id,
            max_seq_len=lm.max_length,
            context_len=1,
        )
        for place, (context, continuation) in enumerate(map(utils.make_disjoint_window, pairs)):
            window = truncated(lm, (None, context, continuation))
            windows.questions.append(Question([window], [[len(windows.text)]]))
            windows.text.append(number_of_text)
            windows.place.append(place)
    return windows
