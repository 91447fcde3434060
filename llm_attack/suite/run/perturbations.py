"""Saving perturbations: a file for each finished batch, and at the end one for each task."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from llm_attack.base.errors import UsageError
from llm_attack.base.failures import ProcessDied, look
from llm_attack.base.record import finite, whole_or_not
from llm_attack.base.redact import redacted
from llm_attack.base.tensors import Spec, TensorFile, create
from llm_attack.harness.model import AttackedHFLM
from llm_attack.lm.engine.engine import BatchResult
from llm_attack.lm.engine.traces import Trace
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.packing.batches import Batch
from llm_attack.lm.packing.positions import of_question
from llm_attack.lm.packing.questions import Question
from llm_attack.suite.analysis.perturbations import FOLDER, SCHEMA, path_of
from llm_attack.suite.plan import Plan
from llm_attack.suite.run.rows import grouped
from llm_attack.suite.run.work import Work

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
# Bytes of each token of a request, and of each request, besides those of its rows.
_OF_TOKEN, _OF_REQUEST = 8, 28


class Layout(NamedTuple):
    """What a condition changes: its name, and dtype and width of the points.

    Attributes:
        name: of the condition.
        number: among all conditions of the run.
        dtype: a key of `tensors.TYPES`.
        width: H.
    """

    name: str
    number: int
    dtype: str
    width: int

    def specs(self, rows: int, units: int) -> dict[str, Spec]:
        """The tensors of the condition, by their names."""
        kinds = {
            "change": Spec(self.dtype, (rows, self.width)),
            "norm": Spec("F32", (rows,)),
            "nearest": Spec("I32", (rows,)),
            "distance": Spec("F32", (rows,)),
            "share": Spec("F32", (rows,)),
            "loss": Spec("F64", (units, 2)),
        }
        return {f"{part}/{self.name}": spec for part, spec in kinds.items()}


def layouts(lm: AttackedHFLM, batch: Batch) -> list[Layout]:
    """The conditions that perturb something.

    Args:
        lm: the model with the run's conditions.
        batch: one that goes through it, so that the points are seen.
    """
    engine = lm.engine
    pack = engine.pack(Batch(batch.questions[:1], batch.trees)).to(engine.device)
    points = {}
    with frozen(lm.model), torch.no_grad():
        for scorer in dict.fromkeys(engine.scorers):
            points[scorer] = scorer.point(pack)
    return [
        Layout(attack.condition, i, _DTYPES[points[scorer].dtype], points[scorer].shape[-1])
        for i, (attack, scorer) in enumerate(zip(engine.attacks, engine.scorers, strict=True))
        if not attack.identity
    ]


class Saved(NamedTuple):
    """The perturbations that a run saves.

    Attributes:
        plan: of the run.
        lm: its model.
        of_conditions: the conditions that perturb something.
        size: bytes of the files, but for their headers.
    """

    plan: Plan
    lm: AttackedHFLM
    of_conditions: list[Layout]
    size: int

    @classmethod
    def of(cls, plan: Plan, lm: AttackedHFLM, work: Sequence[Work]) -> Saved | None:
        """Those of a plan; None: it saves none."""
        if not plan.save_perturbations:
            return None
        of_conditions = layouts(lm, work[0].batch)
        return cls(plan, lm, of_conditions, _bytes_of(of_conditions, work, plan.positions))

    def check_room(self, folder: Path) -> None:
        """Refuses a folder on a disk without room for the files of batches and of tasks.

        Raises:
            UsageError: there is less than twice the size.
        """
        there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        free = shutil.disk_usage(there).free
        if free < 2 * self.size:
            raise UsageError(
                f"save_perturbations=True: needs {amount(2 * self.size)} in {folder} until the run"
                f" is complete, and the disk has {amount(free)} left; must be a larger disk, or"
                " fewer questions or conditions"
            )

    def words(self, folder: Path | None = None) -> str:
        """What is said before."""
        place = "" if folder is None else f" in {folder / FOLDER}"
        return (
            f"perturbations: {amount(self.size)}{place}, and as much again until the run is"
            " complete"
        )

    def write(
        self,
        folder: Path,
        requests: Sequence[Any],
        work: Sequence[tuple[Work, Path]],
        mark: Mapping[str, Any],
    ) -> None:
        """Writes a file for each task from those of its batches.

        Args:
            folder: of the run.
            requests: all of the run.
            work: all batches, and the file of each.
            mark: the fingerprint.

        Raises:
            ProcessDied: the file of a batch is gone.
        """
        metadata = {
            "format": "perturbations of llm-attack",
            "schema": SCHEMA,
            "model": self.plan.model_name,
            "conditions": json.dumps([layout.name for layout in self.of_conditions]),
            "settings": json.dumps(finite(redacted(self.plan.settings())), default=str),
            "fingerprint": json.dumps(finite(redacted(dict(mark))), default=str),
        }
        tasks: dict[str, list[tuple[Work, Path]]] = {}
        for of_batch, path in work:
            tasks.setdefault(of_batch.key[0], []).append((of_batch, path))
        places: dict[str, list[tuple[Any, int, int]]] = {}
        for (name, doc_id), numbers in grouped(requests).items():
            places.setdefault(name, []).extend((doc_id, i, n) for i, n in enumerate(numbers))
        for name, of_task in tasks.items():
            task = _Task(of_task, self.plan.positions)
            path = path_of(folder, name)
            _save_task(path, self.lm, task, places[name], self.of_conditions, metadata)


def _bytes_of(of_conditions: Sequence[Layout], work: Sequence[Work], positions: str) -> int:
    """What the files of a run will hold, but for their headers."""
    size = 0
    for of_batch in work:
        for question, asked in zip(of_batch.batch.questions, of_batch.asked(), strict=True):
            rows = int(of_question(question, positions).sum())
            specs = (spec for layout in of_conditions for spec in layout.specs(rows, 1).values())
            size += sum(spec.size for spec in specs)
            size += sum(
                (_OF_TOKEN * len(request.tokens) + _OF_REQUEST) * len(numbers)
                for request, numbers in zip(question.requests, asked, strict=True)
            )
    return size


def amount(n: int) -> str:
    """Bytes, in words."""
    return f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"


# -- batches ---------------------------------------------------------------------------------------


def keep(path: Path, result: BatchResult) -> None:
    """Writes the traces of a finished batch, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for i, traces in enumerate(result.traces):
        if traces:
            joined = Trace.joined(traces)
            tensors |= {f"{name}/{i}": part for name, part in joined._asdict().items()}
    with whole_or_not(path) as draft:
        save_file({name: part.contiguous() for name, part in tensors.items()}, draft)


