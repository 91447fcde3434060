"""`register()`, which makes ``attacked-hf`` known to lm-eval if the .pth file has not run.

The module itself is beside this package. Every interpreter imports it at its start, and must be
able to do so without this package.
"""

from _llm_attack_shim import register

__all__ = ["register"]
