"""Functions of the user's own, named as in a command: `package.module:function`."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llm_attack.base.errors import UsageError


def is_own(name: Any) -> bool:
    """Whether `name` has the form of the user's own function."""
    return isinstance(name, str) and ":" in name


def load_function(argument: str, name: str) -> Callable[..., Any]:
    """The function called `name`. Modules in the working folder are found.

    Args:
        argument: that was given, for the error.
        name: such as `my_attacks:nifgsm`.

    Raises:
        UsageError: there is no such function, or its module cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        with _working_folder_first():
            found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # of code that is not ours, whatever it raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(
            f"{argument}={name}: must be package.module:function ({reason})"
        ) from error
    if not callable(found):
        raise UsageError(
            f"{argument}={name}: must be package.module:function, not a {type(found).__name__}"
        )
    return found


def name_of(function: Callable[..., Any]) -> str:
    """The name by which `load_function` finds a function."""
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}"


def source_hash(function: Callable[..., Any]) -> str:
    """SHA-256 of the text of the function's module; of its code where there is no text.

    A run in the folder of another version of the function is told apart by it.
    """
    try:
        text = inspect.getsource(inspect.getmodule(function) or function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        text = repr(function) if code is None else f"{code.co_code!r}{code.co_consts!r}"
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _working_folder_first() -> Iterator[None]:
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")
