"""The settings of `llm-attack train`. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_attack.base.declare import check, setting
from llm_attack.base.errors import UsageError, hint
from llm_attack.lm.units import Epsilon
from llm_attack.suite.plan import Plan

FREELB, PLAIN = "freelb", "none"
METHODS = ("fgsm", "bim", "pgd", "mifgsm", FREELB)
_OF_STEPS = ("steps", "step_size")
_OF_ATTACK = ("norm", "epsilon_unit", *_OF_STEPS)


@dataclass(frozen=True)
class Training:
    """The settings of a training, apart from those of the model and the attack.

    Raises:
        UsageError: a value is not allowed.
    """

    against: str = setting(
        "pgd@0.02rms",
        f"Attack to train against ({', '.join(METHODS)}) and its epsilon. With none, the training"
        " is plain",
        group="training",
    )
    text: str | None = setting(
        None,
        "File with a training text in each line. The default for the bundled model is the text of"
        " its own world",
        group="training",
    )
    updates: int = setting(100, "Number of updates of the weights", minimum=1, group="training")
    batch_size: int = setting(64, "Number of texts of an update", minimum=1, group="training")
    learning_rate: float = setting(
        1e-3,
        "Largest learning rate of AdamW",
        minimum=0.0,
        exclusive_minimum=True,
        group="training",
    )
    lora: int | None = setting(
        None,
        "Rank of a LoRA adapter of all linear layers, which is trained instead of the weights."
        " Needs peft",
        minimum=1,
        group="training",
    )

    def __post_init__(self) -> None:
        check(self)
        self.attack  # noqa: B018

    @property
    def attack(self) -> tuple[str, Epsilon | None]:
        """The name of the attack and its epsilon; None without an attack."""
        name, _, number = self.against.partition("@")
        if self.against == PLAIN:
            return PLAIN, None
        allowed = f"must be none, or one of {', '.join(METHODS)} and an epsilon, as in pgd@0.02rms"
        if name not in METHODS or not number:
            meant = hint(name, METHODS) if name not in METHODS else ""
            raise UsageError(f"against={self.against}: {allowed}{meant}")
        epsilon = Epsilon.parse(number, "against")
        if not epsilon.number > 0:
            raise UsageError(
                f"against={self.against}: must have an epsilon above 0; for plain training, give"
                " none"
            )
        return name, epsilon

    def plan(self, settings: Mapping[str, Any]) -> Plan:
        """The plan with the model and with the attack of this training.

        Args:
            settings: settings of `Plan`.
        """
        name, epsilon = self.attack
        given: dict[str, Any] = {"model": "demo", **settings}
        given["attacks"] = ["pgd" if name == FREELB else name]
        unread = {PLAIN: _OF_ATTACK, "fgsm": _OF_STEPS}.get(name, ())
        for key in unread:
            if key in settings:
                raise UsageError(
                    f"{key}={_shown(settings[key])}: must be left out with against={self.against},"
                    " which does not use it"
                )
        if len(_parts(settings.get("steps"))) > 1:
            raise UsageError(f"steps={_shown(settings['steps'])}: must be one number")
        if epsilon is None:
            return Plan(**given)
        steps = {} if "steps" in unread else {"steps": 3}
        return Plan(**{**steps, **given}, epsilons=[epsilon])


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _shown(value: Any) -> str:
    return ",".join(map(str, _parts(value)))
