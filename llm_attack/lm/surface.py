"""What an attack sees of one pack: the point, its draws, and the loss closures on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llm_attack.attacks import Attack, least_likely, perturb
from llm_attack.lm.losses import ChoiceScores, negative_log_likelihood, sum_by, widest
from llm_attack.lm.pack import Pack
from llm_attack.lm.scoring import Scorer, Scores


@dataclass(frozen=True)
class ThreatModel:
    """What the attacker ascends and may touch; `loss` and `context` of the README.

    Attributes:
        loss: "sequence", "continuation" or "choice".
        shared: one perturbation for the tokens that a question's requests share, instead of one
            perturbation per request.
        seed: of the random draws.
    """

    loss: str = "sequence"
    shared: bool = False
    seed: int = 0


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
    def choices(self) -> ChoiceScores:
        return ChoiceScores(self.pack.questions, self.pack.input_ids.device)

    def loss(self, x: Tensor) -> Tensor:
        """What the attacks ascend: (requests,), or (questions,) for the loss `choice`."""
        return self._loss(self.scorer(self.pack, self.pack.watched, self.expand(x)))

    def _loss(self, scores: Scores) -> Tensor:
        entries = self.pack.watched
        if self.threat.loss == "choice":
            return self.choices.margin(self._sums(scores), self.choices.gold)
        n = len(self.pack.requests)
        return negative_log_likelihood(scores.log_prob, entries, n, self.threat.loss)

    def target_loss(self, x: Tensor) -> Tensor:
        """What the targeted attacks descend, for the target choice, (questions,)."""
        scores = self.scorer(self.pack, self.pack.watched, self.expand(x))
        return self.choices.margin(self._sums(scores), self.target)

    def _sums(self, scores: Scores) -> Tensor:
        """Log-likelihoods of the requests' continuations, (requests,), for a loss."""
        entries = self.pack.watched
        log_prob = scores.log_prob * entries.continuation
        return sum_by(log_prob, entries.request, len(self.pack.requests))

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
        sizes = torch.tensor([len(q.trie) for q in self.pack.questions])
        owner = torch.arange(len(sizes)).repeat_interleave(sizes).to(products.device)
        return products.new_zeros(len(sizes), 3).index_add(0, owner, products)

    def attack(self, attack: Attack) -> tuple[Tensor, Tensor]:
        """The attacked point, and the sums of `engine.Diagnostics`, in its order."""
        wide = widest(self.x.device)
        moves = torch.ones_like(self.x[..., :1]) if self.mask is None else self.mask[..., None]
        elements = moves.sum(dtype=wide) * self.x.shape[-1]
        zeros: list[Tensor] = []

        def count(gradient: Tensor) -> None:
            zeros.append((moves * ((gradient == 0) | gradient.isnan())).sum(dtype=wide))

        adversarial = perturb(
            attack,
            self.x,
            self.loss,
            target_loss=self.target_loss,
            mask=self.mask,
            keys=self.keys if attack.kind.random_start else None,
            gradient=self.gradient if attack.uses_clean_gradient else None,
            on_gradient=count,
        )
        signal = (self.x.float().square() * moves).sum(dtype=wide)
        noise = (adversarial.float() - self.x.float()).square().sum(dtype=wide)
        sums = [signal, noise, elements, sum(zeros, 0 * elements), elements * len(zeros)]
        return adversarial, torch.stack([*sums, *self._nearest(adversarial, wide)])

    def _nearest(self, adversarial: Tensor, dtype: torch.dtype) -> Tensor:
        """(3,): tokens looked up, and of those the unchanged ones in L2 and in L-infinity."""
        if self.scorer.nearest is None:
            return torch.zeros(3, dtype=dtype, device=adversarial.device)
        ids, first = self.pack.input_ids.flatten(), self.pack.first
        kept = self.pack.mask.flatten() if self.mask is not None else slice(None)
        ids = ids[kept] if first is None else ids[first]
        unchanged = self.scorer.nearest.unchanged(adversarial.flatten(0, -2)[kept], ids)
        return torch.stack([torch.ones_like(unchanged[0]), *unchanged]).sum(-1, dtype=dtype)
