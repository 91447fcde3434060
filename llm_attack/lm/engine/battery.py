"""A battery of attacks on a batch: each attack runs only on the questions that are still right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llm_attack.attacks import Attack
from llm_attack.lm.engine.attacked import AttackedBatch, Curve
from llm_attack.lm.engine.clean import BatchLoss
from llm_attack.lm.engine.scoring import Scores
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.packing.batches import Batch
from llm_attack.lm.packing.pack import Pack

Prepare = Callable[[Batch, Attack], AttackedBatch]

# These describe the last point of every attack, including attacks that did not succeed. So their
# ratios would not describe the answers.
_OF_POINTS = ("signal", "noise", "elements", "tokens", "nearest_l2", "nearest_linf")


class Survived(NamedTuple):
    """The result of a battery for a pack.

    Attributes:
        scores: scores of the continuations' tokens. For each question, they are at the point of the
            first attack that made it wrong, or at the point with the lowest margin.
        sums: the values to add to the sums of `Diagnostics`, for all attacks together.
        broken_by: for each question, the attack that made it wrong. None if none did, or if it is
            wrong without an attack.
        curves: the curve of each attack, with the numbers of the questions that it attacked.
    """

    scores: Scores
    sums: dict[str, Tensor]
    broken_by: list[str | None]
    curves: list[tuple[Curve, Sequence[int]]]


def survive(
    attack: Attack, pack: Pack, threat: ThreatModel, clean: Scores, prepare: Prepare
) -> Survived:
    """Runs a battery. A question that is wrong, or becomes wrong, takes part in no further attack.

    The result for a question does not depend on other questions, because its draws depend only on
    its own tokens.

    Args:
        attack: the battery.
        pack: the batch.
        threat: the threat model, whose loss knows the gold.
        clean: the scores without an attack.
        prepare: makes a batch and an attack ready.
    """
    kept = Scores(*(part.clone() for part in clean))
    gap = BatchLoss(pack, threat).gap(clean, pack.scored)
    broken_by: list[str | None] = [None] * len(pack.questions)
    places, sums = _entries(pack), dict[str, Tensor]()
    curves: list[tuple[Curve, Sequence[int]]] = []
    for member in attack.members:
        left = [i for i, value in enumerate(gap.tolist()) if not value > 0]
        if not left:
            break
        questions = [pack.questions[i] for i in left]
        batch = Batch(questions, pack.end is not None, len(pack.prefix), pack.limit)
        at = prepare(batch, member)
        end = at.ending(at.attack(member))
        found = end.scores
        assert found is not None
        curves += [] if end.curve is None else [(end.curve, left)]
        new = at.read.gap(found, at.pack.scored)
        better = torch.zeros_like(gap, dtype=torch.bool)
        better[left] = new > gap[left]
        gap[left] = torch.maximum(new, gap[left])
        mine = _entries(at.pack)
        for i, own in zip(left, mine, strict=True):
            if better[i]:
                for whole, part in zip(kept, found, strict=True):
                    whole[places[i]] = part[own]
            if gap[i] > 0:
                broken_by[i] = member.name
        for name, value in end.sums.items():
            if name not in _OF_POINTS:
                sums[name] = sums[name] + value if name in sums else value
    n = torch.as_tensor(len(pack.questions))
    sums["points"] = n
    sums["forwards"] = sums.get("forwards", 0 * n) + n  # and without an attack
    return Survived(kept, sums, broken_by, curves)


def _entries(pack: Pack) -> Sequence[slice]:
    """The places of each question's predictions among those of `Pack.scored`."""
    slices, start = [], 0
    for question in pack.questions:
        end = start + sum(r.n_continuation for r in question.requests)
        slices.append(slice(start, end))
        start = end
    return slices
