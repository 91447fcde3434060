"""Adversarial perturbations of embeddings for lm-evaluation-harness.

Importing the package costs nothing: torch and transformers are imported by the parts that use them.
"""

__version__ = "0.1.0"
