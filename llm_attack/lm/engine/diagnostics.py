"""Sums over all that a condition did, which add up over batches and processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log10

import torch
from torch import Tensor

from llm_attack.attacks import Attack, Ball, widest
from llm_attack.attacks.draws import words

# Share of a perturbation that may be lost to rounding without a word.
MUCH_LOST = 0.01
# Share of examples that may stay where they are without a word.
MUCH_STILL = 0.01
# Share of the amplitude asked for that a perturbation has at least, or a reader is told.
LEAST_REACHED = 0.5
# Of so many tokens one is looked up in the vocabulary, on the average.
ONE_IN = 8


@dataclass
class Diagnostics:
    """Sums over all tokens that a condition could perturb.

    Attributes:
        signal, noise: sums of squares of the clean point and of the perturbation.
        elements: coordinates of the points.
        zero_gradients: coordinates where a gradient was exactly zero (or NaN): no step was made.
        gradients: coordinates of all gradients taken.
        tokens: that were looked up in the vocabulary (`Nearest`), where the points are embeddings;
            a sample (`sampled`).
        steps, lost: coordinates where a step from the clean point was tried, in either direction,
            and those of them that it would have moved by less than half of it, because the numbers
            there are that far apart. The step is as long in every coordinate.
        examples, still: questions, or requests where each is attacked alone, and those of them that
            did not move at all. Not of attacks that look for the nearest point.
        balls, reached: perturbations that are bounded together (of an example, or of a token), and
            the sum of their lengths, as shares of the length that was asked for and at most 1. Of
            attacks that go as far as they can.
        not_finite: answers whose log-likelihood is infinite or NaN.
        nearest_l2, nearest_linf: those of them that no other token's embedding is nearer to.
    """

    signal: float = 0.0
    noise: float = 0.0
    elements: float = 0.0
    zero_gradients: float = 0.0
    gradients: float = 0.0
    steps: float = 0.0
    lost: float = 0.0
    examples: float = 0.0
    still: float = 0.0
    balls: float = 0.0
    reached: float = 0.0
    not_finite: float = 0.0
    tokens: float = 0.0
    nearest_l2: float = 0.0
    nearest_linf: float = 0.0

    def add(self, sums: Mapping[str, float]) -> None:
        """Adds to the sums of these names."""
        for name, value in sums.items():
            setattr(self, name, getattr(self, name) + value)

    def report(self) -> dict[str, float | None]:
        """Signal-to-noise ratio (power, and in dB), RMS of both, share of zero gradients, of steps
        lost to rounding, of examples that did not move, of the amplitude asked for that was
        reached, and of tokens still nearest to their own embedding; answers not finite.
        """
        snr = _ratio(self.signal, self.noise)
        signal, noise = _ratio(self.signal, self.elements), _ratio(self.noise, self.elements)
        return {
            "signal_rms": None if signal is None else signal**0.5,
            "noise_rms": None if noise is None else noise**0.5,
            "snr": snr,
            "snr_db": 10 * log10(snr) if snr else None,
            "zero_gradient_fraction": _ratio(self.zero_gradients, self.gradients),
            "lost_to_rounding": _ratio(self.lost, self.steps),
            "not_perturbed": _ratio(self.still, self.examples),
            "amplitude_reached": _ratio(self.reached, self.balls),
            "not_finite": int(self.not_finite),
            "nearest_token_unchanged": _ratio(self.nearest_l2, self.tokens),
            "nearest_token_unchanged_linf": _ratio(self.nearest_linf, self.tokens),
            "nearest_token_sample": int(self.tokens) or None,
        }

    def warnings(self) -> list[str]:
        """What speaks against the numbers of the condition, a sentence each."""
        messages = []
        if self.not_finite:
            messages.append(
                f"{self.not_finite:.0f} answers have a log-likelihood that is not finite"
            )
        still = _ratio(self.still, self.examples) or 0.0
        if still == 1:
            messages.append("nothing was perturbed: the answers are those without an attack")
        elif still > MUCH_STILL:
            messages.append(
                f"{self.still:.0f} of {self.examples:.0f} points were not perturbed at all (a"
                " point is a request, or a question whose requests share a perturbation)"
            )
        reached = _ratio(self.reached, self.balls)
        if still < 1 and reached is not None and reached < LEAST_REACHED:
            messages.append(f"the perturbation reached {100 * reached:.2g} % of its amplitude")
        lost = _ratio(self.lost, self.steps) or 0.0
        if lost > MUCH_LOST:
            messages.append(
                f"{100 * lost:.0f} % of the perturbation is lost to rounding: epsilon is smaller"
                " than the distance between numbers of the model's dtype"
            )
        return messages


def moved(attack: Attack, ball: Ball, noise: Tensor) -> dict[str, Tensor]:
    """How far the examples moved, and how much of a step rounding takes: sums of `Diagnostics`.

    A step here is as long in every coordinate. That of an attack in L2 is longer in some, so that
    it loses less; what it loses in all is seen in how far the examples moved.

    Args:
        attack: what moved them.
        ball: where it did.
        noise: by how much, like the point.
    """
    x, kind, wide = ball.x, attack.kind, widest(ball.x.device)
    even = ball.norm.direction(ball.moves.expand_as(x).to(wide), ball.balls)
    step = even * ball.sized(attack.step)
    ends = [(x + s.to(x.dtype)).to(wide) - x.to(wide) for s in (step, -step)]
    lost = sum(((end.abs() < step.abs() / 2) & ball.moves).sum(dtype=wide) for end in ends)
    still = (ball.examples.largest(noise) == 0).sum(dtype=wide)
    sums = {
        "steps": 2 * ball.moves.expand_as(x).sum(dtype=wide),
        "lost": torch.as_tensor(lost),
    }
    if kind.minimal:  # which moves what is right, and no farther than it must
        return sums
    sums |= {"examples": torch.full_like(still, ball.examples.n), "still": still}
    if kind.adaptive or kind.search:  # which may stay inside of the ball
        return sums
    length = attack.epsilon
    if kind.iterative and kind.start is None:
        length = min(length, attack.steps * attack.step)
    shares = ball.norm.length(noise / ball.sized(length), ball.balls).clamp(max=1)
    moving = ball.balls.largest(even) > 0
    reached = torch.where(moving, shares, 0).sum()
    return sums | {"balls": moving.sum(dtype=wide), "reached": reached}


def sampled(keys: Tensor, x: Tensor) -> Tensor:
    """Which tokens of a point are looked up: booleans of shape x.shape[:-1].

    One of `ONE_IN`, by a hash of the token's own key: whatever batch it is in.

    Args:
        keys: of `Pack.keys`: of rows, or of tokens.
        x: the point.
    """
    hashes = words(keys, x[..., :1])[..., 0]
    return hashes % ONE_IN == 0


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
