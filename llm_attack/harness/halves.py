"""Divides the questions of a task in two halves: one to fit to, and one that is held out.

A keyed hash of a question decides, so its half depends neither on other questions nor on `limit`.
Questions that share a source are in one half (`sources`). Otherwise the fitted half could show
parts of the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.api.task import Task
from lm_eval.utils import handle_non_serializable

from llm_attack.base.errors import UsageError
from llm_attack.harness.patches import replaced
from llm_attack.harness.sources import clusters

Chosen = Callable[[str, Sequence[Any]], Sequence[bool]]
"""(name of a task, its documents) -> for each document, whether it is asked."""


def fitted_half(docs: Sequence[Any], key: int) -> list[bool]:
    """For each document of a task, whether it is in the half to fit to.

    Args:
        docs: all documents of the task.
        key: the key of the hash.
    """
    first: dict[int, int] = {}
    fitted: list[bool] = []
    for i, cluster in enumerate(clusters(docs)):
        # the first question of a source decides for all of them
        of_source = i if cluster is None else first.setdefault(cluster, i)
        fitted.append(_hash(docs[of_source], key) if of_source == i else fitted[of_source])
    return fitted


def _hash(doc: Any, key: int) -> bool:
    text = json.dumps(doc, sort_keys=True, default=handle_non_serializable, ensure_ascii=False)
    keyed = hashlib.blake2b(text.encode(), key=str(key).encode()[:64], digest_size=8)
    return bool(keyed.digest()[0] & 1)


@contextmanager
def only(chosen: Chosen | None) -> Iterator[None]:
    """While the context lasts, lm-eval asks and judges only some documents of each task.

    Their numbers, `doc_id`, stay the same. `limit` counts all documents, chosen or not.

    Raises:
        UsageError: no document of a task is chosen. It is raised when the task is built.
    """
    if chosen is None:
        yield
        return
    iterator = Task.doc_iterator

    def some(self: Any, **options: Any) -> Iterator[tuple[int, Any]]:
        asked = of_task(chosen, self)
        pairs = [pair for pair in iterator(self, **options) if asked[pair[0]]]
        if not pairs:
            raise UsageError(
                f"half: task {self.config.task} has no such question among the first that limit"
                " allows; must be a larger limit, or another half"
            )
        return iter(pairs)

    with replaced(Task, doc_iterator=some):
        yield


def of_task(chosen: Chosen, task: Any) -> Sequence[bool]:
    """For each document of a task, whether it is asked. The answer is kept with the task."""
    known = vars(task).get("_chosen")
    if known is None or known[0] is not chosen:
        known = task._chosen = chosen, chosen(task.config.task, list(task.eval_docs))
    asked: Sequence[bool] = known[1]
    return asked
