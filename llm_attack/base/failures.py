"""Turns every failure into a line for the user and an exit code.

| code | what happened |
|---|---|
| 1 | the machine failed: disk, memory, another process of the run |
| 2 | bad input; nothing was written |
| 3 | the results miss a threshold that the user set; everything was written |
| 70 | an unexpected error; the line names the file with the traceback |
| 130, 143 | stopped by Ctrl-C, or by SIGTERM |
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from errno import (
    EACCES,
    EEXIST,
    EINVAL,
    EISDIR,
    ELOOP,
    ENAMETOOLONG,
    ENOENT,
    ENOTDIR,
    EPERM,
)
from typing import Any, NamedTuple

from llm_attack.base.errors import UsageError
from llm_attack.base.redact import redacted

# Libraries that read what a user names (tasks, templates, models, files), and the errors that they
# raise for it. An error of another type, or from our own code, is our mistake.
_READERS = {
    *("lm_eval", "transformers", "datasets", "huggingface_hub", "tokenizers", "safetensors"),
    *("accelerate", "peft", "evaluate", "jinja2", "yaml", "argparse"),
}
_COMPLAINTS = (ValueError, LookupError, ImportError, NotImplementedError, AssertionError, OSError)

# Errors of the system that another path mends. Others, such as a full disk, need a repair of the
# machine.
_PATHS = {EACCES, EEXIST, EINVAL, EISDIR, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, EPERM}

# Parts of the type or the text of torch's errors when no memory is left.
_NO_MEMORY = ("OutOfMemoryError", "DefaultCPUAllocator")

TRACEBACK = "--traceback"


class Stopped(BaseException):
    """The process received SIGTERM."""


class ProcessDied(Exception):
    """Another process of the run ended before its share of the work was done."""


class ThresholdMissed(Exception):
    """The results are written, and miss a threshold that the user set."""


class NotWritten(OSError):
    """A file could not be written, although its folder was tried at the start."""


# The handlers before `held`, by the number of their signal; and the signals that arrived since.
_handlers: dict[int, Any] = {}
_came: list[int] = []
_ending = False
PATIENCE = 5.0  # seconds for which a signal waits, at most


@contextmanager
def held() -> Iterator[None]:
    """While the context lasts, Ctrl-C and SIGTERM wait for the next call of `look`.

    An error that a handler raises inside of C code is lost, or becomes a SystemError. The handler
    is called at once after `PATIENCE`, and if the signal arrives a second time. Only the main
    thread has handlers. In another thread, and inside of another `held`, the context does nothing.
    """
    global _ending
    if threading.current_thread() is not threading.main_thread() or _handlers:
        yield
        return
    _ending = False
    numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        handler = signal.getsignal(number)
        if callable(handler):
            _handlers[number] = handler
            signal.signal(number, _wait)
    try:
        yield
        look()
    finally:
        _ending = True
        for number, handler in _handlers.items():
            if signal.getsignal(number) is _wait:  # nobody else has taken it meanwhile
                signal.signal(number, handler)
        handlers = dict(_handlers)
        _handlers.clear()
        while _came:
            number = _came.pop()
            handlers[number](number, None)


def look() -> None:
    """Calls the handlers of waiting signals. Their errors are raised from here."""
    while _came and threading.current_thread() is threading.main_thread():
        number = _came.pop()
        _handlers[number](number, None)


def _wait(number: int, frame: Any) -> None:
    if number not in _came:
        _came.append(number)
        # not a Thread: its start takes locks that the main thread may hold when a signal arrives
        _thread.start_new_thread(_again, (number,))
    elif not _ending:
        _came.remove(number)
        _handlers[number](number, frame)


def _again(number: int) -> None:
    time.sleep(PATIENCE)
    if number in _came:
        _thread.interrupt_main(signal.Signals(number))


class Failure(NamedTuple):
    """An exit code and its message."""

    code: int
    line: str


def failure(error: BaseException) -> Failure:
    """Returns one line about an exception, and the exit code.

    A log with the traceback is written only for unexpected errors.
    """
    import click

    text = _text(error)
    error = stop_in(error) or error
    if isinstance(error, UsageError):
        return Failure(2, f"error: {text}")
    if isinstance(error, ThresholdMissed):
        return Failure(3, f"failed: {text}")
    if isinstance(error, click.UsageError):
        return Failure(2, redacted(f"error: {error.format_message()}"))
    if isinstance(error, (KeyboardInterrupt, click.Abort)):  # click turns the first into the second
        return Failure(130, "stopped")
    if isinstance(error, Stopped):
        return Failure(143, "stopped")
    if isinstance(error, OSError) and error.errno in _PATHS and not isinstance(error, NotWritten):
        return Failure(2, f"error: {text}")
    if isinstance(error, MemoryError) or any(word in repr(error) for word in _NO_MEMORY):
        return Failure(1, f"error: out of memory ({text})")
    reader = _reader(error)
    if reader and isinstance(error, _COMPLAINTS) and getattr(error, "errno", None) is None:
        return Failure(2, f"error: {reader} refuses this: {type(error).__name__}: {text}")
    if isinstance(error, (ProcessDied, OSError)):
        return Failure(1, f"error: {text}")
    return Failure(70, f"error: unexpected {type(error).__name__}: {text}; see {_log(error)}")


def stop_in(error: BaseException) -> BaseException | None:
    """Returns the signal behind an exception: the exception itself, or its cause in C code."""
    cause = error.__cause__ if isinstance(error, SystemError) else error
    return cause if isinstance(cause, (KeyboardInterrupt, Stopped)) else None


def one_line(error: BaseException) -> str:
    """The class of an exception and the first line of its text, without secrets.

    A first line that ends with a colon is a heading, so the next line is used.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if lines[1:] and lines[0].endswith(":"):
        del lines[0]
    return str(redacted(": ".join([type(error).__name__, *lines[:1]])))


class Attempts:
    """Contexts in which a failure becomes a line, and the code after them still runs.

    They are for reports and figures at the end of a run, because a failure in these must not lose
    the numbers.

    Attributes:
        lines: one line per failure: what failed, the exception's class, its text's first line.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Attempts to make `what`.

        Raises:
            OSError, MemoryError: the machine failed, as with a full disk, and the rest would too.
        """
        try:
            yield
        except Exception as error:
            of_machine = isinstance(error, OSError) and error.errno not in {None, *_PATHS}
            if of_machine or isinstance(error, (MemoryError, NotWritten)):
                raise
            self.lines.append(f"{what} could not be made: {one_line(error)}")


def show(error: BaseException) -> None:
    """Prints the traceback: for --traceback."""
    print(redacted("".join(traceback.format_exception(error))), file=sys.stderr, end="")


def leave(code: int, line: str | None) -> None:
    """Ends the process at once.

    sys.exit would not do: libraries with threads may hang when the interpreter ends.
    """
    if line is not None:
        print(line, file=sys.stderr, flush=True)
    os._exit(code)


def _text(error: BaseException) -> str:
    """The text of an exception in one line, or its class if it has no text."""
    return redacted(" ".join(str(error).split())) or type(error).__name__


def _reader(error: BaseException) -> str:
    """The library of `_READERS` that raised the error or called the code that did; empty: ours."""
    own = __name__.partition(".")[0]
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    last = next((name for name in reversed(packages) if name in {own, *_READERS}), own)
    return "" if last == own else last


def _log(error: BaseException) -> str:
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", errors="backslashreplace", prefix="llm-attack-", suffix=".log",
        delete=False,
    ) as file:  # fmt: skip
        file.writelines(map(redacted, traceback.format_exception(error)))
    return file.name
