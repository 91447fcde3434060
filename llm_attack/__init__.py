"""Adversarial perturbations of embeddings for lm-evaluation-harness.

Importing the package costs nothing: torch and transformers are imported by the parts that use them.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["evaluate"]

if TYPE_CHECKING:
    from llm_attack.suite.commands import evaluate


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        from llm_attack.suite.commands import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
