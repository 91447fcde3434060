"""The clean pass of a pack: point, answers and gradient of the loss, without a perturbation.

One forward gives the answers, and a backward gives the gradient. The pass runs once for all
attacks, and only as far as one of them needs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llm_attack.attacks import Attack, least_likely
from llm_attack.lm.engine.choices import ChoiceScores, sum_by
from llm_attack.lm.engine.scoring import Scorer, Scores
from llm_attack.lm.losses import LOSSES, ThreatModel
from llm_attack.lm.packing.pack import Entries, Pack, Twins

_ROUNDING = 4.0  # rounding of a sum of log-probabilities, in units of its last place


@dataclass(frozen=True)
class Needs:
    """The parts of the clean pass that attacks need.

    Attributes:
        point: the clean point.
        answers: its scores.
        gradient: the gradient of the loss, and the scores, which the same forward gives.
    """

    point: bool = True
    answers: bool = False
    gradient: bool = False

    @classmethod
    def of(cls, attacks: Iterable[Attack]) -> Needs:
        """The needs of several attacks together."""
        every = list(attacks)
        minimal = any(a.kind.minimal for a in every)
        chooses = any(a.kind.of_tokens for a in every)
        # these have one target: the choice that is least likely at the clean point
        targets = any(a.kind.targeted and not a.kind.adaptive for a in every if not a.identity)
        answers = targets or minimal or chooses or any(a.identity or a.kind.members for a in every)
        gradient = minimal or any(a.uses_clean_gradient for a in every)
        return cls(not all(a.identity for a in every), answers, gradient)


@dataclass(frozen=True)
class CleanPass:
    """The values of a pack without a perturbation. A value is None if nothing needs it.

    Attributes:
        x: the clean point: (B, L, H), or (U, H) if the pack has nodes.
        scores: the scores of the continuations' tokens (`Pack.scored`).
        loss: the values of `BatchLoss.value`.
        gradient: gradient of their sum at the clean point, like `x`.
        below: (B, L, H) clean activations that forwards start from; None: they run whole.
    """

    x: Tensor | None = None
    scores: Scores | None = None
    loss: Tensor | None = None
    gradient: Tensor | None = None
    below: Tensor | None = None


class BatchLoss:
    """Computes a loss from the scores of a pack.

    Args:
        pack: the batch.
        threat: the threat model with the loss.
    """

    def __init__(self, pack: Pack, threat: ThreatModel) -> None:
        self.pack, self.kind = pack, LOSSES[threat.loss]

    @cached_property
    def choices(self) -> ChoiceScores:
        return ChoiceScores(self.pack.questions, self.pack.input_ids.device)

    def sums(self, scores: Scores) -> Tensor:
        """(requests,) log-probabilities of the tokens that the loss reads (`Pack.watched`)."""
        return sum_by(scores.log_prob, self.pack.watched.request, len(self.pack.requests))

    def value(self, scores: Scores) -> Tensor:
        """The loss that attacks raise: (requests,), or (questions,) if it knows the gold."""
        return self.kind.value(self.sums(scores), self.choices if self.kind.gold else None)

    def gap(self, scores: Scores, entries: Entries | None = None) -> Tensor:
        """(questions,) `ChoiceScores.gap`: above 0 the answer is wrong.

        Scores that differ by less than `_ROUNDING` count as right, unless they are equal. lm-eval
        sums in the precision of the log-probabilities, and there their order may be reversed.

        Args:
            scores: scores of the predictions.
            entries: these predictions; None: those that the loss reads.
        """
        entries = entries or self.pack.watched
        sums = sum_by(scores.log_prob, entries.request, len(self.pack.requests))
        gap, best = self.choices.gap(sums), self.choices.matrix(sums).detach().amax(-1)
        rounding = _ROUNDING * torch.finfo(scores.log_prob.dtype).eps * best.abs()
        return torch.where(gap > torch.finfo(gap.dtype).tiny, gap - rounding, gap)

    def target(self, clean: Scores) -> Tensor:
        """(questions, choices) booleans: the choice least likely at the clean point, never gold."""
        choices = self.choices
        sums = sum_by(clean.log_prob, self.pack.scored.request, len(self.pack.requests))
        scores = choices.matrix(sums).masked_fill(~choices.exists, torch.inf)
        columns = torch.arange(scores.shape[1], device=scores.device)
        return columns == least_likely(scores, choices.gold)[:, None]


def clean_pass(scorer: Scorer, pack: Pack, threat: ThreatModel, needs: Needs) -> CleanPass:
    """The clean pass at one hookpoint.

    Args:
        scorer: the model and the hookpoint.
        pack: the batch.
        threat: the threat model with the loss.
        needs: the parts that are needed.
    """
    x = of_nodes(pack, scorer.point(pack)) if needs.point or needs.gradient else None
    if needs.gradient:
        assert x is not None
        return _with_gradient(scorer, pack, threat, x)
    if not needs.answers:
        return CleanPass(x)
    with torch.no_grad():
        return CleanPass(x, scorer(pack, pack.scored))


def _with_gradient(scorer: Scorer, pack: Pack, threat: ThreatModel, x: Tensor) -> CleanPass:
    loss, twins = BatchLoss(pack, threat), usable_twins(scorer, pack, threat)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        if twins is None:
            scores = scorer(pack, pack.watched, expand(pack, leaf))
            values = loss.value(scores)
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
        else:
            once = scorer.at_twins(pack, twins, leaf, None)
            of_entries = loss.kind.value(once.log_prob, None)
            (gradient,) = torch.autograd.grad(of_entries.sum(), leaf)
            scores = Scores(*(s.detach()[twins.of_entry] for s in once))
            values = loss.value(scores)
    return CleanPass(x, answers_of(pack, scores), values.detach(), gradient)


def answers_of(pack: Pack, watched: Scores) -> Scores:
    """The scores of `Pack.scored` among those of `Pack.watched`, without a gradient."""
    return Scores(*(s.detach()[pack.kept] for s in watched))


def usable_twins(scorer: Scorer, pack: Pack, threat: ThreatModel) -> Twins | None:
    """The twins of the rows, if they are computed once; only for losses that sum over tokens."""
    usable = scorer.takes_twins and LOSSES[threat.loss].additive
    return pack.twins if usable and scorer.together(pack) else None


def of_nodes(pack: Pack, values: Tensor, total: bool = False) -> Tensor:
    """(B, L, H) values in the shape of the point: at one token of each node, or summed over all."""
    if pack.first is None or pack.node is None:
        return values
    values = values.flatten(0, 1)
    if not total:
        return values[pack.first]
    sums = values.new_zeros(len(pack.first), values.shape[-1])
    return sums.index_add(0, pack.node.flatten(), values)


def expand(pack: Pack, x: Tensor) -> Tensor:
    """`x` as the hookpoint's output, (B, L, H)."""
    return x if pack.node is None else x[pack.node]
