"""The tables of embeddings that attacks fit to many questions: to which ones, and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file

from llm_attack.attacks import Attack
from llm_attack.base.record import whole_or_not
from llm_attack.harness.hashes import digest
from llm_attack.harness.judge import Judge
from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.requests import Instance, by_question
from llm_attack.lm.engine.tied import Fitted
from llm_attack.lm.packing.batches import Batch
from llm_attack.suite.analysis.conditions import FITTED_TO
from llm_attack.suite.plan import Plan
from llm_attack.suite.plan.fixed import FITTING, HELD_OUT
from llm_attack.suite.run import fingerprint, fixed
from llm_attack.suite.run.work import Work, work_of


class FitTo(NamedTuple):
    """The questions to which tables are fitted.

    Attributes:
        batches: their batches; empty if nothing is fitted.
        apart: whether they are other questions than those of the run.
        questions: their number.
        source: hash of their prompts and choices.
    """

    batches: Sequence[Batch] = ()
    apart: bool = False
    questions: int = 0
    source: str = ""

    @classmethod
    def of(
        cls, plan: Plan, lm: AttackedHFLM, judge: Judge, requests: Sequence[Instance],
        work: Sequence[Work],
    ) -> FitTo:  # fmt: skip
        """The questions of a run, or those of the other half if the run asks the held-out one.

        Args:
            plan: the plan.
            lm: the model with the run's conditions.
            judge: the tasks of the run.
            requests: its requests.
            work: its batches.

        Raises:
            UsageError: a task has no questions in the other half.
        """
        if not any(attack.kind.tied for attack in lm.engine.attacks):
            return cls()
        apart = plan.half == HELD_OUT
        if apart:
            requests = judge.of(fixed.others(plan)).requests()
            work = list(work_of(lm, requests))
        batches = [w.batch for w in work if isinstance(w.batch, Batch)]
        source = digest([json.dumps(fingerprint.of_tasks(requests))])
        return cls(batches, apart, len(by_question(requests)), source)

    def record(self) -> dict[str, Any]:
        """The entry of `run.json` and of the fingerprint; empty if nothing is fitted."""
        if not self.source:
            return {}
        half = {"half": FITTING} if self.apart else {}
        return {FITTED_TO: {**half, "questions": self.questions, "source": self.source}}


def save(tables: Mapping[Attack, Fitted], folder: Path) -> None:
    """Writes a safetensors file for each table.

    Its tensors are `ids`, the tokens that moved, and `embeddings`, their rows. With these rows in
    its embedding matrix, a model answers as under the attack.
    """
    for attack, table in tables.items():
        tensors = {"ids": table.ids.cpu(), "embeddings": table.rows.cpu().contiguous()}
        path = folder / f"{attack.condition.replace('@', '_')}.safetensors"
        with whole_or_not(path) as draft:
            save_file(tensors, draft, {"loss": " ".join(map(str, table.losses))})
