"""Files of saved perturbations, and their content. The module needs neither torch nor lm-eval."""

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
# Names of the tensors of every file, and of each condition (the part before the slash).
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
        tokens: (T,) token ids.
        n_continuation: number of the choice's tokens, which come last and are scored.
        change: (T, H) float32 perturbation of each token's embedding, or of the output of the
            hookpoint. 0 if the token was not perturbed. That includes the last token, which the
            model does not read.
    """

    tokens: NDArray[np.int32]
    n_continuation: int
    change: NDArray[np.float32]


@dataclass(frozen=True)
class Perturbations:
    """The perturbations of a task under a condition.

    A row is a perturbed token; there are R rows. Requests that share a perturbation share rows, as
    those of a question do with `context=shared`. A request is a (prompt, choice) pair; there are Q
    requests. A unit is one perturbation; there are U units.

    Attributes:
        task, condition: their names.
        metadata: the file's metadata: `model`, `schema`, and as JSON `settings`, `fingerprint`
            (hashes of weights, tokens and tasks), `conditions` and `texts` (of tokens, by id).
        doc_id, choice: (Q,) the question of each request, and its number in the question.
        n_continuation: (Q,) number of tokens of each request's choice, which come last.
        start: (Q + 1,) index in `tokens` at which each request begins.
        tokens: (T,) token ids of all requests, one request after the other.
        row: (T,) row of each token; -1 if it was not perturbed.
        unit: (Q,) the unit of each request, an index into `loss`.
        norm: (R,) L2 norm of the perturbation.
        nearest: (R,) id of the token, other than its own, whose embedding is nearest to the
            perturbed one; -1 if the hookpoint is not the input embedding.
        distance: (R,) L2 distance to that embedding; NaN if there is none.
        share: (R,) part of the loss's change that the token carries, in the unit of the loss
            (docs/perturbations.md); NaN if the run had `path_points=0`.
        loss: (U, 2) the loss that the attack raised, without and with the perturbation. The shares
            of a unit's rows sum to the difference, up to `remainder`.
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

    @property
    def stored(self) -> NDArray[Any]:
        """(R, H) perturbations as the file has them (`base.tensors.TensorFile`)."""
        return self._file[f"change/{self.condition}"]

    @cached_property
    def change(self) -> NDArray[np.float32]:
        """(R, H) perturbations. Float32 holds every number of narrower dtypes."""
        stored = widened(self.stored)
        return np.asarray(stored, np.float32) if stored.itemsize < 4 else stored

    @cached_property
    def rows(self) -> list[NDArray[np.int64]]:
        """The rows of each unit, without repetition."""
        rows: list[list[NDArray[Any]]] = [[] for _ in self.loss]
        for request, unit in enumerate(self.unit):
            rows[unit].append(self.row[self.start[request] : self.start[request + 1]])
        joined = (np.unique(np.concatenate(parts)) for parts in rows)
        return [part[part >= 0].astype(np.int64) for part in joined]

    @cached_property
    def remainder(self) -> NDArray[np.float64]:
        """(U,) change of the loss minus the sum of the shares."""
        sums = np.array([self.share[rows].sum(dtype=np.float64) for rows in self.rows])
        return np.asarray(self.loss[:, 1] - self.loss[:, 0] - sums)

    def of(self, doc_id: int, choice: int) -> Perturbed:
        """One request.

        Args:
            doc_id: the question.
            choice: the request's number in the question.

        Raises:
            UsageError: there is no such request.
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
        """The text of each token in `tokens` and `nearest`, by token id."""
        return {int(key): text for key, text in json.loads(self.metadata["texts"]).items()}


def conditions_in(file: TensorFile) -> list[str]:
    """The conditions whose perturbations are in a file, in the order of the run."""
    names: list[str] = json.loads(file.metadata["conditions"])
    return names


def opened(folder: Path, task: str) -> TensorFile:
    """The file of a task.

    Raises:
        UsageError: there is no such file, or it cannot be read.
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
        folder: the folder of a finished run with `save_perturbations`.
        task: name of the task.
        condition: name of the condition, such as `fgsm@0.01`.

    Raises:
        UsageError: the perturbations are missing, or cannot be read.
    """
    file = opened(folder, task)
    known = conditions_in(file)
    if condition not in known:
        raise invalid("condition", condition, known)
    parts = {name: file[name] for name in REQUESTS}
    parts |= {name: file[f"{name}/{condition}"] for name in CONDITIONS if name != "change"}
    return Perturbations(task, condition, file.metadata, **parts, _file=file)
