"""Shows how far a run is: as a bar, as lines of JSON, or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

MODES = ("bar", "json", "quiet")

PAUSE = 10.0  # seconds between two lines of JSON
SHOWN = 12  # conditions below the bar


class _Bar(Progress):
    """The bar, and below it the accuracies, as many to a line as the screen is wide."""

    below: Sequence[str] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Columns(self.below, padding=(0, 2))


class RunProgress:
    """Counts requests, and right answers under each condition.

    Args:
        mode: of `MODES`.
        console: where it is shown.
        conditions: their names.
        total: number of requests.
        done: of them, those that were answered before.
    """

    def __init__(
        self, mode: str, console: Console, conditions: Sequence[str], total: int, done: int = 0
    ) -> None:
        self.mode, self.console, self.total, self.before = mode, console, total, done
        self.done = done
        self.judged = 0
        self.right = dict.fromkeys(conditions, 0.0)
        self._start = self._last = time.monotonic()
        left = TimeRemainingColumn(), TextColumn("left")
        columns = TextColumn("requests"), BarColumn(), MofNCompleteColumn(), *left
        self._bars = _Bar(*columns, console=console)
        # the time left is estimated from what is done here, not from what was done before
        self._bar = self._bars.add_task("", total=total - done)

    def __enter__(self) -> RunProgress:
        if self.mode == "bar":
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.mode == "bar":
            self._bars.stop()
        elif self.mode == "json":
            self._line()

    def add(self, requests: int, right: Sequence[Sequence[float]]) -> None:
        """Counts answered requests, and of judged questions the right ones per condition."""
        self.done += requests
        self.judged += len(right)
        for of_question in right:
            for name, value in zip(self.right, of_question, strict=True):
                self.right[name] += value
        lines = [f"{name} {value:.3f}" for name, value in self.accuracy().items()]
        more = len(lines) - SHOWN
        self._bars.below = [*lines[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
        self._bars.update(self._bar, advance=requests)
        if self.mode == "json" and time.monotonic() - self._last >= PAUSE:
            self._line()

    def accuracy(self) -> dict[str, float]:
        """So far, under each condition."""
        return {name: n / self.judged for name, n in self.right.items()} if self.judged else {}

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
    """Says what the user should know, whatever the mode."""
    if mode == "json":
        print(json.dumps({"event": "note", "text": text}), file=console.file, flush=True)
    else:  # above the bar, where there is one
        console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def status(mode: str, console: Console, text: str) -> AbstractContextManager[Any]:
    """Shows what is being done before the bar."""
    return console.status(text) if mode == "bar" else nullcontext()


def warn(lines: Iterable[str], progress: str = "bar") -> None:
    """Says what speaks against the results, a line each, on the standard error."""
    for line in lines:
        note(progress, Console(stderr=True), f"warning: {line}")


def written(what: object) -> None:
    """Says what has been written."""
    note("bar", Console(), f"written: {what}")
