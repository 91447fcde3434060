"""Amplitudes and their units, and the size of a unit in the coordinates of a point."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from math import inf
from numbers import Real
from types import MappingProxyType
from typing import Any, NamedTuple

from llm_attack.attacks.formats import Format
from llm_attack.attacks.settings import LENGTH_OF_ONES
from llm_attack.base.declare import is_plain
from llm_attack.base.errors import UsageError, invalid
from llm_attack.base.failures import one_line
from llm_attack.base.plugins import check_name, is_known, is_own, name_of, source_hash


class Signal(NamedTuple):
    """The scale of a point.

    Attributes:
        rms: root mean square of its coordinates.
        width: number of coordinates of a token.
        token_norm: mean L2 norm of a token.
        own: sizes of the user's own units that are in use, by name.
    """

    rms: float
    width: int
    token_norm: float
    own: Mapping[str, float] = MappingProxyType({})


ABSOLUTE = "absolute"
SWAP = "swap"  # the unit of attacks that swap tokens: a number of tokens
NEFTUNE = "neftune"

# The size in one coordinate. NEFTune also divides by the root of the number of tokens
# (`Attack.by_size`). AdversariaLLM scales embeddings by the norm of a token.
UNITS: dict[str, Callable[[Signal], float]] = {
    "rms": lambda signal: signal.rms,
    "token_norm": lambda signal: signal.token_norm * signal.width**-0.5,
    NEFTUNE: lambda signal: signal.width**-0.5,
}

EPSILON = f"a finite number, at least 0, or one with its unit ({', '.join(UNITS)}), such as 0.7rms"


@dataclass(frozen=True)
class OwnUnit:
    """A user's own unit. A function computes its size.

    Attributes:
        name: name of the unit.
        function: `(activations) -> size`; see `register_unit`.
        source: hash of its source (`source_hash`).
    """

    name: str
    function: Callable[[Any], Any]
    source: str

    def __call__(self, signal: Signal) -> float:
        """The size that was measured at a hookpoint."""
        return signal.own[self.name]

    def measured(self, activations: Any) -> float:
        """The size for these activations, (tokens, hidden).

        Raises:
            UsageError: the function fails, or its result is not a size.
        """
        try:
            size = float(self.function(activations))
        except Exception as error:  # code of the user can raise anything
            shape = list(activations.shape)
            raise UsageError(
                f"epsilon_unit={self.name}: fails on activations of shape {shape}"
                f" ({one_line(error)})"
            ) from error
        if not 0 <= size < inf:
            raise UsageError(
                f"epsilon_unit={self.name}: must return a finite number, at least 0, not {size:g}"
            )
        return size


def register_unit(function: Callable[[Any], Any], name: str | None = None) -> str:
    """Registers a user's own unit under a name.

    The name `package.module:function` needs no registration.

    Args:
        function: `(activations) -> size`. It gets the clean activations of the hookpoint for a
            fixed text without its first token, (tokens, hidden). It returns the size of one unit in
            each coordinate, as a number or a tensor with one element.
        name: name of the unit; `package.module:function` by default.

    Returns:
        The name.

    Raises:
        ValueError: another unit has that name, or the function has other parameters.
    """
    name = name_of(function) if name is None else name
    check_name("name", name)
    if re.match(r"\W|\d|[eE]\d+$", name):  # 1e5 is a number, and not one of the unit e5
        raise invalid("name", name, "a name that begins with a letter, and is no part of a number")
    known = UNITS.get(name)
    if name == ABSOLUTE or (known is not None and getattr(known, "function", None) != function):
        raise ValueError(f"name={name}: must be a name that no unit has")
    if known is None:  # the source at the time of registration
        try:
            signature(function).bind(None)
        except TypeError as error:
            raise UsageError(f"epsilon_unit={name}: must take activations ({error})") from error
        except ValueError:  # functions that are compiled to C
            pass
        UNITS[name] = OwnUnit(name, function, source_hash(function))
    return name


def known_unit(name: Any) -> bool:
    """Whether a unit has this name. A user's own unit is imported.

    Raises:
        UsageError: the name has the form `package.module:function`, and it cannot be imported.
    """
    return name == ABSOLUTE or is_known("epsilon_unit", name, UNITS, register_unit)


def unit_source(name: str | None) -> str:
    """Hash of the source of a user's own unit; empty for the units of this package."""
    return getattr(UNITS.get(str(name)), "source", "")


