"""Finds questions that share a source, so that their answers are not independent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Fields of a task's documents that say so; of several, the first that a document has.
_FIELDS: list[tuple[str, ...]] = [
    ("source_id",),  # HellaSwag: the video or article
    ("fact1",),  # OpenBookQA with its additional fields: the fact that is asked for
    ("subject",),  # MMLU as one task
    ("passage",),  # BoolQ, and others that ask several questions about a text
    ("article",),  # RACE
    ("goal",),  # PIQA: solutions of the same goal
    ("option1", "option2"),  # WinoGrande: twins, and what else has the same two options
]
# With fewer sources their spread is not known; such a field is a class, not a source.
_LEAST = 10


def clusters(docs: Sequence[Any]) -> list[int | None]:
    """For each document of one task, the number of its source; None: the task does not tell.

    Args:
        docs: lm-eval's, of one task, in order.

    Returns:
        Numbers from 0 in order of first appearance; those of one source are equal. None for all
        where not all documents have the same field, or it has less than ten values.
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
