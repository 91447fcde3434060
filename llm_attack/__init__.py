"""Adversarial perturbations of embeddings for lm-evaluation-harness.

Importing the package costs nothing: torch and transformers are imported by the parts that use them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llm_attack.attacks import Attack, perturb
    from llm_attack.harness.model import AttackedHFLM
    from llm_attack.suite.evaluate import evaluate
    from llm_attack.suite.plan import Plan
    from llm_attack.suite.results import Result
    from llm_attack.suite.standard import robust_accuracy
    from llm_attack.suite.studies.card import load_card

__all__ = [
    "Attack",
    "AttackedHFLM",
    "Plan",
    "Result",
    "evaluate",
    "load_card",
    "perturb",
    "robust_accuracy",
]

_HOME = {
    "Attack": "llm_attack.attacks",
    "AttackedHFLM": "llm_attack.harness.model",
    "Plan": "llm_attack.suite.plan",
    "Result": "llm_attack.suite.results",
    "evaluate": "llm_attack.suite.evaluate",
    "load_card": "llm_attack.suite.studies.card",
    "perturb": "llm_attack.attacks",
    "robust_accuracy": "llm_attack.suite.standard",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
