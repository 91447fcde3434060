"""Rows of tasks without choices: texts, scores, and the first difference between two texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from llm_attack.harness.generation import Piece
from llm_attack.harness.requests import Instance
from llm_attack.harness.scores import Score
from llm_attack.harness.texts import GENERATE, ROLLING, octets, target_of

# Columns of `samples.parquet` in runs with such tasks, in order, and their types.
PARTS = ("parts_at", "parts_from", "parts_none", "parts_token")
TYPES = {"parts_at": "Int64", "parts_from": "Int64", "prediction": "Int64"}

# Of an encoder-decoder model, in place of the description of `GENERATE` below.
_OF_ENCODER = (
    "generates text. Each prompt is perturbed by itself, in the encoder; texts are decoded"
    " greedily. The attack raises loss={loss} of the text that the model writes without an attack"
    " (sequence: the negative log-likelihood of its tokens), which does not know the target"
)

# A description of the attack for each type of request; {loss} is the name of the loss.
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
    """The first token in which a text differs from another text.

    Attributes:
        token: its number, from 0.
        start: its first character, at the same place in both texts.
        before, after: the token's text in the other text and in this one; empty if that text has
            ended.
    """

    token: int
    start: int
    before: str
    after: str


def parting(before: str, after: str, pieces: Callable[[str], Sequence[Piece]]) -> Parting | None:
    """The first difference of `after` from `before`; None if they are equal.

    Args:
        before: a text.
        after: another text.
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
    """The part of a row of `question_rows` that follows from a question without choices."""
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
    """The part of a row of `samples_of` that follows from an answer to such a question.

    Args:
        request: the question's request.
        score: the score of its task.
        metrics: lm-eval's metrics of the answer.
        answers: (the answer, the answer without an attack). Each is a text or the log-likelihood of
            a text. The second is None if it is not known.
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


def record(
    requests: Mapping[str, str], loss: str, encoder: bool = False
) -> dict[str, dict[str, str]]:
    """The entries of `run.json` for tasks without choices, by task.

    Args:
        requests: lm-eval's type of request of each task.
        loss: the loss that attacks raise.
        encoder: whether an encoder reads the prompts.
    """
    about = _PERTURBED | ({GENERATE: _OF_ENCODER} if encoder else {})
    return {
        task: {"request": kind, "loss": loss, "attack": about[kind].format(loss=loss)}
        for task, kind in requests.items()
        if kind in about
    }
