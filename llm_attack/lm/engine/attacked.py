"""One batch prepared for attack: its clean embeddings, random keys and loss functions."""

from __future__ import annotations

from functools import cached_property, partial

import torch
from torch import Tensor

from llm_attack.attacks import NORMS, Attack, Ball, Groups, least_likely, perturb, widest
from llm_attack.lm.engine.choices import ChoiceScores, sum_by
from llm_attack.lm.engine.scoring import Scorer, Scores
from llm_attack.lm.losses import LOSSES, ThreatModel
from llm_attack.lm.packing.pack import Pack, Twins

_ROUNDING = 4.0  # of a sum of log-probabilities, in units of its last place


class AttackedBatch:
    """One pack, with its clean point, its answers, and the loss that attacks raise.

    Attributes:
        x: the clean point: (B, L, H), or (U, H) where the pack has nodes.
        mask: (B, L) or (U,) booleans, False on padding and where else nothing is perturbed; None:
            nowhere.
    """

    def __init__(self, scorer: Scorer, pack: Pack, threat: ThreatModel) -> None:
        self.scorer, self.pack, self.threat = scorer, pack, threat
        self.below: Tensor | None = None
        """(B, L, H) clean activations that forwards start from; None: they are whole."""

    @cached_property
    def x(self) -> Tensor:
        return self.of_nodes(self.scorer.point(self.pack))

    def of_nodes(self, values: Tensor, total: bool = False) -> Tensor:
        """(B, L, H) values as those of the point: at a token of each node, or the sum over all."""
        if self.pack.first is None or self.pack.node is None:
            return values
        values = values.flatten(0, 1)
        if not total:
            return values[self.pack.first]
        sums = values.new_zeros(len(self.pack.first), values.shape[-1])
        return sums.index_add(0, self.pack.node.flatten(), values)

    @property
    def _precise(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, torch.float32)

    @property
    def mask(self) -> Tensor | None:
        if self.pack.moves is not None:
            return self.pack.moves
        return self.pack.mask if self.pack.first is None else None

    def expand(self, x: Tensor) -> Tensor:
        """`x` as the hookpoint's output, (B, L, H)."""
        return x if self.pack.node is None else x[self.pack.node]

    @cached_property
    def keys(self) -> Tensor:
        return self.pack.keys(self.threat.seed)

    @cached_property
    def examples(self) -> Groups:
        """The examples: questions, or requests where each is attacked alone."""
        if self.pack.first is None:
            return Groups.rows(self.x)
        sizes = [len(q.trie) for q in self.pack.questions]
        return Groups(_owners(sizes).to(self.x.device), len(sizes))

    @cached_property
    def balls(self) -> Groups:
        """The tokens whose perturbations share a ball."""
        if not self.threat.per_token:
            return self.examples
        n = self.x.shape[:-1].numel()
        return Groups(torch.arange(n, device=self.x.device).reshape(self.x.shape[:-1]), n)

    @cached_property
    def choices(self) -> ChoiceScores:
        return ChoiceScores(self.pack.questions, self.pack.input_ids.device)

    def loss(self, x: Tensor) -> Tensor:
        """The loss that attacks ascend: (requests,), or (questions,) where it knows the gold."""
        return self.loss_of(self._watched(x))

    def _watched(self, x: Tensor) -> Scores:
        return self.scorer(self.pack, self.pack.watched, self.expand(x), self.below)

    def loss_of(self, scores: Scores) -> Tensor:
        kind = LOSSES[self.threat.loss]
        return kind.value(self._sums(scores), self.choices if kind.gold else None)

    def _loss_of_examples(self, x: Tensor) -> Tensor:
        """(examples,) the same: of a question the sum over its requests where these share it."""
        values = self.loss(x)
        if len(values) == self.examples.n:
            return values
        sizes = [len(q.requests) for q in self.pack.questions]
        return sum_by(values, _owners(sizes).to(values.device), len(sizes))

    def target_loss(self, x: Tensor) -> Tensor:
        """The loss of the target choice, (questions,), which targeted attacks descend."""
        return self.choices.margin(self._sums_at(x), self.target)

    def gap(self, x: Tensor) -> Tensor:
        """(questions,) `ChoiceScores.gap`: above 0 the answer is wrong.

        Scores that differ by less than `_ROUNDING` count as right, unless they are equal: lm-eval
        adds up in the precision of the log-probabilities, where they may be the other way round.
        """
        found = self._watched(x)
        sums = self._sums(found)
        gap, best = self.choices.gap(sums), self.choices.matrix(sums).detach().amax(-1)
        rounding = _ROUNDING * torch.finfo(found.log_prob.dtype).eps * best.abs()
        return torch.where(gap > torch.finfo(gap.dtype).tiny, gap - rounding, gap)

    def lead(self, other: int, x: Tensor) -> Tensor:
        """(questions,) `ChoiceScores.lead` over one of the other choices."""
        return self.choices.lead(self._sums_at(x), other)

    def _sums_at(self, x: Tensor) -> Tensor:
        return self._sums(self._watched(x))

    def _sums(self, scores: Scores) -> Tensor:
        """(requests,) log-probabilities of the tokens that the loss reads."""
        return sum_by(scores.log_prob, self.pack.watched.request, len(self.pack.requests))

    @cached_property
    def target(self) -> Tensor:
        """(questions, choices) booleans: the choice least likely at the clean point, never gold."""
        log_probs, _ = self.clean
        choices = self.choices
        n = len(self.pack.requests)
        scores = choices.matrix(sum_by(log_probs, self.pack.scored.request, n))
        scores = scores.masked_fill(~choices.exists, torch.inf)
        columns = torch.arange(scores.shape[1], device=scores.device)
        return columns == least_likely(scores, choices.gold)[:, None]

    @cached_property
    def clean(self) -> Scores:
        """Scores of the continuations' tokens at the clean point."""
        return self.answers(None)

    @cached_property
    def gradient(self) -> Tensor:
        """Gradient of the loss at the clean point; the forward for it sets `clean` as well."""
        twins = self.twins
        with torch.enable_grad():
            x = self.x.detach().requires_grad_(True)
            if twins is None:
                scores = self._watched(x)
                values = self.loss_of(scores)
                (gradient,) = torch.autograd.grad(values.sum(), x)
            else:
                once = self.scorer.at_twins(self.pack, twins, x, self.below)
                of_entries = LOSSES[self.threat.loss].value(once.log_prob, None)
                (gradient,) = torch.autograd.grad(of_entries.sum(), x)
                scores = Scores(*(s.detach()[twins.of_entry] for s in once))
                values = self.loss_of(scores)
        self.clean_loss = values.detach()
        self.clean = Scores(*(s.detach()[self.pack.kept] for s in scores))
        return gradient

    @property
    def twins(self) -> Twins | None:
        """What rows have in common, where it is computed once: of losses that sum over tokens."""
        usable = self.scorer.takes_twins and LOSSES[self.threat.loss].additive
        return self.pack.twins if usable and self.scorer.together(self.pack) else None

    def answers(self, x: Tensor | None) -> Scores:
        """The same as `clean` at the point `x`; None: nothing is put at the hookpoint."""
        with torch.no_grad():
            if x is None:
                return self.scorer(self.pack, self.pack.scored)
            return self.scorer(self.pack, self.pack.scored, self.expand(x), self.below)

    def alignment(self, norm: str) -> Tensor:
        """(examples, 4): of the clean point x and the gradient g there, x·g, x·x, g·g, and the
        first-order estimate of the amplitude, in a norm, that makes the answer wrong.

        x·g / sqrt(x·x g·g) is the cosine similarity of embeddings and gradient. The estimate is the
        loss's distance from 0 over the dual norm of g; it is NaN where 0 is not where answers
        become wrong, as of the losses that do not know the gold.
        """
        x, g = (part.to(self._precise) for part in (self.x, self.gradient))
        if self.mask is not None:
            x, g = (part * self.mask[..., None] for part in (x, g))
        sums = [self.examples.sum(part) for part in (x * g, x * x, g * g)]
        estimate = torch.full_like(sums[0], torch.nan)
        if self.knows_gold:
            dual = NORMS[norm].dual(g, self.balls)
            if self.balls is not self.examples:
                dual = self.examples.sum(dual.reshape(*x.shape[:-1], 1))
            estimate = self.clean_loss.neg().clamp(min=0) / dual
        return torch.stack([part.to(estimate) for part in (*sums, estimate)], -1)

    def attack(self, attack: Attack) -> tuple[Tensor, dict[str, Tensor]]:
        """The attacked point, and what it adds to the sums of `Diagnostics`, by name."""
        wide = widest(self.x.device)
        moves = torch.ones_like(self.x[..., :1]) if self.mask is None else self.mask[..., None]
        elements = moves.sum(dtype=wide) * self.x.shape[-1]
        zeros: list[Tensor] = []

        def count(gradient: Tensor) -> None:
            zeros.append((moves * ((gradient == 0) | gradient.isnan())).sum(dtype=wide))

        adversarial = perturb(
            attack,
            self.x,
            self._loss_of_examples,
            target_loss=self.target_loss,
            target_losses=self._leads if attack.kind.targeted else (),
            gap=self.gap if self.knows_gold else None,
            mask=self.mask,
            keys=self.keys if attack.draws else None,
            examples=self.examples,
            balls=self.balls,
            gradient=self.gradient if attack.uses_clean_gradient else None,
            on_gradient=count,
        )
        clean = self.x.to(self._precise)
        noise = adversarial.to(self._precise) - clean
        return adversarial, {
            "signal": (clean.square() * moves).sum(dtype=wide),
            "noise": noise.square().sum(dtype=wide),
            "elements": elements,
            "zero_gradients": sum(zeros, 0 * elements),
            "gradients": elements * len(zeros),
            **self._moved(attack, noise),
            **self._nearest(adversarial),
        }

    @property
    def knows_gold(self) -> bool:
        return LOSSES[self.threat.loss].gold

    @property
    def _leads(self) -> list[partial[Tensor]]:
        """The gold's lead over each of the other choices, as closures; 0 where there are none."""
        return [partial(self.lead, other) for other in range(max(1, self.choices.most_others))]

    def critical_epsilon(self, attack: Attack, adversarial: Tensor, scores: Scores) -> Tensor:
        """(questions,) norm of the perturbation that makes the answer wrong; inf where it is right.

        Args:
            attack: that looks for the nearest wrong answer.
            adversarial: what it found.
            scores: the answers there.
        """
        n = len(self.pack.requests)
        gap = self.choices.gap(sum_by(scores.log_prob, self.pack.scored.request, n))
        rows = self.examples
        length = NORMS[attack.norm].length(adversarial - self.x, rows)
        return torch.where(gap > 0, length, torch.inf)

    def _moved(self, attack: Attack, noise: Tensor) -> dict[str, Tensor]:
        """How far the examples moved, and how much of a step rounding takes.

        A step here is as long in every coordinate. That of an attack in L2 is longer in some, so
        that it loses less; what it loses in all is seen in how far the examples moved.
        """
        wide, kind = widest(self.x.device), attack.kind
        ball = Ball.of(attack, self.x, mask=self.mask, examples=self.examples, balls=self.balls)
        even = ball.norm.direction(ball.moves.expand_as(self.x).to(wide), ball.balls)
        step = even * ball.sized(attack.step)
        ends = [(self.x + s.to(self.x.dtype)).to(wide) - self.x.to(wide) for s in (step, -step)]
        lost = sum(((end.abs() < step.abs() / 2) & ball.moves).sum(dtype=wide) for end in ends)
        still = (self.examples.largest(noise) == 0).sum(dtype=wide)
        found = {
            "steps": 2 * ball.moves.expand_as(self.x).sum(dtype=wide),
            "lost": torch.as_tensor(lost),
        }
        if kind.minimal:  # which moves what is right, and no farther than it must
            return found
        found |= {"examples": torch.full_like(still, self.examples.n), "still": still}
        if kind.adaptive or kind.search:  # which may stay inside of the ball
            return found
        length = attack.epsilon
        if kind.iterative and kind.start is None:
            length = min(length, attack.steps * attack.step)
        asked = ball.sized(length)
        shares = ball.norm.length(noise / asked, ball.balls).clamp(max=1)
        moving = ball.balls.largest(even) > 0
        reached = torch.where(moving, shares, 0).sum()
        return found | {"balls": moving.sum(dtype=wide), "reached": reached}

    def _nearest(self, adversarial: Tensor) -> dict[str, Tensor]:
        """Tokens looked up in the vocabulary, and of those the unchanged ones in L2 and in Linf."""
        if self.scorer.nearest is None:
            return {}
        ids, first = self.pack.input_ids.flatten(), self.pack.first
        ids = ids if first is None else ids[first]
        kept = slice(None) if self.mask is None else self.mask.flatten()
        l2, linf = self.scorer.nearest.unchanged(adversarial.flatten(0, -2)[kept], ids[kept])
        sums = {"tokens": torch.ones_like(l2), "nearest_l2": l2, "nearest_linf": linf}
        return {name: of_tokens.sum() for name, of_tokens in sums.items()}


def _owners(sizes: list[int]) -> Tensor:
    """For each of so many things of each question, the number of the question."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes), output_size=sum(sizes))
