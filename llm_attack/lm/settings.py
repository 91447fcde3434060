"""The arguments of `attacked-hf` that `hf` does not have: names, defaults, validation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from llm_attack.attacks import Attack
from llm_attack.errors import UsageError, invalid
from llm_attack.lm.losses import LOSSES, SCORES
from llm_attack.lm.surface import ThreatModel

CONTEXTS = ("own", "shared")
RMS = "rms"
EPSILON_UNITS = ("absolute", RMS)
PACKINGS = ("auto", "tree", "off")


@dataclass(frozen=True)
class AttackSettings:
    """How `attacked-hf` attacks; the README explains each argument.

    Raises:
        UsageError: a value is not allowed, or two do not go together.
    """

    attack: str = "fgsm"
    epsilon: float | str = 0.01
    epsilon_unit: str = "absolute"
    steps: int = 10
    step_size: float | None = None
    loss: str = "sequence"
    score: str = "acc"
    context: str | None = None
    hookpoint: str | None = None
    seed: int = 0
    attack_in_units: Attack = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.attack is None:  # what lm-eval makes of `attack=none` in a string of arguments
            object.__setattr__(self, "attack", "none")
        epsilon, unit = amplitude(self.epsilon)
        object.__setattr__(self, "epsilon", epsilon)
        if unit is not None:
            object.__setattr__(self, "epsilon_unit", unit)
        attack = Attack(self.attack, epsilon, self.steps, self.step_size)
        if self.epsilon_unit == RMS:
            attack = replace(attack, label=f"{epsilon:g}{RMS}")
        object.__setattr__(self, "attack_in_units", attack)
        for argument, allowed in (
            ("epsilon_unit", EPSILON_UNITS),
            ("loss", LOSSES),
            ("score", SCORES),
        ):
            if getattr(self, argument) not in allowed:
                raise invalid(argument, getattr(self, argument), allowed)
        if self.context is None:
            object.__setattr__(self, "context", "shared" if self.loss == "choice" else "own")
        if self.context not in CONTEXTS:
            raise invalid("context", self.context, CONTEXTS)
        if self.loss == "choice" and self.context == "own":
            raise UsageError(
                "context=own: must be shared with loss=choice, which has one perturbation per"
                " question"
            )
        if self.loss != "choice" and attack.kind.targeted:
            raise UsageError(
                f"attack={self.attack}: steps towards the least likely choice, so it needs"
                f" loss=choice, not loss={self.loss}"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise invalid("seed", self.seed, "an integer")
        if self.hookpoint is not None and not isinstance(self.hookpoint, str):
            raise invalid("hookpoint", self.hookpoint, "the dotted path of a module")

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel(self.loss, self.context == "shared", self.seed)

    def resolved(self, rms: float) -> Attack:
        """The attack in the units of the point, given the root mean square of its signal."""
        return self.attack_in_units.scaled(rms if self.epsilon_unit == RMS else 1.0)

    def arguments(self) -> dict[str, Any]:
        """All arguments with their values."""
        values = asdict(self)
        del values["attack_in_units"]
        return values


@dataclass(frozen=True)
class EngineSettings:
    """How `attacked-hf` computes; the numbers do not depend on it.

    Args:
        packing: "tree": tokens that a question's requests share are computed once; "off": every
            request has a row; "auto": trees, if a trial shows that the model takes them.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        compile: torch.compile for the layers.

    Raises:
        UsageError: a value is not allowed.
    """

    packing: str = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.packing not in PACKINGS:
            raise invalid("packing", self.packing, PACKINGS)
        for argument in ("gradient_checkpointing", "compile"):
            if not isinstance(getattr(self, argument), bool):
                raise invalid(argument, getattr(self, argument), ("True", "False"))


def amplitude(epsilon: Any) -> tuple[Any, str | None]:
    """(number, unit) of an epsilon: 0.7 and "rms" of "0.7rms"; as it is and None of a number.

    Raises:
        UsageError: it is a text that is not of that form.
    """
    if not isinstance(epsilon, str):
        return epsilon, None
    try:
        return float(epsilon.removesuffix(RMS)), RMS if epsilon.endswith(RMS) else None
    except ValueError:
        allowed = "a finite number, at least 0, or one in units of the RMS, such as 0.7rms"
        raise invalid("epsilon", epsilon, allowed) from None


Settings = TypeVar("Settings", AttackSettings, EngineSettings)


def split_arguments(
    arguments: dict[str, Any], kind: type[Settings]
) -> tuple[Settings, dict[str, Any]]:
    """Settings of `kind` from the arguments that are its own, and the other arguments."""
    own = {f.name for f in fields(kind) if f.init}
    settings = kind(**{k: v for k, v in arguments.items() if k in own})
    return settings, {k: v for k, v in arguments.items() if k not in own}
