"""What a model is attacked with: conditions, the engine that answers under them, diagnostics."""

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
    """What the model is attacked with, all of it made together by `AttackedHFLM.use`.

    Attributes:
        conditions: their settings.
        signals: for each, the scale of what it perturbs.
        engine: what answers under all of them.
        text: tokens that the gradient is tried on.
        diagnostics: of what this process answered so far, for each.
    """

    conditions: tuple[AttackSettings, ...]
    signals: tuple[Signal, ...]
    engine: Engine
    text: tuple[int, ...]
    diagnostics: list[Diagnostics] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.diagnostics.extend(self.no_diagnostics())

    def no_diagnostics(self) -> list[Diagnostics]:
        """Those of nothing."""
        return [Diagnostics() for _ in self.conditions]

    def add(self, sums: Sequence[Mapping[str, float]]) -> None:
        """Adds what conditions add to their diagnostics."""
        for diagnostics, of_condition in zip(self.diagnostics, sums, strict=False):
            diagnostics.add(of_condition)

    def warnings(self, diagnostics: Sequence[Diagnostics]) -> list[str]:
        """What a reader of the results should know of the conditions.

        Args:
            diagnostics: of each.
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
            condition: its number.
            diagnostics: of it.
            gradient_dtype: of the copy whose gradient attacks follow; None: there is none.
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
