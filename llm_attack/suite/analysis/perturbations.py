"""Saved perturbations of a run: the files, and what is in them. Needs neither torch nor lm-eval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from llm_attack.base.errors import UsageError, invalid
from llm_attack.base.failures import one_line
from llm_attack.base.tensors import TensorFile, widened

FOLDER = "perturbations"
SCHEMA = "1"
# Tensors of every file, then those of each condition, by their names before a slash.
REQUESTS = ("doc_id", "choice", "n_continuation", "start", "tokens", "row", "unit")
CONDITIONS = ("change", "norm", "nearest", "distance", "share", "loss")
_SUFFIX = ".safetensors"


def path_of(folder: Path, task: str) -> Path:
    """The file of a task in the folder of a run."""
    return folder / FOLDER / f"{quote(task, safe='')}{_SUFFIX}"


def tasks_in(folder: Path) -> list[str]:
    """The tasks whose perturbations are saved in the folder of a run."""
    return sorted(unquote(path.stem) for path in (folder / FOLDER).glob(f"[!.]*{_SUFFIX}"))


class Perturbed(NamedTuple):
    """A request under attack: T tokens, from the first of the prompt to the last of the choice.

    Attributes:
        tokens: (T,) their ids.
        n_continuation: how many of the last are the choice's, which are scored.
        change: (T, H) float32, what was added to the embedding of each (to the output of the
            hookpoint there); 0 where nothing was perturbed, as at the last token, which the model
            does not read.
    """

    tokens: NDArray[np.int32]
    n_continuation: int
    change: NDArray[np.float32]


@dataclass(frozen=True)
class Perturbations:
    """The perturbations of a task under a condition.

    A row is a token that was perturbed: R rows. Requests that share a perturbation share rows, as
    those of a question do with `context=shared`. A request is a (prompt, choice) pair: Q requests.

    Attributes:
        task, condition: whose they are.
        metadata: of the file: `model`, `schema`, and as JSON `settings`, `fingerprint` (hashes of
            weights, tokens and tasks), `conditions` and `texts` (of tokens, by id).
        doc_id, choice: (Q,) the question of each request, and its number there.
        n_continuation: (Q,) how many of its last tokens are the choice's.
        start: (Q + 1,) where its tokens begin in `tokens`.
        tokens: (T,) ids of the tokens of all requests, one request behind the other.
        row: (T,) the row of each token; -1 where nothing was perturbed.
        unit: (Q,) the perturbation that a request has a part in: an index into `loss`.
        norm: (R,) L2 norm of the change.
        nearest: (R,) the token other than its own whose embedding is nearest to the perturbed one;
            -1 where the hookpoint is not the input embedding.
        distance: (R,) its L2 distance; NaN where there is none.
        share: (R,) part of the loss's change that the token carries, in the unit of the loss
            (docs/perturbations.md); NaN where the run had `path_points=0`.
        loss: (U, 2) the loss that the attack raised, without and with the perturbation. The shares
            of a unit's rows sum to the difference, but for `remainder`.
    """

    task: str
    condition: str
    metadata: dict[str, str]
    doc_id: NDArray[np.int64]
    choice: NDArray[np.int32]
    n_continuation: NDArray[np.int32]
    start: NDArray[np.int64]
    tokens: NDArray[np.int32]
    row: NDArray[np.int32]
    unit: NDArray[np.int32]
    norm: NDArray[np.float32]
    nearest: NDArray[np.int32]
    distance: NDArray[np.float32]
    share: NDArray[np.float32]
    loss: NDArray[np.float64]
    _file: TensorFile

    @cached_property
    def change(self) -> NDArray[np.float32]:
        """(R, H) the perturbations, in float32, which holds every number of the model's dtype."""
        stored = self._file.numbers(f"change/{self.condition}")
        return np.asarray(stored, np.float32) if stored.itemsize < 4 else stored

    @cached_property
    def rows(self) -> list[NDArray[np.int64]]:
        """Of each unit its rows, each once."""
        rows: list[list[NDArray[Any]]] = [[] for _ in self.loss]
        for request, unit in enumerate(self.unit):
            rows[unit].append(self.row[self.start[request] : self.start[request + 1]])
        joined = (np.unique(np.concatenate(parts)) for parts in rows)
        return [part[part >= 0].astype(np.int64) for part in joined]

    @cached_property
    def remainder(self) -> NDArray[np.float64]:
        """(U,) change of the loss less the sum of the shares."""
        sums = np.array([self.share[rows].sum(dtype=np.float64) for rows in self.rows])
        return np.asarray(self.loss[:, 1] - self.loss[:, 0] - sums)

    def of(self, doc_id: int, choice: int) -> Perturbed:
        """One request.

        Args:
            doc_id: of the question.
            choice: its number there.

        Raises:
            UsageError: there is none.
        """
        (here,) = np.nonzero((self.doc_id == doc_id) & (self.choice == choice))
        if not len(here):
            of_task = f"task {self.task} has no such request"
            raise UsageError(f"doc_id={doc_id}, choice={choice}: {of_task}")
        place = slice(*self.start[here[0] : here[0] + 2])
        tokens, row = np.array(self.tokens[place]), self.row[place]
        stored = self._file[f"change/{self.condition}"]
        change = np.zeros((len(tokens), stored.shape[1]), np.float32)
        change[row >= 0] = widened(stored[row[row >= 0]])
        return Perturbed(tokens, int(self.n_continuation[here[0]]), change)

    @cached_property
    def texts(self) -> dict[int, str]:
        """The tokens as text, by their ids: those in `tokens` and in `nearest`."""
        return {int(key): text for key, text in json.loads(self.metadata["texts"]).items()}


def conditions_in(file: TensorFile) -> list[str]:
    """The conditions whose perturbations are in a file, in the order of the run."""
    names: list[str] = json.loads(file.metadata["conditions"])
    return names


def opened(folder: Path, task: str) -> TensorFile:
    """The file of a task.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    known = tasks_in(folder)
    if not known:
        raise UsageError(
            f"{folder}: has no perturbations; must be the folder of a run with save_perturbations"
        )
    if task not in known:
        raise invalid("task", task, known)
    path = path_of(folder, task)
    try:
        file = TensorFile(path)
        missing = [n for n in _expected(conditions_in(file)) if n not in file.tensors]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: cannot be read ({one_line(error)})") from error
    if missing:
        raise UsageError(f"{path}: has no tensor {missing[0]}; must be a file of perturbations")
    return file


def _expected(conditions: Sequence[str]) -> list[str]:
    return [*REQUESTS, *(f"{part}/{name}" for name in conditions for part in CONDITIONS)]


def read(folder: Path, task: str, condition: str) -> Perturbations:
    """The perturbations of a task under a condition.

    Args:
        folder: of a finished run with `save_perturbations`.
        task: its name.
        condition: its name, such as `fgsm@0.01`.

    Raises:
        UsageError: they are not there, or cannot be read.
    """
    file = opened(folder, task)
    known = conditions_in(file)
    if condition not in known:
        raise invalid("condition", condition, known)
    parts = {name: file[name] for name in REQUESTS}
    parts |= {name: file[f"{name}/{condition}"] for name in CONDITIONS if name != "change"}
    return Perturbations(task, condition, file.metadata, **parts, _file=file)
