"""Threat models: what an attack on a language model ascends (docs/attacks.md, "Threat models").

A loss is a row of `LOSSES`: which predictions it reads, whose they are, and the value that it makes
of their summed log-probabilities. Nothing else asks for a loss by its name. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LossKind:
    """The traits that tell one loss from another.

    Attributes:
        value: (sums, choices) -> one value per example; `sums` (requests,) are log-probabilities
            summed over the tokens that the loss reads, `choices` the `ChoiceScores` if it knows the
            gold, else None.
        whole: it reads all tokens of a request but the first, not only the continuation's.
        gold: the attacker knows which choices are right: one value per question, which has one
            perturbation, instead of one value per request.
    """

    value: Callable[[Tensor, Any], Tensor]
    whole: bool = False
    gold: bool = False


LOSSES = {
    "sequence": LossKind(lambda sums, choices: -sums, whole=True),
    "continuation": LossKind(lambda sums, choices: -sums),
    "choice": LossKind(lambda sums, choices: choices.margin(sums, choices.gold), gold=True),
    "margin": LossKind(lambda sums, choices: choices.gap(sums), gold=True),
}


@dataclass(frozen=True)
class ThreatModel:
    """The loss that the attacker ascends, and what it may touch; see docs/attacks.md.

    Attributes:
        loss: a key of `LOSSES`.
        shared: one perturbation for the tokens that a question's requests share, instead of one
            perturbation per request.
        per_token: every token has a ball of its own, instead of one for the whole perturbation.
        seed: of the random draws.
        positions: the tokens that may move; see `lm.packing.positions`.
    """

    loss: str = "sequence"
    shared: bool = False
    per_token: bool = False
    seed: int = 0
    positions: str = "all"
