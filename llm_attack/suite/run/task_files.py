"""The file of a task's perturbations, assembled from the files of its batches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_attack.base.failures import ProcessDied, look
from llm_attack.base.record import whole_or_not
from llm_attack.base.tensors import Spec, TensorFile, create
from llm_attack.harness.model import AttackedHFLM
from llm_attack.lm.packing.positions import of_question
from llm_attack.lm.packing.questions import Question
from llm_attack.suite.run.work import Work


class Layout(NamedTuple):
    """The name of a condition, and dtype and width of the points that it perturbs.

    Attributes:
        name: name of the condition.
        number: its number among all conditions of the run.
        dtype: a key of `tensors.TYPES`.
        width: hidden size H.
    """

    name: str
    number: int
    dtype: str
    width: int

    def specs(self, rows: int, units: int) -> dict[str, Spec]:
        """Name, dtype and shape of the condition's tensors."""
        kinds = {
            "change": Spec(self.dtype, (rows, self.width)),
            "norm": Spec("F32", (rows,)),
            "nearest": Spec("I32", (rows,)),
            "distance": Spec("F32", (rows,)),
            "share": Spec("F32", (rows,)),
            "loss": Spec("F64", (units, 2)),
        }
        return {f"{part}/{self.name}": spec for part, spec in kinds.items()}


class _Unit(NamedTuple):
    """A question of the model, which has one perturbation.

    Attributes:
        first: smallest number of the run's requests that it answers. Units are sorted by it.
        batch: the file of its batch.
        place: its rows in that file.
        number: its number in that file.
    """

    first: int
    batch: Path
    place: slice
    number: int

    @property
    def rows(self) -> int:
        return int(self.place.stop - self.place.start)


class Units:
    """The units of a task in order, and the rows of its requests.

    Args:
        work: the task's batches, each with its file.
        positions: the threat model's setting.
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
    """For each request, the row of each of its tokens in the question; -1 if it has no row."""
    row = np.where(moves, moves.cumsum() - 1, -1)
    paths = zip(question.requests, question.trie.paths, strict=True)
    return [
        np.pad(row[path], (0, len(r.tokens) - len(path)), constant_values=-1) for r, path in paths
    ]


def write_task(
    path: Path,
    lm: AttackedHFLM,
    task: Units,
    places: Sequence[tuple[Any, int, int]],
    of_conditions: Sequence[Layout],
    metadata: Mapping[str, str],
) -> None:
    """Writes the file of a task, whole or not at all.

    Args:
        path: the file to write.
        lm: the model; its tokenizer decodes tokens.
        task: the units of the task.
        places: for each request its question, its number in the question, and its number in the
            run.
        of_conditions: the layouts of the conditions that perturb something.
        metadata: the metadata of the file.

    Raises:
        ProcessDied: the file of a batch is gone.
    """
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
    """The text of each token. Tokens that begin a word keep the blank that decoding drops."""
    tokenizer = lm.tokenizer
    known = [number for number in ids if number < len(tokenizer)]  # embeddings may have more rows
    pieces = tokenizer.convert_ids_to_tokens(known)
    texts = dict.fromkeys(map(str, ids), "")
    for number, piece in zip(known, pieces, strict=True):
        text = tokenizer.decode([number])
        begins = isinstance(piece, str) and piece[:1] in ("\u2581", "\u0120")
        texts[str(number)] = f" {text}" if begins and not text.startswith(" ") else text
    return texts
