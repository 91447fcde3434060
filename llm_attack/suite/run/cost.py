"""The cost of a batch: passes of each attack, and FLOP of a pass. Formulas: docs/scale.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_attack.attacks import Attack, Known, Losses, perturb
from llm_attack.attacks.settings import EVERY, FIRST_ORDER, SAMPLED
from llm_attack.lm.engine.clean import Needs
from llm_attack.lm.network.blocks import known_blocks
from llm_attack.lm.packing.pack import Pack


class Passes(NamedTuple):
    """The number of passes through the model, by kind.

    Attributes:
        gradients: forward and backward passes of the loss.
        losses: forward passes that compute only the loss.
        answers: forward passes that answer the questions with a perturbation.
        clean: forward passes that answer the questions without one, unless a gradient pass does so.
        first: number of gradients at the clean point, which conditions share: 1 or 0. `gradients`
            includes it.
    """

    gradients: int = 0
    losses: int = 0
    answers: int = 0
    clean: int = 0
    first: int = 0

    @property
    def forwards(self) -> int:
        """The number of all forward passes. Every backward pass has one before it."""
        return self.gradients + self.losses + self.answers + self.clean

    def plus(self, other: Passes) -> Passes:
        """The sum of both."""
        return Passes(*(a + b for a, b in zip(self, other, strict=True)))


class Tokens(NamedTuple):
    """The largest numbers of tokens that attacks can choose from.

    Attributes:
        moving: tokens of a question that may move.
        prompt: tokens of a question that may be swapped.
        vocabulary: tokens that may be taken in their place.
    """

    moving: int = 0
    prompt: int = 0
    vocabulary: int = 0


_NOTHING = Tokens()


def passes(
    attacks: Sequence[Attack],
    others: int,
    *,
    apart: bool = False,
    hookpoints: int = 1,
    tokens: Tokens = _NOTHING,
) -> Passes:
    """The passes of `Engine.compute` under all attacks.

    For a battery, and for attacks that choose tokens, it is the largest possible number.

    Args:
        attacks: the conditions at one hookpoint.
        others: number of wrong choices of the question that has the most.
        apart: whether another model computes the gradients. These passes then give no answers.
        hookpoints: number of hookpoints.
        tokens: what attacks that choose tokens can choose from.
    """
    attacks = [_in_ball(member) for attack in attacks for member in attack.members]
    needs = Needs.of(attacks)
    clean = needs.answers if hookpoints == 1 else True  # this pass gives all points
    total = Passes(gradients=1, first=1) if needs.gradient else Passes()
    if clean and (apart or not needs.gradient):
        total = total.plus(Passes(clean=1))
    if apart and needs.point and hookpoints > 1 and not needs.gradient:
        total = total.plus(Passes(clean=1))
    known = needs.answers or (needs.gradient and not apart)
    ways: dict[Attack, list[Attack]] = {}
    for attack in attacks:
        if not attack.identity:
            ways.setdefault(attack.path, []).append(attack)
    for family in ways.values():
        longest = max(family, key=lambda attack: attack.steps)
        looked = not (apart and longest.kind.gradient)  # then its losses are also its answers
        answers = int(not longest.keeps_best) if looked else len(family)
        of_family = _of_attack(longest, others, known, tokens).plus(Passes(answers=answers))
        total = total.plus(Passes(*(n * hookpoints for n in of_family)))
    return total


def fits(attacks: Sequence[Attack]) -> Passes:
    """The passes of all fits of tables: a gradient for each step, and the loss after the last."""
    fitted = [attack for attack in attacks if attack.kind.tied and attack.kind.gradient]
    return Passes(gradients=sum(attack.steps for attack in fitted), losses=len(fitted))


def _in_ball(attack: Attack) -> Attack:
    """An attack in a ball that makes the same passes to answer; its label tells conditions apart.

    For the passes of a fit, see `fits`.
    """
    if attack.cells is None:
        return attack
    alike = attack.in_ball
    name = "random" if alike.name == "none" or attack.kind.tied else alike.name
    return replace(alike, name=name, label=attack.condition)


def _of_attack(attack: Attack, others: int, clean: bool, tokens: Tokens) -> Passes:
    """The passes of one attack, counted in a trial.

    The attack runs on a point of four numbers with a linear loss. The loss crosses 0 inside the
    ball, so searches for the smallest amplitude do not end early.

    Args:
        attack: the condition.
        others: see `passes`.
        clean: whether the clean answers are known.
        tokens: see `passes`.
    """
    if attack.kind.fixed:
        return Passes()
    if attack.kind.of_tokens:
        return _of_tokens(attack, tokens)
    x = torch.zeros(1, 2, 2, dtype=torch.float64)
    counts = {True: 0, False: 0}

    def value(point: Tensor) -> Tensor:
        return point.flatten(1).sum(-1) - attack.epsilon / 3

    def loss(point: Tensor) -> Tensor:
        counts[torch.is_grad_enabled()] += 1
        return value(point)

    gap = value(x) if clean else None
    known = Known(gap=gap)
    if attack.uses_clean_gradient:
        known = Known(value(x), torch.ones_like(x), gap)
    keys = torch.zeros(1, dtype=torch.int64)
    perturb(attack, x, Losses(loss, loss, [loss] * max(1, others)), keys=keys, known=known)
    return Passes(gradients=counts[True], losses=counts[False])


def _of_tokens(attack: Attack, tokens: Tokens) -> Passes:
    """The passes of an attack that chooses tokens, if it finds nothing before its end."""
    kind, swaps = attack.kind, tokens.prompt * tokens.vocabulary
    if kind.swaps == EVERY:
        return Passes(losses=swaps)
    if kind.swaps == FIRST_ORDER:
        return Passes(losses=min(attack.candidates, swaps))
    if kind.swaps == SAMPLED:
        return Passes(attack.steps - 1, attack.steps * (attack.candidates + 1))
    # of the gradients at the clean point, one is known
    greedy = Passes(tokens.moving * (attack.steps + 1) - 2, 2 * tokens.moving)
    sets = sum(comb(tokens.moving, n) for n in range(1, attack.exact_tokens + 1))
    return greedy.plus(Passes(sets * (attack.steps - 1), 2 * sets))


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that the FLOP of a pass depend on.

    Attributes:
        blocks: weights that are multiplied with every token.
        head: weights that are multiplied with every position that is read.
        attention: width of all queries of a token, summed over layers.
        vocabulary: outputs of the head.
        widest: largest width within a block.
        recomputed: whether the backward pass repeats the forward pass (gradient checkpointing). It
            leaves out the last product of each block, which is counted here nevertheless.
    """

    blocks: int
    head: int
    attention: int
    vocabulary: int
    widest: int
    recomputed: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel, recomputed: bool = False) -> Sizes:
        """The sizes of `model`."""
        matrices = [p for b in known_blocks(model) for p in b.parameters() if p.dim() > 1]
        config = model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", 0)
        usual = getattr(config, "hidden_size", 0) // max(1, heads)
        width = heads * (getattr(config, "head_dim", None) or usual)
        head = model.get_output_embeddings()
        rows, columns = (0, 0) if head is None else head.weight.shape
        return cls(
            sum(p.numel() for p in {id(p): p for p in matrices}.values()),
            rows * columns,
            getattr(config, "num_hidden_layers", 0) * width,
            rows,
            max((max(p.shape) for p in matrices), default=0),
            recomputed,
        )

    def forward(self, pack: Pack, positions: int) -> int:
        """FLOP of a forward pass of `pack` that reads this number of positions."""
        products = self.blocks * pack.inputs.tokens.numel() + self.head * positions
        return 2 * products + 4 * _pairs(pack) * self.attention

    def prefix(self, pack: Pack) -> int:
        """FLOP of computing the prefix of `pack`."""
        n = len(pack.prefix)
        return 2 * self.blocks * n + 4 * n**2 * self.attention

    def backward(self, pack: Pack, positions: int) -> int:
        """FLOP of the gradient with respect to the point; weights get no gradient."""
        again = self.forward(pack, 0) if self.recomputed else 0
        return self.forward(pack, positions) + 4 * _pairs(pack) * self.attention + again

    def gradient(self, pack: Pack, positions: int, once: bool = False) -> int:
        """FLOP of a forward and a backward pass; with `once`, shared parts of rows count once."""
        whole = self.forward(pack, positions) + self.backward(pack, positions)
        if not once or pack.twins is None:
            return whole
        tokens = pack.inputs.tokens.numel() - len(pack.twins.first)
        entries = positions - len(pack.twins.entries.slot)
        return whole - 2 * self.blocks * tokens - 4 * self.head * entries


def _pairs(pack: Pack) -> int:
    """Number of (query, key) pairs of tokens. Masked pairs count, because kernels compute them."""
    return pack.inputs.tokens.numel() * pack.input_ids.shape[1]
