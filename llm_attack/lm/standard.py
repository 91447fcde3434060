"""Standards: conditions that are the same for everybody. So their numbers can be compared.

A version is never changed. Another number, or another attack, makes another version.
docs/standard.md gives the reason for each number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_attack.lm.units import Epsilon

# Settings that every standard fixes, whatever its loss is.
_FIXED = {
    **{"epsilon_unit": "absolute", "epsilon_max": None, "critical": False},
    **{"context": None, "positions": "all", "hookpoint": None, "hookpoints": ()},
    **{"score": "acc", "seed": 0, "encode_separately": False, "gradient_dtype": None},
    **{"steps": 10, "step_size": None, "decay": 1.0, "restarts": 1, "queries": 100},
    **{"rounds": 12, "first_epsilon": None},
}


@dataclass(frozen=True)
class Standard:
    """A version of a standard.

    Attributes:
        version: its name.
        attacks: the attacks to compare with `none`, each at every epsilon in every norm.
        epsilons: the amplitudes.
        norms: norms of the balls.
        loss: the loss that attacks raise.
    """

    version: str
    attacks: tuple[str, ...]
    epsilons: tuple[Epsilon, ...]
    norms: tuple[str, ...]
    loss: str

    @property
    def fixed(self) -> dict[str, Any]:
        """The settings of a plan that the standard fixes, by name."""
        return {**_FIXED, "loss": self.loss, "epsilons": self.epsilons, "norm": "linf"}


_EPSILONS = (Epsilon(0.004, "rms"), Epsilon(0.016, "rms"), Epsilon(0.064, "rms"))
_NORMS = ("linf", "l2_token")

STANDARDS = {
    standard.version: standard
    for standard in (
        Standard("standard-1", ("standard-1",), _EPSILONS, _NORMS, "margin"),
        Standard("standard-label-free-1", ("random", "fgsm", "bim"), _EPSILONS, _NORMS, "sequence"),
    )
}
NEWEST = {"standard": "standard-1", "standard-label-free": "standard-label-free-1"}


def version_of(name: Any) -> Any:
    """The version that a name stands for; other names are returned unchanged."""
    return NEWEST.get(name, name) if isinstance(name, str) else name
