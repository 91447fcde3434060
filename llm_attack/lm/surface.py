"""A pack as an attack sees it: the point, its draws, and the loss closures on it."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from llm_attack.attacks import Attack, Groups, least_likely, perturb, widest
from llm_attack.lm.losses import LOSSES, ChoiceScores, ThreatModel, sum_by
from llm_attack.lm.pack import Pack
from llm_attack.lm.scoring import Scorer, Scores


class Surface:
    """One pack under a threat model.

    Attributes:
        x: the clean point: (B, L, H), or (U, H) where the pack has nodes.
        mask: (B, L) booleans, False on padding; None where `x` has no padding.
    """

    def __init__(self, scorer: Scorer, pack: Pack, threat: ThreatModel) -> None:
        self.scorer, self.pack, self.threat = scorer, pack, threat

    @cached_property
    def x(self) -> Tensor:
        clean = self.scorer.point(self.pack)
        return clean if self.pack.first is None else clean.flatten(0, 1)[self.pack.first]

    @property
    def mask(self) -> Tensor | None:
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
        sizes = torch.tensor([len(q.trie) for q in self.pack.questions])
        owner = torch.arange(len(sizes)).repeat_interleave(sizes)
        return Groups(owner.to(self.x.device), len(sizes))

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
        return self._loss(self.scorer(self.pack, self.pack.watched, self.expand(x)))

    def _loss(self, scores: Scores) -> Tensor:
        kind = LOSSES[self.threat.loss]
        return kind.value(self._sums(scores), self.choices if kind.gold else None)

    def _loss_of_examples(self, x: Tensor) -> Tensor:
        """(examples,) the same: of a question the sum over its requests where these share it."""
        values = self.loss(x)
        if len(values) == self.examples.n:
            return values
        sizes = torch.tensor([len(q.requests) for q in self.pack.questions])
        owner = torch.arange(len(sizes)).repeat_interleave(sizes)
        return sum_by(values, owner.to(values.device), len(sizes))

    def target_loss(self, x: Tensor) -> Tensor:
        """The loss of the target choice, (questions,), which targeted attacks descend."""
        scores = self.scorer(self.pack, self.pack.watched, self.expand(x))
        return self.choices.margin(self._sums(scores), self.target)

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
        with torch.enable_grad():
            x = self.x.detach().requires_grad_(True)
            scores = self.scorer(self.pack, self.pack.watched, self.expand(x))
            (gradient,) = torch.autograd.grad(self._loss(scores).sum(), x)
        self.clean = Scores(*(s.detach()[self.pack.kept] for s in scores))
        return gradient

    def answers(self, x: Tensor | None) -> Scores:
        """The same as `clean` at the point `x`; None: nothing is put at the hookpoint."""
        with torch.no_grad():
            point = None if x is None else self.expand(x)
            return self.scorer(self.pack, self.pack.scored, point)

    def alignment(self) -> Tensor:
        """(questions, 3): of each question's clean point x and gradient g there, x·g, x·x, g·g.

        x·g / sqrt(x·x g·g) is the cosine similarity of embeddings and gradient.
        """
        x, g = self.x.float(), self.gradient.float()
        products = torch.stack([(x * g).sum(-1), (x * x).sum(-1), (g * g).sum(-1)], -1)
        if self.mask is not None:
            return (products * self.mask[..., None]).sum(1)
        return products.new_zeros(self.examples.n, 3).index_add(0, self.examples.index, products)

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
            self._loss_of_examples if attack.kind.adaptive else self.loss,
            target_loss=self.target_loss,
            mask=self.mask,
            keys=self.keys if attack.draws else None,
            examples=self.examples,
            balls=self.balls,
            gradient=self.gradient if attack.uses_clean_gradient else None,
            on_gradient=count,
        )
        noise = adversarial.float() - self.x.float()
        return adversarial, {
            "signal": (self.x.float().square() * moves).sum(dtype=wide),
            "noise": noise.square().sum(dtype=wide),
            "elements": elements,
            "zero_gradients": sum(zeros, 0 * elements),
            "gradients": elements * len(zeros),
            **(self._rounded(attack.step, moves) if attack.norm == "linf" else {}),
            **self._nearest(adversarial),
        }

    def _rounded(self, step: float, moves: Tensor) -> dict[str, Tensor]:
        """Coordinates, in both directions, and those of them that a step would not move by half."""
        wide = widest(self.x.device)
        sizes = [((self.x + s).to(wide) - self.x.to(wide)).abs() for s in (step, -step)]
        lost = torch.stack([((size < step / 2) * moves).sum(dtype=wide) for size in sizes]).sum()
        return {"steps": 2 * moves.sum(dtype=wide) * self.x.shape[-1], "lost": lost}

    def _nearest(self, adversarial: Tensor) -> dict[str, Tensor]:
        """Tokens looked up in the vocabulary, and of those the unchanged ones in L2 and in Linf."""
        if self.scorer.nearest is None:
            return {}
        ids, first = self.pack.input_ids.flatten(), self.pack.first
        kept = self.pack.mask.flatten() if self.mask is not None else slice(None)
        ids = ids[kept] if first is None else ids[first]
        l2, linf = self.scorer.nearest.unchanged(adversarial.flatten(0, -2)[kept], ids)
        sums = {"tokens": torch.ones_like(l2), "nearest_l2": l2, "nearest_linf": linf}
        return {name: of_tokens.sum() for name, of_tokens in sums.items()}
