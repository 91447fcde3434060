"""Finds questions that share a source. Their answers are not independent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Fields of a task's documents that name a source. The first field that a document has counts.
_FIELDS: list[tuple[str, ...]] = [
    ("source_id",),  # HellaSwag: the video or article
    ("fact1",),  # OpenBookQA with its additional fields: the fact that it asks for
    ("subject",),  # MMLU as one task
    ("passage",),  # BoolQ, and other tasks with several questions about a text
    ("article",),  # RACE
    ("goal",),  # PIQA: solutions of the same goal
    ("option1", "option2"),  # WinoGrande: twins, and other questions with the same two options
]
# With fewer values, a field is a class and not a source, and the spread of sources is not known.
_LEAST = 10


def clusters(docs: Sequence[Any]) -> list[int | None]:
    """For each document of a task, the number of its source; None if the task does not name it.

    Args:
        docs: the documents of one task in lm-eval's order.

    Returns:
        Numbers from 0 in order of first appearance. Documents of one source have equal numbers.
        None for all if documents lack the field, or if it has fewer than ten values.
    """
    of_docs = [_source(doc) for doc in docs]
    sources = list(dict.fromkeys(of_docs))
    kinds = {fields for fields, _ in sources}
    if None in kinds or len(kinds) != 1 or len(sources) < _LEAST:
        return [None] * len(docs)
    number = {source: i for i, source in enumerate(sources)}
    return [number[source] for source in of_docs]


def _source(doc: Any) -> tuple[tuple[str, ...], tuple[str, ...]] | tuple[None, None]:
    if isinstance(doc, Mapping):
        for fields in _FIELDS:
            if all(isinstance(doc.get(name), str) and doc[name] for name in fields):
                return fields, tuple(sorted(doc[name] for name in fields))
    return None, None
