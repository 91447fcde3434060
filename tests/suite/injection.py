"""Runs that are cut off at a chosen durable operation.

One process imports the command line and prepares the model and the tasks. Every run is a fork of
it, and takes less than a second.
"""

from __future__ import annotations

import builtins
import errno
import functools
import io
import itertools
import multiprocessing
import os
import signal
import sqlite3
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import processes

WORDS = "run --model demo --tasks demo_piqa,demo_winogrande --attacks none,fgsm --limit 1"
WORDS = f"{WORDS} --batch_size 2 --device cpu --progress json -o run".split()

# What a full disk refuses; it still deletes.
GROWING = {"commit", "create", "fsync", "link", "mkdir", "open", "replace"}


class Fault(NamedTuple):
    """What befalls a run.

    Attributes:
        kind: `before`, `after`: it is killed there; `full`, `read-only`: so the disk is from there.
        number: of the durable operation, from 0.
    """

    kind: str
    number: int


class Forks:
    """A process that has prepared `WORDS`, and forks runs of it."""

    def __init__(self) -> None:
        self._here, there = multiprocessing.Pipe()
        self._process = processes.server.Process(target=_serve, args=(there,))
        self._process.start()
        there.close()

    def run(self, folder: Path, fault: Fault | None = None, **environment: str) -> int:
        """The exit code of a run in `folder`, as of `processes.Command`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._here.send((folder, fault, environment))
        return self._here.recv()

    def close(self) -> None:
        self._here.close()
        self._process.join()


def operations(folder: Path) -> list[str]:
    """The durable operations that the last run in `folder` came to, in order."""
    return (folder / "operations").read_text().split()


def _serve(jobs: Any) -> None:
    from rich.console import Console

    from llm_attack.base.declare import names
    from llm_attack.cli import main
    from llm_attack.suite import evaluate
    from llm_attack.suite.plan import Plan
    from llm_attack.suite.run import store

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # whose threads would not survive the forks
    context = main.commands["run"].make_context("run", WORDS[1:])
    settings = {name: context.params[name] for name in names(Plan)}
    evaluate.silence()
    prepared = evaluate.prepare(Plan(**settings), "quiet", Console(quiet=True))
    evaluate.prepare = lambda *_: prepared
    while True:
        try:
            job = jobs.recv()
        except EOFError:
            return
        folder, fault, environment = job
        child = os.fork()
        if child == 0:
            if "PATIENCE" in environment:
                store.LONGEST_START = float(environment["PATIENCE"])
            _child(folder, fault, environment)
        _, status = os.waitpid(child, 0)
        jobs.send(os.waitstatus_to_exitcode(status))


def _child(folder: Path, fault: Fault | None, environment: dict[str, str]) -> None:
    code = 1
    signal.alarm(300)  # a run that waits for ever is killed
    try:
        watch(folder, fault)
        processes.enter(WORDS, folder, environment)
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def watch(folder: Path, fault: Fault | None) -> None:
    """Logs this process's durable operations in `folder`/run from now on, and lets `fault` be."""
    run = folder / "run"
    log = os.open(folder / "operations", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

    def inside(path: Any) -> bool:
        return run in (path := Path(os.path.abspath(path)), *path.parents)

    operation = _operations(log, fault)

    def wrap(name: str, counts: Callable[..., bool]) -> None:
        plain = getattr(os, name)

        @functools.wraps(plain)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if not counts(*arguments, **options):
                return plain(*arguments, **options)
            with operation(name):
                return plain(*arguments, **options)

        setattr(os, name, wrapped)

    def gone(path: Any, *, dir_fd: int | None = None) -> bool:
        return dir_fd is not None or (inside(path) and os.path.lexists(path))

    def created(path: Any, flags: int, *_: Any, **__: Any) -> bool:
        return bool(flags & os.O_CREAT) and inside(path) and not os.path.exists(path)

    for name in ("unlink", "remove", "rmdir"):
        wrap(name, gone)
    for name in ("rename", "replace", "link"):
        wrap(name, lambda _, target, **__: inside(target))
    wrap("mkdir", lambda path, *_, **__: inside(path) and not os.path.exists(path))
    wrap("fsync", lambda _: True)
    wrap("open", created)
    _watch_files(operation, inside)
    _watch_databases(operation)


def _operations(log: int, fault: Fault | None) -> Callable[[str], AbstractContextManager[None]]:
    """operation(name): its name is logged in `log`, and `fault` strikes where it should."""
    numbers = itertools.count()

    @contextmanager
    def operation(name: str) -> Iterator[None]:
        number = next(numbers)
        os.write(log, f"{name}\n".encode())
        kind = fault.kind if fault and number >= fault.number else None
        if kind == "before":
            _die()
        if kind == "full" and name in GROWING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if kind == "read-only":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        try:
            yield
        finally:
            if kind == "after":
                _die()

    return operation


def _watch_files(operation: Callable[[str], Any], inside: Callable[[Any], bool]) -> None:
    plain = io.open

    def wrapped(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+") or not inside(file):
            return plain(file, mode, *arguments, **options)
        with operation("open"):
            return plain(file, mode, *arguments, **options)

    builtins.open = io.open = wrapped


def _watch_databases(operation: Callable[[str], Any]) -> None:
    class Connection(sqlite3.Connection):
        def execute(self, statement: str, *arguments: Any) -> Any:
            if not statement.startswith("CREATE"):  # which is durable without a commit
                return super().execute(statement, *arguments)
            with _as_sqlite_says(), operation("create"):
                return super().execute(statement, *arguments)

        def __exit__(self, *error: Any) -> Any:
            try:
                with _as_sqlite_says(), operation("commit"):
                    return super().__exit__(*error)
            except sqlite3.OperationalError:
                self.rollback()
                raise

    sqlite3.connect = functools.partial(sqlite3.connect, factory=Connection)


@contextmanager
def _as_sqlite_says() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno == errno.ENOSPC
        says = "database or disk is full" if full else "attempt to write a readonly database"
        raise sqlite3.OperationalError(says) from None


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
