"""Converters of plan settings: each turns a given value into the form that a plan keeps."""

from __future__ import annotations

import re
import sys
from numbers import Real
from typing import Any

from llm_attack.attacks.settings import register_attack
from llm_attack.base.declare import SettingSpec, listed
from llm_attack.base.errors import UsageError, invalid
from llm_attack.lm.units import EPSILON, Epsilon

COUNT = SettingSpec("", int, minimum=1)

# Allowed values, in words for messages.
NAMES = "names, separated by commas"
COUNTS = "integers, 1 or more, separated by commas"
NUMBERS = "numbers such as 0.01 or 0.7rms, separated by commas"
PAIRS = "key=value,..."
SHARD = "i/n, with i from 1 to n, such as 2/8"
RAY = "local, auto or host:port"
ROWS = "auto or an integer, 1 or more"


def several(name: str, value: Any) -> Any:
    """Splits a string at commas; returns other values unchanged."""
    parts = listed(value)
    if isinstance(parts, tuple) and not parts:
        raise UsageError(f"{name}=: must name at least one")
    return parts


def texts(value: Any) -> Any:
    """A tuple of strings if `value` consists of strings and numbers; otherwise `value` itself."""
    if not isinstance(value, tuple):
        return value
    return tuple(str(part) if isinstance(part, Real) else part for part in value)


def attacks(given: Any) -> Any:
    """The names of attacks. Functions of the user are registered as attacks."""
    parts = several("attacks", [given] if callable(given) else given)
    if not isinstance(parts, tuple):
        return given
    return texts(tuple(register_attack(attack) if callable(attack) else attack for attack in parts))


def epsilons(given: Any) -> Any:
    """Amplitudes, each with its unit."""
    parts = several("epsilons", given)
    if not isinstance(parts, tuple):
        return given
    try:
        return tuple(Epsilon.parse(part) for part in parts)
    except (TypeError, ValueError, OverflowError):
        raise invalid("epsilons", list(parts), NUMBERS) from None


def counts(given: Any) -> Any:
    """Numbers of tokens, each once."""
    parts = several("swaps", given)
    if not isinstance(parts, tuple):
        parts = (parts,)
    parts = tuple(int(p) if re.fullmatch("[0-9]{1,9}", str(p)) else p for p in parts)
    for number in parts:
        if not COUNT.allows(number):
            raise invalid("swaps", number, COUNTS)
        if parts.count(number) > 1:
            raise UsageError(f"swaps={','.join(map(str, parts))}: must name {number} only once")
    return parts


def sigmas(given: Any) -> Any:
    """Standard deviations of noise, each with its unit; none if nothing is given."""
    parts = listed(given)
    if not isinstance(parts, tuple):
        return given
    try:
        return tuple(Epsilon.parse(part, "sigmas") for part in parts)
    except (TypeError, ValueError, OverflowError):
        raise invalid("sigmas", list(parts), NUMBERS) from None


def steps(given: Any) -> Any:
    """One number unchanged, or several in increasing order."""
    if not isinstance(given, (list, tuple)):
        return given
    if not given:
        raise UsageError("steps=: must name at least one")
    for number in given:
        if not COUNT.allows(number):
            raise invalid("steps", number, COUNT.words())
        if list(given).count(number) > 1:
            raise UsageError(f"steps={','.join(map(str, given))}: must name {number} only once")
    return given[0] if len(given) == 1 else tuple(sorted(given))


def epsilon_max(given: Any) -> Epsilon | None:
    """The largest amplitude of searches; None if it is not given."""
    if given is None:
        return None
    epsilon = Epsilon.parse(given, "epsilon_max")
    if not SettingSpec("", float, minimum=0.0).allows(epsilon.number):
        raise invalid("epsilon_max", epsilon.number, EPSILON)
    return epsilon


def limit(given: Any) -> Any:
    """The number or share of questions per task. Whole numbers from 1 on become integers."""
    number = isinstance(given, (float, Real)) and not isinstance(given, bool)
    return int(given) if number and 1 <= given <= sys.maxsize and given % 1 == 0 else given


def batch_size(given: Any) -> int | str:
    """The number of rows of a batch, or `auto`."""
    if not re.fullmatch("auto|[1-9][0-9]*", str(given)):
        raise invalid("batch_size", given, ROWS)
    return "auto" if str(given) == "auto" else int(given)


def model_args(given: Any) -> dict[str, Any]:
    """Arguments of lm-eval's `hf`, given as a mapping or as key=value,..."""
    if isinstance(given, str) and all("=" in part for part in given.split(",") if part):
        from llm_attack.harness.arguments import check_string, simple_parse_args_string

        check_string(given)
        parsed: dict[str, Any] = simple_parse_args_string(given)
        return parsed
    if not isinstance(given, dict):
        raise invalid("model_args", given, PAIRS)
    return dict(given)


def device(given: Any) -> Any:
    """The name of a device, which may be given as a `torch.device`."""
    return str(given) if type(given).__module__ == "torch" else given  # a torch.device
