"""The scores of a question's choices, for the losses that know the gold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_attack.attacks import widest
from llm_attack.lm.packing.questions import Question

# Relative to the likeliest choice: below the digits of float64, far above the least float32 number.
_LEAST_WEIGHT = 1e-20


def sum_by(values: Tensor, index: Tensor, n: int) -> Tensor:
    """(n,) sums of the `values` (E,) with the same `index` (E,), in float64.

    In float32, a log-likelihood of -1000 has a resolution of 6e-5. Its terms have a better one.
    """
    wide = widest(values.device)
    return torch.zeros(n, dtype=wide, device=values.device).index_add(0, index, values.to(wide))


class ChoiceScores:
    """The scores of the choices in a batch of questions, as a (questions, choices) matrix.

    Questions may have different numbers of choices. `exists` is False if a choice does not exist.
    """

    def __init__(self, questions: Sequence[Question], device: torch.device | str = "cpu") -> None:
        most = max(len(q.gold) for q in questions)
        rows, row = [], 0
        for q in questions:
            rows.append([row + i if i < len(q.gold) else -1 for i in range(most)])
            row += len(q.requests)
        padded = [list(q.gold) + [False] * (most - len(q.gold)) for q in questions]
        lengths = [list(q.lengths or [1.0] * len(q.gold)) for q in questions]
        self.row = torch.tensor(rows, device=device)
        self.exists = self.row >= 0
        self.gold = torch.tensor(padded, device=device)
        self.length = torch.tensor([x + [1.0] * (most - len(x)) for x in lengths], device=device)

    def matrix(self, log_likelihoods: Tensor) -> Tensor:
        """(questions, choices) scores of the log-likelihoods of all requests; -inf: no choice."""
        scores = log_likelihoods[self.row.clamp(min=0)] / self.length
        return scores.masked_fill(~self.exists, -torch.inf)

    def margin(self, log_likelihoods: Tensor, target: Tensor) -> Tensor:
        """(questions,) log odds of the other choices against those in `target` (booleans).

        The cross-entropy of `target` is softplus of this, so attacks that follow the sign of the
        gradient do the same with both. But if the model is sure of `target`, the gradient of the
        cross-entropy underflows to zero, and is slow to compute before it does. For the same
        reason, every choice has a weight of at least `_LEAST_WEIGHT` in the gradient here. For
        shared tokens this is lost in rounding. For other tokens it keeps the sign. The value is
        zero if there are no other choices.
        """
        scores = self.matrix(log_likelihoods)
        others = self.exists & ~target
        some = others.any(-1)
        value, slope = torch.zeros_like(scores[:, 0]), torch.zeros_like(scores[:, 0])
        for sign, these in ((1, others), (-1, target)):
            part = scores.masked_fill(~these, -torch.inf)
            value = value + sign * part.detach().logsumexp(-1)
            weights = part.detach().softmax(-1).clamp(min=_LEAST_WEIGHT)
            slope = slope + sign * (weights * scores.masked_fill(~these, 0)).sum(-1)
        # this has the value of the first term and the gradient of the second
        return torch.where(some, value + (slope - slope.detach()), 0.0)

    @property
    def others(self) -> Tensor:
        """(questions,) the number of choices that are not gold."""
        return (self.exists & ~self.gold).sum(-1)

    @property
    def most_others(self) -> int:
        """The largest number of choices in a question that are not gold."""
        return int(self.others.max())

    def lead(self, log_likelihoods: Tensor, other: int) -> Tensor:
        """(questions,) the gold's best score minus that of the other choice with number `other`.

        Zero if the question has fewer choices.
        """
        scores = self.matrix(log_likelihoods)
        others = self.exists & ~self.gold
        this = others & (others.cumsum(-1) == other + 1)
        best = scores.masked_fill(~self.gold, -torch.inf).amax(-1)
        return torch.where(this.any(-1), best - scores.masked_fill(~this, 0).sum(-1), 0.0)

    def gap(self, log_likelihoods: Tensor) -> Tensor:
        """(questions,) best score of the other choices minus the gold's best; above 0 means wrong.

        If scores are equal, the first choice is the answer, as in lm-eval. If that choice is not
        gold, the gap is the smallest number above 0. The gap is zero if there are no others.
        """
        scores = self.matrix(log_likelihoods)
        others = self.exists & ~self.gold
        best = [scores.masked_fill(~these, -torch.inf).amax(-1) for these in (others, self.gold)]
        gap = torch.where(others.any(-1), best[0] - best[1], 0.0)
        wrong = ~self.gold.gather(-1, scores.argmax(-1, keepdim=True))[..., 0]
        least = torch.full_like(gap, torch.finfo(gap.dtype).tiny)
        return gap + least.where((gap == 0) & wrong, 0)  # a sum, so the gradient stays
