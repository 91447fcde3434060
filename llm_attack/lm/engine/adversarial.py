"""Training steps under attack: the gradient of the weights at perturbed embeddings.

Adversarial training minimises the loss at the point that an attack finds (Madry et al. 2018).
FreeLB
minimises the mean loss over the points on the attack's way (Zhu et al. 2020, Algorithm 1). Its
gradient of the weights costs no further pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_attack.attacks import Attack, Ball, Elements, perturb
from llm_attack.lm.network.hook import capture, edit_output, frozen
from llm_attack.lm.network.pairs import embedding_of


class AdversarialLoss:
    """Computes the gradients of one step of adversarial training, for a causal language model.

    Texts begin at the left and end with padding, which causal attention does not see. The attack
    raises the negative log-likelihood of each text, like the loss `sequence`. The weights get the
    gradient of the mean cross-entropy over all tokens of the batch.

    Args:
        attack: the attack, in the units of the embeddings. An attack with epsilon 0, or `none`,
            makes plain training steps.
        free: FreeLB. It takes the steps of `attack` from a random start in the ball, and its
            gradient is the mean over the start and all points but the last.
        pad: token id of the padding. It is not predicted, and the token before it is not attacked,
            also where a text contains it.
        seed: seed of the random starts.
    """

    def __init__(self, attack: Attack, free: bool, pad: int, seed: int = 0) -> None:
        self.attack, self.free, self.pad = attack, free, pad
        self._draws = torch.Generator().manual_seed(seed)

    @property
    def passes(self) -> int:
        """Forward passes of a step. Each has a backward pass."""
        attack = self.attack
        if attack.identity:
            return 1
        steps = attack.steps if attack.kind.iterative else 1
        return steps if self.free else steps + 1

    def __call__(self, model: Any, ids: Tensor) -> float:
        """Adds the gradients of the weights to `.grad`, and returns the loss.

        Args:
            model: the model, in the mode in which it is trained.
            ids: (batch, sequence) token ids, with padding at the end of each row.
        """
        if self.attack.identity:
            loss = self.loss(model, ids)
            loss.backward()
            return loss.item()
        if self.free:
            return self._free(model, ids)
        change = self.found(model, ids) - self.clean(model, ids)
        loss = self.loss(model, ids, change)
        loss.backward()
        return loss.item()

    def clean(self, model: Any, ids: Tensor) -> Tensor:
        """(batch, sequence - 1, hidden) embeddings of the tokens that are read."""
        return capture(embedding_of(model), lambda: model(input_ids=ids[:, :-1]))

    def found(self, model: Any, ids: Tensor) -> Tensor:
        """The point that the attack finds, like `clean`. The model is in evaluation mode."""
        x = self.clean(model, ids)
        with frozen(model):
            return perturb(
                self.attack,
                x,
                lambda point: self._of_tokens(model, ids, lambda _: point).sum(1),
                elements=self._elements(ids),
                keys=self._keys(ids),
            )

    def loss(self, model: Any, ids: Tensor, change: Tensor | None = None) -> Tensor:
        """The mean cross-entropy per token, with `change` added to the embeddings."""

        def added(output: Tensor) -> Tensor:  # the embedding itself may get a gradient
            return output if change is None else output + change

        return self._of_tokens(model, ids, added).sum() / (ids[:, 1:] != self.pad).sum()

    def _of_tokens(self, model: Any, ids: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
        """(batch, sequence - 1) negative log-likelihoods; 0 for padding."""
        with edit_output(embedding_of(model), edit):
            logits = model(input_ids=ids[:, :-1]).logits
        goals, wide = ids[:, 1:], torch.promote_types(logits.dtype, torch.float32)
        of_all = F.cross_entropy(
            logits.flatten(0, 1).to(wide), goals.flatten(), ignore_index=self.pad, reduction="none"
        )
        return of_all.reshape(goals.shape)

    def _free(self, model: Any, ids: Tensor) -> float:
        attack, x = self.attack, self.clean(model, ids)
        ball = Ball.of(attack, x, elements=self._elements(ids))
        point = ball.stay(ball.drawn(ball.norm.in_ball, self._keys(ids)))
        total = 0.0
        for i in range(attack.steps):
            change = (point - x).requires_grad_(True)
            loss = self.loss(model, ids, change) / attack.steps
            loss.backward()
            total += loss.item()
            if i + 1 < attack.steps:
                assert change.grad is not None
                point = ball.step(point, change.grad, attack.step)
        return total

    def _elements(self, ids: Tensor) -> Elements:
        """The tokens that move: those that predict another."""
        return Elements(mask=ids[:, 1:] != self.pad)

    def _keys(self, ids: Tensor) -> Tensor:
        """New random keys, one for each text."""
        return torch.randint(-(2**63), 2**63 - 1, (len(ids),), generator=self._draws).to(ids.device)
