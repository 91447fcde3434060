"""`register()`, which makes ``attacked-hf`` known to lm-eval, where the .pth may not have run.

The module itself lies beside this package, because it has to be importable at the start of every
interpreter without the package.
"""

from _llm_attack_shim import register

__all__ = ["register"]
