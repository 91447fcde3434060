"""Units of amplitudes: what one of them is, in the coordinates of a point of a given scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from math import inf
from types import MappingProxyType
from typing import Any, NamedTuple

from llm_attack.attacks.settings import LENGTH_OF_ONES
from llm_attack.base.errors import UsageError
from llm_attack.base.failures import one_line
from llm_attack.base.plugins import check_name, is_own, load_function, name_of, source_hash


class Signal(NamedTuple):
    """The scale of a point.

    Attributes:
        rms: root mean square of its coordinates.
        width: coordinates of a token.
        token_norm: mean L2 norm of a token.
        own: size of each unit of the user's own that was asked for, by name.
    """

    rms: float
    width: int
    token_norm: float
    own: Mapping[str, float] = MappingProxyType({})


ABSOLUTE = "absolute"
NEFTUNE = "neftune"

# Of a coordinate. One of NEFTune is also divided by the root of the tokens (`Attack.by_size`); the
# norm of a token is AdversariaLLM's scale of embeddings.
UNITS: dict[str, Callable[[Signal], float]] = {
    "rms": lambda signal: signal.rms,
    "token_norm": lambda signal: signal.token_norm * signal.width**-0.5,
    NEFTUNE: lambda signal: signal.width**-0.5,
}


@dataclass(frozen=True)
class OwnUnit:
    """A unit of the user's own, whose size a function says.

    Attributes:
        name: of the unit.
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
            UsageError: the function fails, or what it returns is no size.
        """
        try:
            size = float(self.function(activations))
        except Exception as error:  # of code that is not ours, whatever it raises
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
    """Makes a unit of the user's own known by a name, as `package.module:function` makes it.

    Args:
        function: `(activations) -> size`. It gets the clean activations of the hookpoint for a
            fixed text, (tokens, hidden), without those of the first token, and returns the size of
            one unit in each coordinate, a number or a tensor of one.
        name: of the unit; `package.module:function` unless given.

    Returns:
        The name.

    Raises:
        ValueError: another unit has that name, or the function has other parameters.
    """
    name = name_of(function) if name is None else name
    check_name("name", name)
    known = UNITS.get(name)
    if name == ABSOLUTE or (known is not None and getattr(known, "function", None) != function):
        raise ValueError(f"name={name}: must be a name that no unit has")
    if known is None:  # its source as it is when the function is new
        try:
            signature(function).bind(None)
        except TypeError as error:
            raise UsageError(f"epsilon_unit={name}: must take activations ({error})") from error
        except ValueError:  # of what is compiled to C
            pass
        UNITS[name] = OwnUnit(name, function, source_hash(function))
    return name


def known_unit(name: Any) -> bool:
    """Whether a unit has this name; one of the user's own is imported.

    Raises:
        UsageError: it has the form of the user's own, and there is none.
    """
    if is_own(name) and name not in UNITS:
        register_unit(load_function("epsilon_unit", name), name)
    return name in [ABSOLUTE, *UNITS]  # a list: also takes what cannot be hashed


def unit_source(name: str) -> str:
    """Hash of the source of a unit of the user's own; empty for the units of this package."""
    return getattr(UNITS.get(name), "source", "")


def size_of(unit: str, signal: Signal, norm: str) -> float:
    """The length, in a norm, of a token's perturbation that has one of `unit` in each coordinate.

    Args:
        unit: `ABSOLUTE`, of which a length has one, or a key of `UNITS`.
        signal: the scale of the point.
        norm: a key of `LENGTH_OF_ONES`.
    """
    if unit == ABSOLUTE:
        return 1.0
    return UNITS[unit](signal) * LENGTH_OF_ONES[norm](signal.width)
