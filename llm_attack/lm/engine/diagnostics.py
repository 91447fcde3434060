"""Sums over all that a condition did, which add up over batches and processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log10

# Share of a perturbation that may be lost to rounding without a word.
MUCH_LOST = 0.01
# Share of examples that may stay where they are without a word.
MUCH_STILL = 0.01
# Share of the amplitude asked for that a perturbation has at least, or a reader is told.
LEAST_REACHED = 0.5


@dataclass
class Diagnostics:
    """Sums over all tokens that a condition could perturb.

    Attributes:
        signal, noise: sums of squares of the clean point and of the perturbation.
        elements: coordinates of the points.
        zero_gradients: coordinates where a gradient was exactly zero (or NaN): no step was made.
        gradients: coordinates of all gradients taken.
        tokens: that were looked up in the vocabulary (`Nearest`), where the points are embeddings.
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
        }

    def warnings(self) -> list[str]:
        """What speaks against the numbers of the condition, a sentence each."""
        found = []
        if self.not_finite:
            found.append(f"{self.not_finite:.0f} answers have a log-likelihood that is not finite")
        still = _ratio(self.still, self.examples) or 0.0
        if still == 1:
            found.append("nothing was perturbed: the answers are those without an attack")
        elif still > MUCH_STILL:
            found.append(
                f"{self.still:.0f} of {self.examples:.0f} points were not perturbed at all (each a"
                " request, or a question where its requests share a perturbation)"
            )
        reached = _ratio(self.reached, self.balls)
        if still < 1 and reached is not None and reached < LEAST_REACHED:
            found.append(
                f"the perturbation has {100 * reached:.2g} % of the amplitude that was asked for"
            )
        lost = _ratio(self.lost, self.steps) or 0.0
        if lost > MUCH_LOST:
            found.append(
                f"{100 * lost:.0f} % of the perturbation is lost to rounding: epsilon is below what"
                " the model's dtype can tell apart there"
            )
        return found


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
