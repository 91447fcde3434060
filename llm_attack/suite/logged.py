"""Runs of lm_eval itself, in the form of `lm_eval --log_samples`: any model, any task.

`llm-attack compare` pairs two of them question by question. The module imports nothing of lm-eval.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llm_attack.base.errors import UsageError
from llm_attack.base.failures import one_line
from llm_attack.harness.sources import clusters
from llm_attack.suite.analysis.outcomes import ACC, BINARY, CHOICE, HIGHER, LOWER, NUMBER, kind_of

_SAMPLES = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d-]+(\.\d+)?)\.jsonl")
_OF_CHOICES = (ACC, "acc_norm", "acc_bytes")
# Metrics of texts that are scored as a whole, as in `harness.texts`.
_OCTETS = ("bits_per_byte", "byte_perplexity")
NATS_PER_BYTE = "nats_per_byte"
_NEEDED = ("doc_id", "doc_hash", "filter")


class Logged(NamedTuple):
    """A run of lm_eval.

    Attributes:
        name: lm_eval's name of the model.
        samples: a row per question, with the columns that `pairs.paired` needs, under the condition
            `none`.
        questions: a row per question with `task`, `doc_id`, and two hashes of lm-eval: `doc_hash`
            of the question itself, and `prompt_hash` of the prompt (may be None).
    """

    name: str
    samples: pd.DataFrame
    questions: pd.DataFrame


def folder_of(folder: Path) -> Path | None:
    """The folder of a run of lm_eval: `folder` itself, or that of the only model in it, or None.

    Raises:
        UsageError: there are several models.
    """
    if (folder / "run.json").exists() or not folder.is_dir():
        return None
    places = [folder, *(path for path in sorted(folder.iterdir()) if path.is_dir())]
    holding = [path for path in places if any(_newest(path))]
    if len(holding) > 1:
        listed = ", ".join(path.name for path in holding)
        raise UsageError(
            f"{folder}: contains samples of several models ({listed}); name the folder of one model"
        )
    return holding[0] if holding else None


def load(folder: Path) -> Logged:
    """The newest samples of each task in a folder of `folder_of`.

    Raises:
        UsageError: a file cannot be read, or a task has no score of a single question.
    """
    results, rows = _results(folder), []
    # a later run of other tasks does not contain these
    higher = {task: of for result in results for task, of in _higher(result).items()}
    for task, path in _newest(folder).items():
        samples = list(_lines(path))
        if not samples:
            raise UsageError(f"{path}: has no samples")
        filters = list(dict.fromkeys(str(sample["filter"]) for sample in samples))
        for name in filters:
            some = [sample for sample in samples if str(sample["filter"]) == name]
            shown = task if len(filters) == 1 else f"{task} ({name})"
            rows += _rows(path, task, shown, some, higher.get(task) or {})
    frame = pd.DataFrame(rows)
    if frame.duplicated(["task", "doc_id"]).any():
        raise UsageError(f"{folder}: a question occurs twice; must be the samples of one run")
    names = [str(result["model_name"]) for result in results if result.get("model_name")]
    name = [folder.name, *names][-1]
    questions = frame[["task", "doc_id", "doc_hash", "prompt_hash"]]
    return Logged(name, frame.drop(columns=["doc_hash", "prompt_hash"]), questions)


def differences(a: Logged, b: Logged) -> list[str]:
    """Sentences about the pairs that a reader must know.

    Raises:
        UsageError: the runs share no question.
    """
    key = ["task", "doc_id", "doc_hash"]
    both = a.questions.merge(b.questions, on=key, suffixes=("_a", "_b"))
    if both.empty:
        raise UsageError(
            "compare: the runs share no question: no doc_id of a task has the same doc_hash in both"
        )
    other = int((both["prompt_hash_a"] != both["prompt_hash_b"]).sum())
    if not other:
        return []
    return [f"{other} of {len(both)} questions have different prompts in a and b"]


def _newest(folder: Path) -> dict[str, Path]:
    """The newest file of each task."""
    newest = {}
    for path in sorted(folder.glob("samples_*.jsonl"), key=lambda path: path.name):
        parts = _SAMPLES.fullmatch(path.name)
        if parts is not None:  # the files of a task are sorted by date
            newest[parts["task"]] = path
    return newest


def _results(folder: Path) -> list[dict[str, Any]]:
    """The results of each run of lm_eval in the folder, the oldest first."""
    found = []
    for path in sorted(folder.glob("results_*.json")):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot be read ({one_line(error)})") from error
    return [result for result in found if isinstance(result, dict)]


def _higher(result: dict[str, Any]) -> dict[str, Any]:
    """For each task and metric, whether higher is better."""
    of_tasks = result.get("higher_is_better")
    return of_tasks if isinstance(of_tasks, dict) else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                sample = json.loads(line)
                missing = [name for name in _NEEDED if name not in sample]
                if missing:
                    raise UsageError(f"{path}: line {number} has no {missing[0]}")
                int(sample["doc_id"])  # other code relies on it
                yield sample
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: cannot be read ({one_line(error)})") from error


def _rows(
    path: Path, task: str, shown: str, samples: list[dict[str, Any]], higher: dict[str, Any]
) -> list[dict[str, Any]]:
    first = samples[0]
    octets = next((name for name in _OCTETS if all(_is_pair(s.get(name)) for s in samples)), None)
    if octets is not None:  # texts that are scored as a whole
        per_byte = [{**s, NATS_PER_BYTE: -s[octets][0] / s[octets][1]} for s in samples]
        samples = [{**sample, "metrics": [NATS_PER_BYTE]} for sample in per_byte]
        first, higher = samples[0], {NATS_PER_BYTE: False}
    metrics = [str(name) for name in first.get("metrics") or _OF_CHOICES]
    metrics = [name for name in metrics if all(_is_number(sample.get(name)) for sample in samples)]
    if not metrics:
        raise UsageError(f"{path}: has no numeric score for each question")
    score = ACC if ACC in metrics else metrics[0]
    values = [float(sample[score]) for sample in samples]
    chosen = score in _OF_CHOICES and len(first.get("resps") or ()) > 1
    least = NUMBER if score == NATS_PER_BYTE else CHOICE if chosen else BINARY
    kind = kind_of(values, least)
    about = {
        **{"task": shown, "condition": "none", "attack": "none", "hookpoint": "embed"},
        **{"epsilon": 0.0, "score": score, "kind": kind},
        "better": LOWER if higher.get(score) is False else HIGHER,
        # the second outcome needs the gold, which a sample does not always contain
        **dict.fromkeys(("gold_probability", "log_likelihood", "margin"), np.nan),
    }
    of_source = clusters([sample.get("doc") for sample in samples])
    return [
        {
            **{**about, "doc_id": int(sample["doc_id"]), "acc": value, "cluster": source},
            **{key: sample.get(key) for key in ("doc_hash", "prompt_hash")},
        }
        for sample, value, source in zip(samples, values, of_source, strict=True)
    ]


def _is_pair(value: Any) -> bool:
    """Whether a value is the (log-likelihood, bytes) of a text."""
    return (
        isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[1] > 0
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and math.isfinite(value)
