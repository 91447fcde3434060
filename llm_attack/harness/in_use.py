"""The conditions that a model is attacked with, their engine and their diagnostics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_attack.lm.engine.diagnostics import Diagnostics
from llm_attack.lm.engine.engine import Engine
from llm_attack.lm.settings import AttackSettings, unread
from llm_attack.lm.units import Signal


@dataclass(frozen=True)
class InUse:
    """The conditions that a model is attacked with. `AttackedHFLM.use` makes it.

    Attributes:
        conditions: the settings of each condition.
        signals: for each condition, the scale of the activations that it perturbs.
        engine: answers under all conditions.
        text: the tokens for the check of the gradient.
        diagnostics: for each condition, of the answers of this process so far.
    """

    conditions: tuple[AttackSettings, ...]
    signals: tuple[Signal, ...]
    engine: Engine
    text: tuple[int, ...]
    diagnostics: list[Diagnostics] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.diagnostics.extend(self.no_diagnostics())

    def no_diagnostics(self) -> list[Diagnostics]:
        """Empty diagnostics for each condition."""
        return [Diagnostics() for _ in self.conditions]

    def add(self, sums: Sequence[Mapping[str, float]]) -> None:
        """Adds values to the diagnostics of each condition."""
        for diagnostics, of_condition in zip(self.diagnostics, sums, strict=False):
            diagnostics.add(of_condition)

    def warnings(self, diagnostics: Sequence[Diagnostics]) -> list[str]:
        """Warnings about the conditions for a reader of the results.

        Args:
            diagnostics: the diagnostics of each condition.
        """
        attacks = {condition.attack for condition in self.conditions}
        sentences = [
            f"{name}={value}: has no effect, because no attack of this run uses it"
            for name, value, _ in unread(self.conditions[0], attacks)
        ]
        for asked, attack, of_attack in zip(
            self.conditions, self.engine.attacks, diagnostics, strict=True
        ):
            more = of_attack.warnings()
            if attack.name != "none" and attack.epsilon == 0 < asked.attack_in_units.epsilon:
                unit = asked.amplitude.epsilon.unit
                more.append(f"nothing was perturbed: the unit {unit} is 0 at this hookpoint")
            sentences += [f"{attack.condition}: {sentence}" for sentence in more]
        return sentences

    def info(
        self, condition: int, diagnostics: Diagnostics, gradient_dtype: str | None
    ) -> dict[str, Any]:
        """Resolved settings and diagnostics of a condition; see docs/numbers.md.

        Args:
            condition: number of the condition.
            diagnostics: its diagnostics.
            gradient_dtype: dtype of the copy that computes gradients; None: there is no copy.
        """
        settings, attack = self.conditions[condition], self.engine.attacks[condition]
        follows = attack.kind.gradient and not attack.identity
        rms = "embedding_rms" if settings.hookpoint is None else "hookpoint_rms"
        return {
            **settings.arguments(),
            "condition": attack.condition,
            "steps": attack.steps if attack.kind.iterative else None,
            "step_size": attack.step if attack.kind.iterative else None,
            "decay": attack.decay if attack.kind.momentum else None,
            "epsilon_absolute": attack.epsilon,
            rms: self.signals[condition].rms,
            "gradient_dtype": gradient_dtype if follows else None,
            **diagnostics.report(),
        }
