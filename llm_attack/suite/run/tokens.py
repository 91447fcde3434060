"""The tokens that attacks changed, as a frame."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.requests import Instance
from llm_attack.lm.engine.tokens import Changes
from llm_attack.suite.run.rows import grouped


def frame(
    lm: AttackedHFLM,
    questions: pd.DataFrame,
    requests: Sequence[Instance],
    changes: Mapping[int, Sequence[Changes | None]],
) -> pd.DataFrame | None:
    """The frame of `tokens.parquet`; None if no attack of the run chooses tokens.

    Columns:
        task, doc_id: the question.
        condition, attack: the condition.
        tokens: number of tokens that it changed; 0 if the clean answer is wrong, and null if it
            found no wrong answer.
        place: for each of them, its number in the question; choices come after the prompt.
        old, new: their texts; `new` is null if they were not swapped.
        rms, linf: for each of them, the root mean square of the change of its embedding, and the
            largest change of a coordinate, in units of the RMS of the embeddings.
        of_question: the texts of all tokens of the question.
        saliency: for each token, how much the loss rises to first order if only this token moves
            by epsilon; null for swaps.
        tried, wrong: for each token, the number of evaluated points with another token in its
            place, and the number of wrong answers among them; null unless tokens are swapped.
        nearest_rms, nearest_linf: for each token, the smallest change of its embedding by a swap,
            in the same units. NaN if it may not be swapped; null unless tokens are swapped.

    Args:
        lm: the model, with the conditions of the run.
        questions: the result of `rows.question_rows`.
        requests: all requests of the run.
        changes: for each request, the changes of its question under each condition.
    """
    if not any(attack.kind.of_tokens for attack in lm.engine.attacks):
        return None
    groups, size = grouped(requests), lm.signal.rms
    rows: list[dict[str, Any]] = []
    for task, doc_id in zip(questions["task"], questions["doc_id"], strict=True):
        of_question = changes.get(groups[task, doc_id][0], ())
        for attack, of_attack in zip(lm.engine.attacks, of_question, strict=False):
            if of_attack is None:
                continue
            place = {"task": task, "doc_id": doc_id, "condition": attack.condition}
            rows.append({**place, "attack": attack.name, **_row(Changes(*of_attack), lm, size)})
    return pd.DataFrame(rows).astype({"tokens": "Int64"}) if rows else None


def _row(found: Changes, lm: AttackedHFLM, size: float) -> dict[str, Any]:
    changed = found.changed or []
    swapped = bool(found.tried)
    nearest = [(math.nan, math.nan) if pair is None else pair for pair in found.nearest]
    places, old, new, rms, linf = zip(*changed, strict=True) if changed else [()] * 5
    return {
        "tokens": None if found.changed is None else len(changed),
        "place": list(places),
        "old": _texts(lm, old),
        "new": _texts(lm, new) if swapped else None,
        "rms": [x / size for x in rms],
        "linf": [x / size for x in linf],
        "of_question": _texts(lm, found.tokens),
        "saliency": None if swapped else found.saliency,
        "tried": found.tried if swapped else None,
        "wrong": found.wrong if swapped else None,
        "nearest_rms": [x / size for x, _ in nearest] if swapped else None,
        "nearest_linf": [x / size for _, x in nearest] if swapped else None,
    }


def _texts(lm: AttackedHFLM, tokens: Sequence[int]) -> list[str]:
    return [str(lm.tokenizer.decode([token])) for token in tokens]
