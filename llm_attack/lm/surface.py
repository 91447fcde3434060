"""What an attack sees of one pack: the point, its draws, and the loss closures on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llm_attack.attacks import Attack, least_likely, perturb
from llm_attack.lm.losses import ChoiceScores, negative_log_likelihood, sum_by
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
        x: the clean point: (B, L, H), a row per request, or, shared, (U, H), a row per node.
        mask: (B, L) booleans, False on padding; None where `x` has no padding.
        scored: the predictions that make up the answers.
    """

    def __init__(self, scorer: Scorer, pack: Pack, threat: ThreatModel) -> None:
        self.scorer, self.pack, self.threat = scorer, pack, threat
        self.scored = pack.entries.of_continuations()
        self.watched = pack.entries if threat.loss == "sequence" else self.scored
        self.sizes = [r.n_continuation for q in pack.questions for r in q.requests]
        clean = scorer.point(pack)
        self.x = clean.flatten(0, 1)[pack.first] if threat.shared else clean
        self.mask = None if threat.shared else pack.mask

    def expand(self, x: Tensor) -> Tensor:
        """`x` as the hookpoint's output, (B, L, H)."""
        return x[self.pack.node] if self.threat.shared else x

    @cached_property
    def keys(self) -> Tensor:
        seed = self.threat.seed
        return self.pack.node_keys(seed) if self.threat.shared else self.pack.row_keys(seed)

    @cached_property
    def choices(self) -> ChoiceScores:
        return ChoiceScores(self.pack.questions, self.pack.input_ids.device)

    def loss(self, x: Tensor) -> Tensor:
        """What the attacks ascend: (requests,), or (questions,) for the loss `choice`."""
        return self._loss(self.scorer(self.pack, self.watched, self.expand(x)))

    def _loss(self, scores: Scores) -> Tensor:
        if self.threat.loss == "choice":
            return self.choices.cross_entropy(self._sums(scores), self.choices.gold)
        n = self.pack.n_requests
        return negative_log_likelihood(scores.log_prob, self.watched, n, self.threat.loss)

    def target_loss(self, x: Tensor) -> Tensor:
        """What the targeted attacks descend: cross-entropy of the target choice, (questions,)."""
        scores = self.scorer(self.pack, self.watched, self.expand(x))
        return self.choices.cross_entropy(self._sums(scores), self.target)

    def _sums(self, scores: Scores) -> Tensor:
        """Log-likelihoods of the requests, (requests,), for a loss."""
        return sum_by(scores.log_prob, self.watched.request, self.pack.n_requests)

    @cached_property
    def target(self) -> Tensor:
        """(questions, choices) booleans: the choice least likely at the clean point, never gold."""
        log_likelihoods, _ = self.clean
        choices = self.choices
        scores = choices.matrix(log_likelihoods).masked_fill(~choices.exists, torch.inf)
        columns = torch.arange(scores.shape[1], device=scores.device)
        return columns == least_likely(scores, choices.gold)[:, None]

    @cached_property
    def clean(self) -> tuple[Tensor, Tensor]:
        """Log-likelihoods of the requests and whether they are greedy, at the clean point."""
        return self.answers(None)

    @cached_property
    def gradient(self) -> Tensor:
        """Gradient of the loss at the clean point; the forward for it sets `clean` as well."""
        with torch.enable_grad():
            x = self.x.detach().requires_grad_(True)
            scores = self.scorer(self.pack, self.watched, self.expand(x))
            (gradient,) = torch.autograd.grad(self._loss(scores).sum(), x)
        keep = self.watched.continuation
        continuations = Scores(*(s[keep].detach() for s in scores))
        self.clean = continuations.by_request(self.sizes)
        return gradient

    def answers(self, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same as `clean` at the point `x`; None: nothing is put at the hookpoint."""
        with torch.no_grad():
            point = None if x is None else self.expand(x)
            scores = self.scorer(self.pack, self.scored, point)
        return scores.by_request(self.sizes)

    def attack(self, attack: Attack) -> tuple[Tensor, Tensor]:
        """The attacked point and its diagnostics (signal, noise, elements, zeros, gradients).

        Signal and noise are sums of squares of the clean point and of the perturbation; the last
        two count exact zeros among, and all of, the elements of the gradients that were taken.
        """
        moves = torch.ones((), device=self.x.device) if self.mask is None else self.mask[..., None]
        zeros: list[Tensor] = []

        def count(gradient: Tensor) -> None:
            zeros.append(((gradient == 0) | gradient.isnan()).float().mul(moves).sum())

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
        elements = moves.expand_as(self.x).float().sum()
        noise = (adversarial.float() - self.x.float()).square().sum()
        signal = self.x.float().mul(moves).square().sum()
        sums = [signal, noise, elements, sum(zeros, torch.zeros_like(noise)), elements * len(zeros)]
        return adversarial, torch.stack(sums)
