"""Checks of a run of a standard: they look for the signs of a failed attack, as AutoAttack does.

AutoAttack (Croce and Hein) warns in four cases: the answers are random, the gradient is zero, the
forward pass differs with and without a gradient, or a search without gradients finds more.
`llm-attack doctor` makes a run of its own and checks more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from llm_attack.attacks.settings import ATTACKS, BATTERIES
from llm_attack.harness.model import AttackedHFLM
from llm_attack.lm.engine.attacked import AttackedBatch
from llm_attack.lm.engine.clean import Needs, clean_pass
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.network.reproducible import reproducible
from llm_attack.lm.packing.batches import Batch
from llm_attack.stats import ALPHA, more_often
from llm_attack.suite.analysis.flags import GRADIENT, REPEATS, SEARCH, ZEROS
from llm_attack.suite.analysis.outcomes import BROKEN_BY

Checked = dict[str, Any]
"""One check: its `name`, whether it `passed`, and the `figure` behind the verdict."""

_QUESTIONS = 4  # number of questions, from the first batch
_ROUNDING = 1e-3  # of the log-probabilities; bfloat16 rounds less. `doctor` has the same limit


def at_start(lm: AttackedHFLM, batch: Batch) -> list[Checked]:
    """Checks the first questions of a run without an attack.

    Args:
        lm: the model.
        batch: the first batch of the run.
    """
    questions = _QUESTIONS
    while True:
        try:
            return _of_few(lm, replace(batch, questions=batch.questions[:questions]))
        except Exception as error:  # the run halves its batches as well
            divides = lm.engine.layout.divides  # else other processes compute the same batch
            if questions == 1 or not divides or not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
        questions //= 2


def _of_few(lm: AttackedHFLM, few: Batch) -> list[Checked]:
    engine = lm.engine
    with frozen(lm.model), reproducible(engine.layout.deterministic):
        pack = engine.pack(few).to(engine.device)
        with torch.no_grad():
            first, again = (engine.scorer(pack, pack.scored).log_prob.double() for _ in range(2))
        clean = clean_pass(engine.scorer, pack, engine.threat, Needs(gradient=True))
        assert clean.scores is not None and clean.gradient is not None
        batch_of_few = AttackedBatch(engine.scorer, pack, engine.threat, clean)
        flat = batch_of_few.examples.largest(clean.gradient) == 0
        can_change = _can_change(batch_of_few)
        zero = int((flat & can_change).sum())
    size = float(first.abs().mean())
    figure = f"zero in every coordinate for {zero} of {int(can_change.sum())} points"
    return [
        *(
            _changed(name, float((other.double() - first).abs().max()), size)
            for name, other in ((REPEATS, again), (GRADIENT, clean.scores.log_prob))
        ),
        {"name": ZEROS, "passed": zero == 0, "figure": figure},
    ]


def _can_change(batch: AttackedBatch) -> Tensor:
    """(examples,) whether the loss depends on the point at all.

    It does not if a question has no wrong choice, or if the best one is the right one once more.
    """
    loss = batch.of_examples(batch.clean.loss) if batch.clean.loss is not None else None
    assert loss is not None
    if not batch.read.kind.gold:
        return torch.ones_like(loss, dtype=torch.bool)
    tied = loss.abs() <= torch.finfo(loss.dtype).tiny
    return (batch.read.choices.others > 0) & ~tied


def _changed(name: str, most: float, size: float) -> Checked:
    share = most / size if size else most
    figure = f"log-probabilities change by {share:.2g} of their size"
    return {"name": name, "passed": share <= _ROUNDING, "figure": figure}


def at_end(samples: pd.DataFrame) -> list[Checked]:
    """Checks the results of a battery; an empty list if the run has none.

    Args:
        samples: a row per question and condition.
    """
    if BROKEN_BY not in samples:
        return []
    return [_search(samples[samples["attack"].isin(BATTERIES)])]


def _search(samples: pd.DataFrame) -> Checked:
    """Checks that the search without gradients does not find more than the attacks with gradients.

    Each condition is checked. The search sees only questions that the gradient left right. The
    check fails if the search made significantly more questions wrong than the gradient did.
    """
    searches = [name for name, kind in ATTACKS.items() if kind.search]
    worst, figure = True, "it made no question wrong that the gradient left right"
    most = 0
    for condition, rows in samples.groupby("condition", sort=False):
        by_search = int(rows[BROKEN_BY].isin(searches).sum())
        by_gradient = int(rows[BROKEN_BY].notna().sum()) - by_search
        wins = by_search > by_gradient and more_often(by_search, by_gradient) <= ALPHA
        if by_search > most or (wins and worst):
            most = by_search
            figure = (
                f"wrong under {condition}: {by_gradient} by the gradient, then {by_search} by the"
                " search"
            )
        worst = worst and not wins
    return {"name": SEARCH, "passed": worst, "figure": figure}


def sentences(checked: list[Checked]) -> list[str]:
    """A warning for each failed check."""
    return [
        f"check failed: {check['name']} ({check['figure']})"
        for check in checked
        if not check["passed"]
    ]
