"""A standard from Python: one call for a loaded model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from llm_attack.base.errors import UsageError, invalid
from llm_attack.lm.standard import STANDARDS, version_of
from llm_attack.suite.evaluate import evaluate
from llm_attack.suite.plan import Plan
from llm_attack.suite.studies import card


def robust_accuracy(
    model: Any,
    tokenizer: Any = None,
    tasks: str | Sequence[str] = ("paper_six",),
    version: str = "standard-1",
    *,
    name: str | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: str = "bar",
    **settings: Any,
) -> dict[str, Any]:
    """The card of a model under a standard: clean and robust accuracy with intervals, and checks.

    Args:
        model: a loaded model of transformers, or the name of one.
        tokenizer: the tokenizer of a loaded model.
        tasks: tasks of lm-eval.
        version: name of the standard.
        name: name of a loaded model in the results.
        output: see `evaluate`.
        progress: see `evaluate`.
        **settings: other settings of `Plan`, such as `limit`, except those that the standard fixes.

    Returns:
        The card, as `load_card` reads it. `card["robust"]` has an entry for each amplitude and
            norm, with `value`, `low` and `high` in its `accuracy`.

    Raises:
        UsageError: an argument is not allowed, or the standard does not allow such a run.
    """
    if version_of(version) not in STANDARDS:
        raise invalid("version", version, STANDARDS)
    own = {} if tokenizer is None else {"tokenizer": tokenizer}
    own |= {} if name is None else {"name": name}
    plan = Plan(model=model, tasks=tasks, attacks=version, **own, **settings)
    result = evaluate(plan, output=output, progress=progress)
    if result is None:
        raise UsageError("robust_accuracy: must be called in one process")
    return card.of_result(result)
