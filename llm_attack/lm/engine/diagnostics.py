"""Sums that describe a condition. They add up over batches and processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log10

import torch
from torch import Tensor

from llm_attack.attacks import Attack, Ball, widest
from llm_attack.attacks.draws import words

# Share of a perturbation that may be lost to rounding without a warning.
MUCH_LOST = 0.01
# Share of examples that may stay at the clean point without a warning.
MUCH_STILL = 0.01
# A perturbation that reaches less than this share of its amplitude gives a warning.
LEAST_REACHED = 0.5
# One of so many tokens is looked up in the vocabulary, on the average.
ONE_IN = 8


@dataclass
class Diagnostics:
    """Sums over all tokens that a condition could perturb.

    Attributes:
        signal, noise: sums of squares of the clean point and of the perturbation.
        elements: coordinates of the points.
        zero_gradients: coordinates where a gradient was exactly zero or NaN, so no step was made.
        gradients: coordinates of all gradients.
        slopes: gradients of examples whose loss can change.
        flat: the part of `slopes` that was zero or NaN in every coordinate.
        tokens: tokens that were looked up in the vocabulary (`Nearest`). They are a sample
            (`sampled`), and only counted if the points are embeddings.
        nearest_l2, nearest_linf: those `tokens` that no other token's embedding is nearer to.
        steps, lost: coordinates where a step from the clean point was tried, in either direction,
            and those that it would have moved by less than half of its length, because
            neighbouring numbers are so far apart. The step has the same length in all coordinates.
        examples, still: questions, or requests if each is attacked by itself, and those that did
            not move at all. Attacks that look for the nearest point do not count.
        balls, reached: perturbations with one bound (of an example or a token), and the sum of
            their lengths, as shares of the requested length and at most 1. Only attacks that go as
            far as they can count.
        rounding: for attacks in cells, the sum of squares of the format's own rounding errors.
        way: the sum of squares of the distance from the middle of the cells.
        along: the sum of products of these errors and this distance.
        widths: the sum of squares of the widths of the cells.
        not_finite: answers whose log-likelihood is infinite or NaN.
        points: questions, or requests if each is attacked by itself.
        forwards, backwards: for each of the `points`, the passes that this condition makes if it
            is run by itself; of a battery, the passes of its attacks.
    """

    signal: float = 0.0
    noise: float = 0.0
    elements: float = 0.0
    zero_gradients: float = 0.0
    gradients: float = 0.0
    slopes: float = 0.0
    flat: float = 0.0
    steps: float = 0.0
    lost: float = 0.0
    examples: float = 0.0
    still: float = 0.0
    balls: float = 0.0
    reached: float = 0.0
    rounding: float = 0.0
    way: float = 0.0
    along: float = 0.0
    widths: float = 0.0
    not_finite: float = 0.0
    tokens: float = 0.0
    nearest_l2: float = 0.0
    nearest_linf: float = 0.0
    points: float = 0.0
    forwards: float = 0.0
    backwards: float = 0.0

    def add(self, sums: Mapping[str, float]) -> None:
        """Adds values to the sums with these names."""
        for name, value in sums.items():
            setattr(self, name, getattr(self, name) + value)

    def report(self) -> dict[str, float | None]:
        """The diagnostics by name, as `run.json` has them; docs/numbers.md explains each.

        They are the signal-to-noise ratio (of power, and in dB), the RMS of both, the number of
        answers that are not finite, and these shares:

        - coordinates without a gradient, and gradients that are zero everywhere
        - steps lost to rounding
        - examples that did not move
        - the amplitude that was reached, as a share of the requested one
        - tokens that are still nearest to their own embedding

        The passes are the mean for one question, or for one request.
        """
        snr = _ratio(self.signal, self.noise)
        signal, noise = _ratio(self.signal, self.elements), _ratio(self.noise, self.elements)
        return {
            "signal_rms": None if signal is None else signal**0.5,
            "noise_rms": None if noise is None else noise**0.5,
            "snr": snr,
            "snr_db": 10 * log10(snr) if snr else None,
            "zero_gradient_fraction": _ratio(self.zero_gradients, self.gradients),
            "flat_gradient_fraction": _ratio(self.flat, self.slopes),
            "lost_to_rounding": _ratio(self.lost, self.steps),
            "not_perturbed": _ratio(self.still, self.examples),
            "amplitude_reached": _ratio(self.reached, self.balls),
            "not_finite": int(self.not_finite),
            "nearest_token_unchanged": _ratio(self.nearest_l2, self.tokens),
            "nearest_token_unchanged_linf": _ratio(self.nearest_linf, self.tokens),
            "nearest_token_sample": int(self.tokens) or None,
            "forward_passes": _ratio(self.forwards, self.points),
            "backward_passes": _ratio(self.backwards, self.points),
            **self._of_cells(),
        }

    def _of_cells(self) -> dict[str, float | None]:
        """The diagnostics of attacks in rounding cells: nothing for other attacks.

        The first two are the RMS of half a cell and of the format's own rounding. The others
        compare this rounding with the way from the middle of the cells to the attacked point: their
        cosine, and the projection of the rounding on that way, as a share of the way.
        """
        if not self.widths:
            return {}
        half, own = self.widths / 4 / self.elements, self.rounding / self.elements
        return {
            "half_cell_rms": half**0.5,
            "rounding_rms": own**0.5,
            "rounding_cosine": _ratio(self.along, (self.rounding * self.way) ** 0.5),
            "rounding_along": _ratio(self.along, self.way),
        }

    def warnings(self) -> list[str]:
        """The reasons to doubt the numbers of the condition, one sentence each."""
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
    """Sums of `Diagnostics`: how far the examples moved, and how much of a step rounding takes.

    The step here has the same length in all coordinates. A step of an attack in L2 is longer in
    some coordinates, so it loses less. Its total loss shows in how far the examples moved.

    Args:
        attack: the attack.
        ball: its ball.
        noise: the perturbation, like the point.
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
    if kind.inside is not None:  # its lengths are not those of a ball
        sums = {}
    if kind.swaps:  # its epsilon is a number of tokens
        return {}
    if kind.minimal or kind.sparse:  # it moves only right answers, and no more than needed
        return sums
    sums |= {"examples": torch.full_like(still, ball.examples.n), "still": still}
    if kind.adaptive or kind.search or kind.inside is not None:  # it may stay inside of the ball
        return sums
    length = attack.epsilon
    if kind.iterative and kind.start is None:
        length = min(length, attack.steps * attack.step)
    shares = ball.norm.length(noise / ball.sized(length), ball.balls).clamp(max=1)
    moving = ball.balls.largest(even) > 0
    reached = torch.where(moving, shares, 0).sum()
    return sums | {"balls": moving.sum(dtype=wide), "reached": reached}


def sampled(keys: Tensor, x: Tensor) -> Tensor:
    """The tokens of a point that are looked up: booleans of shape x.shape[:-1].

    One token of `ONE_IN` is chosen by a hash of its own key, so the batch does not matter.

    Args:
        keys: the `Pack.keys` of rows or of tokens.
        x: the point.
    """
    hashes = words(keys, x[..., :1])[..., 0]
    return hashes % ONE_IN == 0


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