def size_of(unit: str, signal: Signal, norm: str) -> float:
    """The length of a token's perturbation that is one `unit` large in each coordinate.

    Args:
        unit: a key of `UNITS`, or `ABSOLUTE`. For this, `SWAP` and a format, the result is 1.
        signal: the scale of the point.
        norm: a key of `LENGTH_OF_ONES`.
    """
    if unit in (ABSOLUTE, SWAP) or Format.known(unit):
        return 1.0
    return UNITS[unit](signal) * LENGTH_OF_ONES[norm](signal.width)


@dataclass(frozen=True)
class Epsilon:
    """An epsilon with its unit.

    Attributes:
        number: the number in front of the unit; `Attack` says which values are allowed.
        unit: `ABSOLUTE` or a key of `UNITS`; None: the unit of the setting `epsilon_unit`. For
            attacks in rounding cells it is the name of the format, and the number is 1. For attacks
            that swap tokens it is `SWAP`.
    """

    number: float
    unit: str | None = None

    @classmethod
    def parse(cls, given: Any, name: str = "epsilon") -> Epsilon:
        """Reads an epsilon: an `Epsilon`, a number, or a text such as 0.7rms.

        Raises:
            UsageError: it is none of these. The message calls it `name`.
        """
        number: Any = given
        unit: str | None = None
        if isinstance(given, cls):
            number, unit = given.number, given.unit
        if isinstance(given, str):
            ends = [unit for unit in (ABSOLUTE, *UNITS) if given.endswith(unit)]
            rest = re.sub(r"^[-+]?[\d.]+(e[-+]?\d+)?", "", given)
            unit = max(ends, key=len, default=rest if is_own(rest) else None)
            number = given.removesuffix(unit or "")
        try:
            plain = is_plain(str(number)) if isinstance(given, str) else isinstance(number, Real)
            if plain and not isinstance(number, bool) and (unit is None or known_unit(unit)):
                return cls(float(number) + 0.0, unit)  # no -0
        except (ValueError, OverflowError):
            pass
        raise invalid(name, given, EPSILON)

    def __str__(self) -> str:
        return str(self.plain)

    @property
    def plain(self) -> float | str:
        """The number or the text for this epsilon, as one types it and files store it."""
        if self.unit is None:
            return self.number
        short = f"{self.number:g}"
        return f"{short if float(short) == self.number else self.number}{self.unit}"

    def in_unit(self, unit: str) -> Epsilon:
        """The same epsilon, with this unit if it has none."""
        return Epsilon(self.number, unit) if self.unit is None else self


@dataclass(frozen=True)
class Amplitude:
    """The size and the place of a perturbation. Attacks of one amplitude can be compared.

    Attributes:
        epsilon: the radius with its unit.
        norm: a key of `lm.settings.NORMS`.
        hookpoint: the module; None if its run has only one.
    """

    epsilon: Epsilon
    norm: str = "linf"
    hookpoint: str | None = None

    def __str__(self) -> str:
        """The part of a condition's name after the attack: `0.7rms-l2@model.layers.1`."""
        return self.shown("" if self.epsilon.unit in (ABSOLUTE, None) else f"{self.epsilon.unit}")

    def shown(self, unit: str) -> str:
        """The same text, with `unit` in place of the unit."""
        norm = "" if self.norm == "linf" else f"-{self.norm}"
        place = "" if self.hookpoint is None else f"@{self.hookpoint}"
        number = "" if Format.known(self.epsilon.unit) else f"{self.epsilon.number:g}"
        return f"{number}{unit}{norm}{place}"
