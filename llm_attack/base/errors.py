"""Errors that a user can mend: one line with the argument, the value and the allowed values.

Every other module may import this one.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm_attack.base.redact import redacted

_LONGEST = 200  # characters of a value in a message


class UsageError(ValueError):
    """Bad input. A command prints its one line, without secrets, and exits with code 2."""

    def __init__(self, text: str) -> None:
        super().__init__(redacted(text))


def closest(word: object, allowed: Iterable[str]) -> str | None:
    """The member of `allowed` that is most like `word`, or None. Ignores upper and lower case."""
    lower = {name.lower(): name for name in allowed}
    matches = difflib.get_close_matches(str(word).lower(), lower, n=1, cutoff=0.6)
    return lower[matches[0]] if matches else None


def did_you_mean(meant: object | None) -> str:
    """The end of a message that suggests a value; empty for None."""
    return "" if meant is None else f"; did you mean {meant!r}?"


def hint(word: object, allowed: Iterable[str]) -> str:
    """The end of a message about `word` that suggests the closest allowed value, if any."""
    return did_you_mean(closest(word, allowed))


def invalid(argument: str, value: object, allowed: str | Iterable[str]) -> UsageError:
    """Makes a `UsageError` for `argument=value`.

    Args:
        argument: name of the argument as the user typed it.
        value: the value that was given.
        allowed: the allowed values, in words or as a list. From a list, the message suggests the
            closest one.
    """
    quoted = isinstance(value, str) and isinstance(allowed, str)
    shown = repr(value) if quoted else shortened(value)
    if isinstance(allowed, str):
        return UsageError(f"{argument}={shown}: must be {allowed}")
    allowed = list(allowed)
    listed = ", ".join(allowed)
    return UsageError(f"{argument}={shown}: must be one of {listed}{hint(value, allowed)}")


def as_path(argument: str, value: Any) -> Path:
    """Turns an argument into a path.

    Raises:
        TypeError: it is not a path.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{argument}: must be a path, not {type(value).__name__}")
    return Path(value)


def shortened(value: object) -> str:
    """A value in one line. A tensor or a model can have many lines."""
    text = str(value)
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def report_usage_errors() -> None:
    """From now on an uncaught `UsageError` ends the process with its one line and exit code 2."""
    previous = sys.excepthook

    def hook(kind: Any, error: BaseException, traceback: Any) -> None:
        if isinstance(error, UsageError):
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2)
        previous(kind, error, traceback)

    sys.excepthook = hook
