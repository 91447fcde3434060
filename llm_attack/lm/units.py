"""Units of amplitudes: what one of them is, in the coordinates of a point of a given scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llm_attack.attacks.settings import LENGTH_OF_ONES


class Signal(NamedTuple):
    """The scale of a point.

    Attributes:
        rms: root mean square of its coordinates.
        width: coordinates of a token.
        token_norm: mean L2 norm of a token.
    """

    rms: float
    width: int
    token_norm: float


ABSOLUTE = "absolute"
NEFTUNE = "neftune"

# Of a coordinate. One of NEFTune is also divided by the root of the tokens (`Attack.by_size`); the
# norm of a token is AdversariaLLM's scale of embeddings.
UNITS: dict[str, Callable[[Signal], float]] = {
    "rms": lambda signal: signal.rms,
    "token_norm": lambda signal: signal.token_norm * signal.width**-0.5,
    NEFTUNE: lambda signal: signal.width**-0.5,
}


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
