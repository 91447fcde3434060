"""The number formats whose rounding cells can confine a perturbation. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llm_attack.base.errors import hint, invalid

FLOATS = ("bfloat16", "float16")
NF4, NF4_GROUP = "nf4", 64
NAMES = (
    *("int8", "int4", "int8-asym", "int4-asym"),
    *("int8-g32", "int4-g32", "int8-asym-g32", "int4-asym-g32"),
    *(NF4, f"{NF4}-g{NF4_GROUP}", *FLOATS),
)
"""Names to suggest; others differ in the size of their groups."""
ALLOWED = f"int8 or int4, with -asym for a zero-point and -gN for groups of N; {NF4}, with -gN;" + (
    f" {' or '.join(FLOATS)}"
)
_NAME = re.compile(r"(int8|int4)(-asym)?(?:-g([1-9][0-9]{0,5}))?|(nf4)(?:-g([1-9][0-9]{0,5}))?")


@dataclass(frozen=True)
class Format:
    """A number format, and the coordinates of a row that share a scale.

    Attributes:
        name: the name, such as `int4-asym-g32`.
        kind: `int8`, `int4`, `nf4`, `bfloat16` or `float16`.
        zero_point: whether the range goes from the smallest to the largest coordinate. Otherwise
            it is symmetric, and its end is the largest absolute value (absmax).
        group: number of successive coordinates that share a scale; None: the whole row.
    """

    name: str
    kind: str
    zero_point: bool = False
    group: int | None = None

    @classmethod
    def of(cls, name: str) -> Format:
        """The format with this name.

        Raises:
            UsageError: there is no such format.
        """
        if name in FLOATS:
            return cls(name, name)
        parts = _NAME.fullmatch(name) if isinstance(name, str) else None
        if parts is None:
            raise invalid("cells", name, ALLOWED + hint(name, NAMES))
        integer, zero_point, group, _, of_nf4 = parts.groups()
        if integer is None:
            return cls(name, NF4, group=int(of_nf4 or NF4_GROUP))
        return cls(name, integer, zero_point is not None, None if group is None else int(group))

    @classmethod
    def known(cls, name: Any) -> bool:
        """Whether a format has this name."""
        return isinstance(name, str) and (name in FLOATS or _NAME.fullmatch(name) is not None)

    @property
    def scaled(self) -> bool:
        """Whether coordinates share a scale."""
        return self.kind not in FLOATS
