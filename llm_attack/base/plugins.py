"""A user's own functions, which commands name as `package.module:function`."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

from llm_attack.base.errors import UsageError, invalid


def is_own(name: Any) -> bool:
    """Whether `name` has the form of a user's own function."""
    return isinstance(name, str) and ":" in name


def load_function(argument: str, name: str) -> Callable[..., Any]:
    """Imports the function called `name`, also from a module in the working folder.

    Args:
        argument: the argument's name, for the error.
        name: the function's name, such as `my_attacks:nifgsm`.

    Raises:
        UsageError: there is no such function, or its module cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        with _working_folder_first():
            function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # code of the user can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(
            f"{argument}={name}: must be package.module:function ({reason})"
        ) from error
    if not callable(function):
        raise UsageError(
            f"{argument}={name}: must be package.module:function, not a {type(function).__name__}"
        )
    return function


def is_known(
    argument: str, name: Any, table: Collection[str], register: Callable[..., str]
) -> bool:
    """Whether a table has this name. A user's own function is imported and registered.

    Args:
        argument: the argument's name, for the error.
        name: the name that was given.
        table: the table of names.
        register: takes a function and its name, and puts it into the table.

    Raises:
        UsageError: the name has the form `package.module:function`, and it cannot be imported.
    """
    if is_own(name) and name not in table:
        register(load_function(argument, name), name)
    return name in list(table)  # a list: also takes what cannot be hashed


def name_of(function: Callable[..., Any]) -> str:
    """The name under which `load_function` finds a function."""
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}"


def check_name(argument: str, name: Any) -> None:
    """Refuses a name that cannot be part of a list, a condition or a file name.

    Raises:
        UsageError: it has other characters than letters, digits and `_ . : < > -`, or is `worst`.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w.:<>-]+", name) or name == "worst":
        allowed = (
            "letters, digits, and any of _ . : < > -, and must not be worst, which has another"
            " meaning"
        )
        raise invalid(argument, name, allowed)


def source_hash(function: Callable[..., Any]) -> str:
    """Hash of the text of the function's module, and of the values that the function holds.

    If there is no text, as in an interpreter, the compiled code is hashed instead. With this hash a
    run notices that its folder holds results of another version of the function. Modules that the
    function's module imports do not count.

    Returns:
        The first 16 digits of a SHA-256.
    """
    text = "\n".join(_content(function))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def _content(function: Any) -> Iterator[str]:
    if isinstance(function, functools.partial):
        yield from _content(function.func)
        yield _text([function.args, sorted(function.keywords.items())])
        return
    owner = getattr(function, "__self__", function)  # a method's object
    call = function if hasattr(function, "__code__") else type(function).__call__
    if not hasattr(call, "__code__"):  # compiled to C
        yield _text(function)
        return
    code = call.__code__
    try:
        yield inspect.getsource(inspect.getmodule(call) or call)
    except (OSError, TypeError):
        yield _text(list(_compiled(code)))
    # the function's place in that text; all lambdas have one name, and a line may have several
    yield _text([call.__qualname__, code.co_firstlineno])
    if call.__name__ == "<lambda>":
        yield _text(list(_compiled(code)))
    held = [cell.cell_contents for cell in call.__closure__ or ()]
    yield _text([held, call.__defaults__, call.__kwdefaults__, getattr(owner, "__dict__", {})])


def _compiled(code: CodeType) -> Iterator[Any]:
    """The compiled code of a function, without its place in a file."""
    yield from (code.co_code, code.co_names, code.co_varnames)
    for constant in code.co_consts:
        yield list(_compiled(constant)) if isinstance(constant, CodeType) else constant


def _text(value: Any) -> str:
    """The value's `repr` without addresses in memory, which differ between processes."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


@contextmanager
def _working_folder_first() -> Iterator[None]:
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")
