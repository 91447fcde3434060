"""Attacks: pure functions of a point and of a loss closure. They import torch and nothing else.

Importing this package does not import torch. The names and settings of attacks (`settings`) do not
need it. The other modules are imported when one of their names is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_attack.attacks.boundary import deepfool, sparsefool
    from llm_attack.attacks.closures import Known, Losses, Watch
    from llm_attack.attacks.draws import keys_for, rehashed, signs, uniform
    from llm_attack.attacks.loop import (
        Objective,
        least_likely,
        loss_gradient,
        perturb,
        perturb_each,
        trajectory,
    )
    from llm_attack.attacks.norms import NORMS, Ball, Elements, Groups, widest
    from llm_attack.attacks.settings import ATTACKS, Attack, Kind, register_attack

__all__ = [
    "ATTACKS",
    "NORMS",
    "Attack",
    "Ball",
    "Elements",
    "Groups",
    "Kind",
    "Known",
    "Losses",
    "Objective",
    "Watch",
    "deepfool",
    "keys_for",
    "least_likely",
    "loss_gradient",
    "perturb",
    "perturb_each",
    "register_attack",
    "rehashed",
    "signs",
    "sparsefool",
    "trajectory",
    "uniform",
    "widest",
]

_HOME = {
    **dict.fromkeys(("deepfool", "sparsefool"), "boundary"),
    **dict.fromkeys(("Known", "Losses", "Watch"), "closures"),
    **dict.fromkeys(("keys_for", "rehashed", "signs", "uniform"), "draws"),
    **dict.fromkeys(("Objective", "least_likely", "loss_gradient"), "loop"),
    **dict.fromkeys(("perturb", "perturb_each", "trajectory"), "loop"),
    **dict.fromkeys(("NORMS", "Ball", "Elements", "Groups", "widest"), "norms"),
    **dict.fromkeys(("ATTACKS", "Attack", "Kind", "register_attack"), "settings"),
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
