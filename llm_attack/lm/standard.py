"""Standards: conditions that are the same for everybody, so that their numbers can be compared.

A version is never changed. Another number, or another attack, makes another version.
docs/standard.md says why each number was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_attack.lm.units import Epsilon

# What no standard leaves open, whatever its loss is.
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
        attacks: compared with `none`, each at every epsilon in every norm.
        epsilons: amplitudes.
        norms: of the balls.
        loss: that attacks raise.
    """

    version: str
    attacks: tuple[str, ...]
    epsilons: tuple[Epsilon, ...]
    norms: tuple[str, ...]
    loss: str

    @property
    def fixed(self) -> dict[str, Any]:
        """The settings of a plan that it decides, by name."""
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
    """The version that a name stands for; other names as they are."""
    return NEWEST.get(name, name) if isinstance(name, str) else name
