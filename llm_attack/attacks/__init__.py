"""Attacks: pure functions of a point and of a loss closure. Imports torch alone."""

from llm_attack.attacks.boundary import deepfool, sparsefool
from llm_attack.attacks.draws import keys_for, signs, uniform
from llm_attack.attacks.loop import least_likely, loss_gradient, perturb, sweep
from llm_attack.attacks.norms import NORMS, Ball, Groups, widest
from llm_attack.attacks.settings import ATTACKS, Attack, Kind

__all__ = [
    "ATTACKS",
    "NORMS",
    "Attack",
    "Ball",
    "Groups",
    "Kind",
    "deepfool",
    "keys_for",
    "least_likely",
    "loss_gradient",
    "perturb",
    "signs",
    "sparsefool",
    "sweep",
    "uniform",
    "widest",
]
