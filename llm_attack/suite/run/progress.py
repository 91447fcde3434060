"""Shows the progress of a run: as a bar, as plain lines, as lines of JSON, or not at all."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

MODES = ("bar", "json", "quiet")

PAUSE = 10.0  # seconds between two lines of JSON
PLAIN_PAUSE = 30.0  # seconds between two plain lines
SHOWN = 12  # most conditions below the bar or in a plain line

log = logging.getLogger(__name__)


class _Bar(Progress):
    """The bar, with the accuracies below it in as many columns as the screen has room for."""

    below: Sequence[str] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Columns(self.below, padding=(0, 2))


class RunProgress:
    """Counts requests, and right answers under each condition.

    Args:
        mode: one of `MODES`.
        console: shows the progress.
        conditions: names of the conditions.
        total: number of requests.
        done: number of requests that an earlier attempt answered.
    """

    def __init__(
        self, mode: str, console: Console, conditions: Sequence[str], total: int, done: int = 0
    ) -> None:
        self.mode, self.console, self.total, self.before = mode, console, total, done
        self.plain = mode == "bar" and not console.is_terminal
        self.done = done
        self.judged = 0
        self.right = dict.fromkeys(conditions, 0.0)
        self._start = self._last = time.monotonic()
        left = TimeRemainingColumn(), TextColumn("left")
        columns = TextColumn("requests"), BarColumn(), MofNCompleteColumn(), *left
        self._bars = _Bar(*columns, console=console)
        # only requests of this attempt count for the time left
        self._bar = self._bars.add_task("", total=total - done)

    def __enter__(self) -> RunProgress:
        if self.plain:
            self._plain_line()
        elif self.mode == "bar":
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.plain:
            self._plain_line()
        elif self.mode == "bar":
            self._bars.stop()
        elif self.mode == "json":
            self._line()

    def add(self, requests: int, right: Sequence[Sequence[float]]) -> None:
        """Adds answered requests, and for each judged question its score under every condition."""
        self.done += requests
        self.judged += len(right)
        for of_question in right:
            for name, value in zip(self.right, of_question, strict=True):
                self.right[name] += value
        self._bars.below = self._accuracies()
        self._bars.update(self._bar, advance=requests)
        if self.mode == "json" and time.monotonic() - self._last >= PAUSE:
            self._line()
        if self.plain and time.monotonic() - self._last >= PLAIN_PAUSE:
            self._plain_line()

    def accuracy(self) -> dict[str, float]:
        """The accuracy so far under each condition."""
        return {name: n / self.judged for name, n in self.right.items()} if self.judged else {}

    def _accuracies(self) -> list[str]:
        lines = [f"{name} {value:.3f}" for name, value in self.accuracy().items()]
        more = len(lines) - SHOWN
        return [*lines[:SHOWN], *([f"and {more} more"] if more > 0 else [])]

    def _plain_line(self) -> None:
        self._last = time.monotonic()
        new, seconds = self.done - self.before, self._last - self._start
        said = [f"{self.done:,} of {self.total:,} requests"]
        if new and seconds:
            left = timedelta(seconds=round(seconds * (self.total - self.done) / new))
            said += [f"{new / seconds:.3g} a second", f"{left} left"]
        so_far = f"; accuracy so far: {', '.join(self._accuracies())}" if self.judged else ""
        _print(self.console, ", ".join(said) + so_far)

    def _line(self) -> None:
        self._last = time.monotonic()
        seconds = self._last - self._start
        new = self.done - self.before
        line: dict[str, Any] = {
            "event": "progress",
            "requests": self.done,
            "total": self.total,
            "seconds": round(seconds, 1),
            "seconds_left": round(seconds * (self.total - self.done) / new, 1) if new else None,
            "accuracy": {k: round(v, 4) for k, v in self.accuracy().items()},
        }
        print(json.dumps(line), file=self.console.file, flush=True)


def note(mode: str, console: Console, text: str) -> None:
    """Shows a message to the user in every mode."""
    if mode == "json":
        _event(console, "note", text)
    else:  # above the bar, if there is one
        _print(console, text)


@contextmanager
def status(mode: str, console: Console, text: str) -> Iterator[None]:
    """Shows the current stage before and after the bar, as a spinner or as a line."""
    start = time.monotonic()
    if mode == "json":
        _event(console, "stage", text)
    elif mode == "bar" and not console.is_terminal:
        _print(console, text)
    spinner = mode == "bar" and console.is_terminal
    with console.status(text) if spinner else nullcontext():
        yield
    log.info("%s: %.1f s", text, time.monotonic() - start)


def _event(console: Console, kind: str, text: str) -> None:
    print(json.dumps({"event": kind, "text": text}), file=console.file, flush=True)


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def warn(lines: Iterable[str], progress: str = "bar") -> None:
    """Prints warnings about the results to standard error, one per line."""
    for line in lines:
        note(progress, Console(stderr=True), f"warning: {line}")


def written(what: object) -> None:
    """Prints the path that has been written."""
    note("bar", Console(), f"written: {what}")
