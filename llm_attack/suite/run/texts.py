"""Rows of tasks without choices: their texts, their scores, and where two texts part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from llm_attack.harness.generation import Piece
from llm_attack.harness.requests import Instance
from llm_attack.harness.scores import Score
from llm_attack.harness.texts import GENERATE, ROLLING, octets, target_of

# Columns of `samples.parquet` that only runs with such tasks have, in order, and their types.
PARTS = ("parts_at", "parts_from", "parts_none", "parts_token")
TYPES = {"parts_at": "Int64", "parts_from": "Int64", "prediction": "Int64"}

# What an attack does to a request of these types; {loss} is its name.
_PERTURBED = {
    GENERATE: "generates text. Each prompt is perturbed by itself, once, before the first token is"
    " generated; texts are decoded greedily. The attack raises loss={loss} of the prompt (sequence:"
    " the negative log-likelihood of all its tokens but the first), which knows neither the target"
    " nor the text that follows",
    ROLLING: "scores whole texts. Each window of the model's length is perturbed by itself. The"
    " attack raises loss={loss} of the window (sequence: the negative log-likelihood of its tokens;"
    " continuation: of those that count). The score is the mean over texts of the negative"
    " log-likelihood over the bytes of a text, in nats per byte; lower is better",
}


class Parting(NamedTuple):
    """The first token at which a text differs from another, which begins alike.

    Attributes:
        token: its number, from 0.
        start: the character at which it starts in both.
        before, after: its text in the other one, and in this one; empty where the text has ended.
    """

    token: int
    start: int
    before: str
    after: str


def parting(before: str, after: str, pieces: Callable[[str], Sequence[Piece]]) -> Parting | None:
    """Where `after` parts from `before`; None where they are equal.

    Args:
        before: a text.
        after: another.
        pieces: splits a text into tokens.
    """
    if before == after:
        return None
    tokens = pieces(before), pieces(after)
    pairs = enumerate(zip(*tokens, strict=False))
    at = next((i for i, (a, b) in pairs if a.token != b.token), min(map(len, tokens)))
    (start, end), (other, last) = (
        (of[at].start, of[at].end) if at < len(of) else (len(text), len(text))
        for of, text in zip(tokens, (before, after), strict=True)
    )
    start = min(start, other)
    return Parting(at, start, before[start:end], after[start:last])


def of_question(request: Instance) -> dict[str, Any]:
    """What `question_rows` says of a question without choices, beside its name."""
    generates = request.request_type == GENERATE
    return {
        "n_choices": 0,
        "gold": [],
        "question": request.args[0],
        "choices": [],
        "lengths": None,
        "target": target_of(request) if generates else None,
        "n_bytes": None if generates else octets(request),
    }


def of_answer(
    request: Instance,
    score: Score,
    metrics: Mapping[str, Any],
    answers: tuple[Any, Any],
    pieces: Callable[[str], Sequence[Piece]],
) -> dict[str, Any]:
    """What `samples_of` says of an answer under a condition.

    Args:
        request: of the question.
        score: of its task.
        metrics: what lm-eval made of the answer.
        answers: a text, or the log-likelihood of one; and the same without an attack, or None where
            that is not known.
        pieces: splits a text into tokens.
    """
    answer, clean = answers
    generates = isinstance(answer, str)
    part = parting(clean, answer, pieces) if generates and clean is not None else None
    return {
        **dict.fromkeys(("prediction", "prediction_norm", "acc_norm")),
        "acc": score.value(metrics, False)
        if generates
        else score.of_answers([request], [answer], []),
        "log_likelihoods": [] if generates else [float(answer)],
        "request": request.request_type,
        "text": answer if generates else None,
        **dict(zip(PARTS, part or [None] * len(PARTS), strict=True)),
    }


def record(requests: Mapping[str, str], loss: str) -> dict[str, dict[str, str]]:
    """What `run.json` says of tasks without choices, by their names.

    Args:
        requests: lm-eval's type of request of each task.
        loss: that attacks raise.
    """
    return {
        task: {"request": kind, "loss": loss, "attack": _PERTURBED[kind].format(loss=loss)}
        for task, kind in requests.items()
        if kind in _PERTURBED
    }
