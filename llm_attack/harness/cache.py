"""Guards lm-eval's `--use_cache`. Its keys hold only the requests, and not the settings.

Without a guard, a file from one attack, or from a model before further training, would answer for
another. So the first run marks the file with its settings and with hashes of the model. A run with
other settings or another model refuses the file.
"""

from __future__ import annotations

import json
from collections.abc import MutableMapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance

from llm_attack.base.errors import UsageError
from llm_attack.base.redact import without_secrets
from llm_attack.lm.packing.questions import Question

MARK = "llm_attack settings"
_UNKNOWN = "not recorded"


def guard(cache: MutableMapping[str, Any], settings: dict[str, Any], filename: str) -> None:
    """Marks an empty `cache` with `settings` without secrets, or compares them with its mark.

    Args:
        cache: the cache of lm-eval.
        settings: everything that answers depend on: arguments, and hashes of the loaded model.
        filename: name of the cache's file.

    Raises:
        UsageError: the file holds answers from other settings, or from a model without a mark.
    """
    # in the form that JSON returns: tuples are lists, dtypes are strings
    settings = json.loads(json.dumps(without_secrets(settings), default=str))
    mark = cache.get(MARK)
    if mark is None and len(cache) == 0:
        cache[MARK] = json.dumps(settings)
        return
    if mark is None:
        raise UsageError(
            f"use_cache={filename}: this file contains answers that attacked-hf did not write;"
            " must be a new file, or one with the same settings"
        )
    written = json.loads(mark)
    differing = [
        f"{k}={written.get(k, _UNKNOWN)} there, {k}={settings.get(k, _UNKNOWN)} now"
        for k in sorted(written.keys() | settings.keys())
        if written.get(k) != settings.get(k)
    ]
    if differing:
        raise UsageError(
            f"use_cache={filename}: this file was written with other settings or another model"
            f" ({'; '.join(differing)}); must be a new file, or one with the same settings and"
            " model"
        )


def refuse_ambiguous(questions: Sequence[Question], asked: Sequence[Instance]) -> None:
    """Refuses a request of two questions: lm-eval's cache has one answer, and they may need two."""
    seen: dict[Any, tuple[Any, ...]] = {}
    for question in questions:
        content = (tuple(question.requests), tuple(question.gold), tuple(question.lengths))
        for answers in question.answers:
            request = asked[answers[0]]
            if seen.setdefault(request.args, content) != content:
                raise UsageError(
                    f"use_cache: task {request.task_name} has a request that belongs to two"
                    " questions; lm-eval's cache cannot distinguish them, so run it without"
                    " use_cache"
                )
