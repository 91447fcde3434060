"""The engine: batches of questions through the clean model and through every condition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import log10

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from llm_attack.attacks import Attack
from llm_attack.lm.pack import pack_rows
from llm_attack.lm.questions import Question, batches
from llm_attack.lm.scoring import Scorer
from llm_attack.lm.surface import Surface, ThreatModel

Answer = tuple[float, bool]


@dataclass
class Diagnostics:
    """What a condition did, summed over all tokens that it could perturb.

    Attributes:
        signal, noise: sums of squares of the clean point and of the perturbation.
        elements: coordinates of the points.
        zero_gradients: coordinates where a gradient was exactly zero (or NaN): no step was made.
        gradients: coordinates of all gradients taken.
    """

    signal: float = 0.0
    noise: float = 0.0
    elements: float = 0.0
    zero_gradients: float = 0.0
    gradients: float = 0.0

    def add(self, sums: Iterable[float]) -> None:
        for name, value in zip(vars(self).copy(), sums, strict=True):
            setattr(self, name, getattr(self, name) + value)

    def report(self) -> dict[str, float | None]:
        """Signal-to-noise ratio (power, and in dB), RMS of both, share of zero gradients."""
        some = self.elements > 0
        noisy = self.noise > 0
        return {
            "signal_rms": (self.signal / self.elements) ** 0.5 if some else None,
            "noise_rms": (self.noise / self.elements) ** 0.5 if some else None,
            "snr": self.signal / self.noise if noisy else None,
            "snr_db": 10 * log10(self.signal / self.noise) if noisy else None,
            "zero_gradient_fraction": (
                self.zero_gradients / self.gradients if self.gradients else None
            ),
        }


@dataclass
class Engine:
    """Answers questions under a list of attacks.

    Args:
        scorer: the model.
        attacks: with epsilons in the units of the point.
        threat: loss and context of the attacks.
        device: where packs are put.
        pad: token id for padding; its value has no influence.
    """

    scorer: Scorer
    attacks: Sequence[Attack]
    threat: ThreatModel
    device: torch.device
    pad: int = 0
    diagnostics: list[Diagnostics] = field(init=False)

    def __post_init__(self) -> None:
        self.diagnostics = [Diagnostics() for _ in self.attacks]

    def run(
        self, questions: Iterable[Question], rows: int
    ) -> Iterator[tuple[Question, list[list[Answer]]]]:
        """Yields each question with its answers: for each attack, one per request.

        A batch holds at most `rows` requests (but always a whole question); when memory runs out,
        half as many from then on.
        """
        waiting = batches(questions, rows)[::-1]
        while waiting:
            batch = waiting.pop()
            try:
                answers = self.answer(batch)
            except Exception as error:
                if len(batch) == 1 or not should_reduce_batch_size(error):
                    raise
                answers = None  # what the traceback keeps alive is free only after the handler
            if answers is None:
                clear_device_cache(garbage_collection=True)
                rows = max(1, sum(len(q.requests) for q in batch) // 2)
                waiting = batches([q for b in [batch, *waiting] for q in b], rows)[::-1]
                continue
            at = 0
            for question in batch:
                end = at + len(question.requests)
                yield question, [of_attack[at:end] for of_attack in answers]
                at = end

    def answer(self, questions: Sequence[Question]) -> list[list[Answer]]:
        """For each attack, the answers to all requests of one batch, in order."""
        pack = pack_rows(questions, self.pad).to(self.device)
        surface = Surface(self.scorer, pack, self.threat)
        if any(a.uses_clean_gradient for a in self.attacks):
            _ = surface.gradient  # its forward gives the clean answers too
        results: list[tuple[Tensor, Tensor]] = []
        sums: list[Tensor | None] = []
        for attack in self.attacks:
            if attack.identity:
                results.append(surface.clean)
                sums.append(None)
            else:
                adversarial, of_attack = surface.attack(attack)
                results.append(surface.answers(adversarial))
                sums.append(of_attack)
        log_likelihoods = torch.stack([ll for ll, _ in results]).tolist()
        greedy = torch.stack([g for _, g in results]).tolist()
        for totals, of_condition in zip(self.diagnostics, sums, strict=True):
            if of_condition is not None:
                totals.add(of_condition.tolist())
        return [list(zip(*both, strict=True)) for both in zip(log_likelihoods, greedy, strict=True)]
