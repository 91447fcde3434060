"""Randomised smoothing of a question's choice: the settings of the noise. Needs no torch.

Cohen, Rosenfeld and Kolter 2019, "Certified adversarial robustness via randomized smoothing"
(arXiv 1902.02918). `suite.analysis.certified` makes certificates of the votes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llm_attack.lm.units import ABSOLUTE, Epsilon, Signal, size_of


@dataclass(frozen=True)
class Smoothing:
    """Gaussian noise under which a model votes on a question's choices.

    Attributes:
        sigmas: standard deviations of the noise in each coordinate, each with its unit.
        selection_draws: number of draws that select the choice to certify; Cohen's n0.
        draws: number of other draws that certify it; Cohen's n.
    """

    sigmas: tuple[Epsilon, ...]
    selection_draws: int
    draws: int

    @property
    def total(self) -> int:
        """The number of draws for each sigma."""
        return self.selection_draws + self.draws

    def resolved(self, signal: Signal) -> Smoothing:
        """The same with sigmas in the units of the point."""
        sizes = [s.number * size_of(s.unit or ABSOLUTE, signal, "linf") for s in self.sigmas]
        return replace(self, sigmas=tuple(Epsilon(size, ABSOLUTE) for size in sizes))
