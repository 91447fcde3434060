"""Saving perturbations: first a file for each finished batch, at the end one for each task."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from llm_attack.base.errors import UsageError
from llm_attack.base.record import finite, whole_or_not
from llm_attack.base.redact import redacted
from llm_attack.base.tensors import TensorFile
from llm_attack.harness.model import AttackedHFLM
from llm_attack.lm.engine.engine import BatchResult
from llm_attack.lm.engine.traces import Trace
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.network.pairs import is_pair
from llm_attack.lm.packing.batches import Batch
from llm_attack.lm.packing.positions import of_question
from llm_attack.suite.analysis.perturbations import (
    FOLDER,
    SCHEMA,
    conditions_in,
    opened,
    path_of,
    read,
    tasks_in,
)
from llm_attack.suite.plan import Plan
from llm_attack.suite.run.rows import grouped
from llm_attack.suite.run.task_files import Layout, Units, write_task
from llm_attack.suite.run.work import Work

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
# Shares of the loss are rough if their sum misses its change by more than both limits: a share of
# the change, and a number of nats. No warning if at most the third share of perturbations is rough.
_MISSED, _NATS, _FEW = 0.05, 0.01, 0.01
# Bytes for each token of a request and for each request, without those of its rows.
_OF_TOKEN, _OF_REQUEST = 8, 28


def layouts(lm: AttackedHFLM, batch: Batch) -> list[Layout]:
    """The layouts of the conditions that perturb something.

    Args:
        lm: the model with the run's conditions.
        batch: one batch. A trial with it shows dtype and width of the points.
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
        plan: the plan of the run.
        lm: its model.
        of_conditions: the layouts of the conditions that perturb something.
        size: bytes of the files, without their headers.
    """

    plan: Plan
    lm: AttackedHFLM
    of_conditions: list[Layout]
    size: int

    @classmethod
    def of(cls, plan: Plan, lm: AttackedHFLM, work: Sequence[Work]) -> Saved | None:
        """The perturbations that a plan saves; None if it saves none.

        Raises:
            UsageError: a task has no choices.
        """
        if not plan.save_perturbations:
            return None
        if is_pair(lm.model):
            raise UsageError(
                "save_perturbations=True: must be left out for encoder-decoder models, whose parts"
                " read other tokens than the files have"
            )
        first = work[0].batch
        for batch in work:
            if batch.places or not isinstance(batch.batch, Batch):
                raise UsageError(
                    f"save_perturbations=True: task {batch.key[0]} has no choices; must be run"
                    " without save_perturbations, or without this task"
                )
        assert isinstance(first, Batch)
        of_conditions = layouts(lm, first)
        return cls(plan, lm, of_conditions, _bytes_of(of_conditions, work, plan.positions))

    def check_room(self, folder: Path) -> None:
        """Checks that the disk has room for the files of batches and of tasks.

        Raises:
            UsageError: less than twice the size is free.
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
        """The note that a run shows at its start."""
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
        """Writes a file for each task, from the files of its batches.

        Args:
            folder: the folder of the run.
            requests: all requests of the run.
            work: all batches, each with its file.
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
            task = Units(of_task, self.plan.positions)
            path = path_of(folder, name)
            write_task(path, self.lm, task, places[name], self.of_conditions, metadata)


def warnings(folder: Path) -> list[str]:
    """Warnings about conditions whose shares do not sum to the change of the loss.

    Args:
        folder: the folder of a run with saved perturbations.
    """
    missed: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for task in tasks_in(folder):
        for name in conditions_in(opened(folder, task)):
            found = read(folder, task, name)
            change = np.abs(found.loss[:, 1] - found.loss[:, 0])
            rough = np.abs(found.remainder) > np.maximum(_MISSED * change, _NATS)
            missed[name] += int(rough.sum())
            total[name] += len(rough)
    return [
        f"shares of the loss: {missed[name]} of {n} perturbations of {name} miss more than"
        f" {_MISSED:.0%} of its change; path_points should be larger"
        for name, n in total.items()
        if missed[name] > _FEW * n
    ]


def _bytes_of(of_conditions: Sequence[Layout], work: Sequence[Work], positions: str) -> int:
    """Bytes of the files of a run, without their headers."""
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
    """A number of bytes as text."""
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
    """Whether the file of a batch's traces exists and is whole."""
    try:
        TensorFile(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True
