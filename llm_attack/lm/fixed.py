"""Names of universal perturbations, and the format of their files. Needs no torch."""

from __future__ import annotations

TOKEN, POSITION, ALL = "token", "position", "all"
SHARES = (TOKEN, POSITION, ALL)
"""A perturbation is shared by all tokens of a vocabulary entry, by a position, or by all tokens."""

FORMAT = "universal perturbation of llm-attack"
SCHEMA = "1"
DELTA = "delta"
"""The only tensor of a file: (vocabulary, H), (positions, H) or (1, H)."""