def is_kept(path: Path) -> bool:
    """Whether the traces of a batch are there, as a whole."""
    try:
        TensorFile(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


# -- tasks -----------------------------------------------------------------------------------------


class _Unit(NamedTuple):
    """A question that has one perturbation.

    Attributes:
        first: the least number of the run's requests that it answers, by which units are ordered.
        batch: the file of its batch.
        place: of its rows there.
        number: of it there.
    """

    first: int
    batch: Path
    place: slice
    number: int

    @property
    def rows(self) -> int:
        return int(self.place.stop - self.place.start)


class _Task:
    """The units of a task in order, and the rows of its requests.

    Args:
        work: the task's batches, and the file of each.
        positions: of the threat model.
    """

    def __init__(self, work: Sequence[tuple[Work, Path]], positions: str) -> None:
        units: list[tuple[_Unit, list[tuple[list[int], Any, NDArray[np.int64]]]]] = []
        for of_batch, path in work:
            end = 0
            for number, (question, asked) in enumerate(
                zip(of_batch.batch.questions, of_batch.asked(), strict=True)
            ):
                moves = of_question(question, positions)
                place = slice(end, end := end + int(moves.sum()))
                first = min(n for numbers in asked for n in numbers)
                rows = _rows_of_requests(question, moves)
                requests = zip(asked, question.requests, rows, strict=True)
                units.append((_Unit(first, path, place, number), list(requests)))
        units.sort(key=lambda unit: unit[0].first)
        self.units = [unit for unit, _ in units]
        self.ends = np.cumsum([0, *(unit.rows for unit in self.units)])
        self.requests = {
            n: (request, np.where(row < 0, -1, row + start).astype(np.int32), number)
            for number, ((_, requests), start) in enumerate(zip(units, self.ends, strict=False))
            for numbers, request, row in requests
            for n in numbers
        }

    @property
    def rows(self) -> int:
        return int(self.ends[-1])

    @cached_property
    def of_batches(self) -> dict[Path, list[int]]:
        """The numbers of the units in each file."""
        numbers: dict[Path, list[int]] = {}
        for number, unit in enumerate(self.units):
            numbers.setdefault(unit.batch, []).append(number)
        return numbers


def _rows_of_requests(question: Question, moves: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Of each request the row of each of its tokens among the question's, or -1."""
    row = np.where(moves, moves.cumsum() - 1, -1)
    paths = zip(question.requests, question.trie.paths, strict=True)
    return [
        np.pad(row[path], (0, len(r.tokens) - len(path)), constant_values=-1) for r, path in paths
    ]


def _save_task(
    path: Path,
    lm: AttackedHFLM,
    task: _Task,
    places: Sequence[tuple[Any, int, int]],
    of_conditions: Sequence[Layout],
    metadata: Mapping[str, str],
) -> None:
    known = [task.requests[n] for *_, n in places]
    tokens = np.concatenate([request.tokens for request, *_ in known]).astype(np.int32)
    columns: dict[str, NDArray[Any]] = {
        "doc_id": np.array([doc for doc, *_ in places], np.int64),
        "choice": np.array([choice for _, choice, _ in places], np.int32),
        "n_continuation": np.array([r.n_continuation for r, *_ in known], np.int32),
        "start": np.cumsum([0, *(len(r.tokens) for r, *_ in known)], dtype=np.int64),
        "tokens": tokens,
        "row": np.concatenate([row for _, row, _ in known]),
        "unit": np.array([unit for *_, unit in known], np.int32),
    }
    nearest = {int(i) for f in task.of_batches for i in _nearest(f, of_conditions)}
    texts = _texts(lm, sorted({*tokens.tolist(), *nearest} - {-1}))
    names = {np.dtype(np.int64): "I64", np.dtype(np.int32): "I32"}
    specs = {name: Spec(names[a.dtype], a.shape) for name, a in columns.items()}
    for layout in of_conditions:
        specs |= layout.specs(task.rows, len(task.units))
    with whole_or_not(path) as draft:
        arrays = create(draft, specs, {**metadata, "texts": json.dumps(texts)})
        for name, column in columns.items():
            arrays[name][...] = column
        for file, numbers in task.of_batches.items():
            look()
            stored = _opened(file)
            for layout in of_conditions:
                for name in layout.specs(0, 0):
                    part = stored[f"{name.split('/')[0]}/{layout.number}"]
                    for i in numbers:
                        unit, array = task.units[i], arrays[name]
                        if name.startswith("loss/"):
                            array[i] = part[unit.number]
                        else:
                            array[task.ends[i] : task.ends[i + 1]] = part[unit.place]
        del arrays


def _opened(path: Path) -> TensorFile:
    try:
        return TensorFile(path)
    except (OSError, ValueError) as error:
        text = f"{path}: perturbations of a finished batch are missing, or cannot be read"
        raise ProcessDied(text) from error


def _nearest(path: Path, of_conditions: Sequence[Layout]) -> NDArray[np.int32]:
    file = _opened(path)
    return np.unique(np.concatenate([file[f"nearest/{layout.number}"] for layout in of_conditions]))


def _texts(lm: AttackedHFLM, ids: Sequence[int]) -> dict[str, str]:
    """Tokens as text; of those that begin a word, with the blank that decoding one drops."""
    tokenizer = lm.tokenizer
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    texts = {}
    for number, piece in zip(ids, pieces, strict=True):
        text = tokenizer.decode([number])
        begins = isinstance(piece, str) and piece[:1] in ("\u2581", "\u0120")
        texts[str(number)] = f" {text}" if begins and not text.startswith(" ") else text
    return texts
