"""Finished batches on disk. Each is durable by itself, and any number of processes may write.

Every process writes its own database, so no process waits for another. It also holds a lock while
it lives. The operating system releases this lock however the process ends.
"""

from __future__ import annotations

import json
import sqlite3
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llm_attack.base.errors import UsageError
from llm_attack.base.failures import ProcessDied, look
from llm_attack.base.folder import strangers
from llm_attack.base.record import DRAFT

Key = tuple[str, int]

# The store's folder within the run's folder, the file with the fingerprint, and the names of all
# files in the store.
STORE = "batches"
MARK = "fingerprint.json"
_LOCKS = ("process-*.lock", "fingerprint.lock", "watch.lock")
_TRACES = "traces-{}.safetensors"
_FILES = ("part-*.sqlite*", "part-*.corrupt", _TRACES.format("*"), *_LOCKS, f".*{DRAFT}")

# A process that was never seen alive counts as dead after this number of seconds.
LONGEST_START = 600.0


class Store:
    """The finished batches of one run.

    Attributes:
        keeps: whether this object stores batches.

    Args:
        folder: the folder of the run. The store is a subfolder.
        planned: the keys of all batches. Every process takes each `world`-th.
        rank: number of this process.
        world: number of processes.

    Raises:
        UsageError: another run writes into the folder.
    """

    keeps = True

    def __init__(self, folder: Path, planned: Sequence[Key], rank: int = 0, world: int = 1) -> None:
        self.folder = folder / STORE
        self.planned, self.rank, self.world = planned, rank, world
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in _files(self.folder):
            if path.is_symlink():
                path.unlink()
        self._lock = self._lock_of(rank)
        try:
            self._lock.acquire(timeout=2)  # longer than another process holds it in `watch`
        except Timeout:
            raise UsageError(
                f"output={folder}: another run is writing into this folder; must be another"
                " folder, or wait for that run to end"
            ) from None
        self._seen: set[int] = set()  # processes that have been seen alive
        self._began = time.monotonic()
        self._part: sqlite3.Connection | None = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        if self._part is not None:
            self._part.close()
        self._lock.release()

    def share(self, rank: int) -> Sequence[Key]:
        """The batches that a process answers."""
        return self.planned[rank :: self.world]

    @cached_property
    def _numbers(self) -> dict[Key, int]:
        return {key: number for number, key in enumerate(self.planned)}

    def traces(self, key: Key) -> Path:
        """The file for the traces of a batch, if a run saves them."""
        return self.folder / _TRACES.format(self._numbers[key])

    def add(self, key: Key, content: Any) -> None:
        """Stores a finished batch. After the return it survives a kill and a loss of power."""
        path = self._path(self.rank)
        text = json.dumps(content, separators=(",", ":"))
        try:
            if self._part is None:
                self._part = sqlite3.connect(path)
                self._part.execute("PRAGMA synchronous = FULL")
                self._part.execute(
                    "CREATE TABLE IF NOT EXISTS batches (task TEXT, number INTEGER, content TEXT,"
                    " checksum INTEGER, PRIMARY KEY (task, number))"
                )
            with self._part:
                row = (*key, text, zlib.crc32(text.encode()))
                self._part.execute("INSERT OR REPLACE INTO batches VALUES (?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise OSError(f"{path}: {error}") from error

    def keys(self) -> set[Key]:
        """The keys of finished batches, from all processes and all attempts."""
        return {row[:2] for row in self._rows("task, number")}

    def contents(self) -> dict[Key, Any]:
        """The contents of all finished batches, in order of the keys."""
        kept = {(task, n): content for task, n, content in self._rows("task, number, content")}
        return {key: json.loads(kept[key]) for key in sorted(kept)}

    def check(self) -> list[Path]:
        """Moves damaged parts aside, and returns their new paths.

        A process checks its own part. The first one also checks parts that no process of this
        attempt writes.
        """
        set_aside = []
        for path in self._parts():
            rank = int(path.stem.removeprefix("part-"))
            if rank != self.rank and (self.rank != 0 or rank < self.world):
                continue
            try:
                with closing(sqlite3.connect(path)) as part:
                    (answer,) = part.execute("PRAGMA integrity_check").fetchone()
                    rows = part.execute("SELECT content, checksum FROM batches").fetchall()
                intact = all(zlib.crc32(content.encode()) == known for content, known in rows)
                readable = answer == "ok" and intact
            except sqlite3.OperationalError as error:
                if "no such table" not in str(error):
                    raise OSError(f"{path}: {error}") from error
                readable = True
            except (sqlite3.DatabaseError, AttributeError):
                readable = False
            if not readable:
                aside = path.with_suffix(".corrupt")
                path.replace(aside)
                set_aside.append(aside)
        return set_aside

    def watch(self) -> None:
        """Raises ProcessDied if another process of this run has ended without finishing."""
        for rank in set(range(self.world)) - {self.rank}:
            lock = self._lock_of(rank)
            # one process at a time, so that nobody mistakes the lock of a watcher for that of a
            # living process
            with FileLock(self.folder / "watch.lock"):
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    self._seen.add(rank)
                    continue
                lock.release()
            started = rank in self._seen or time.monotonic() - self._began > LONGEST_START
            # checked after the lock: a process stores its last batch before it releases its lock
            if started and not self.keys().issuperset(self.share(rank)):
                raise ProcessDied(f"process {rank} of {self.world} died")

    def wait(self, pause: float = 0.2) -> None:
        """Returns when the batches of all processes are finished; raises ProcessDied as `watch`
        does.
        """
        while missing := set(self.planned) - self.keys():
            if not missing.isdisjoint(self.share(self.rank)):
                text = "finished batches are missing: they were removed, or could not be read"
                raise ProcessDied(f"{self.folder}: {text}")
            self.watch()
            time.sleep(pause)
            look()

    def _path(self, rank: int) -> Path:
        return self.folder / f"part-{rank}.sqlite"

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.sqlite"))

    def _lock_of(self, rank: int) -> Any:
        return FileLock(self.folder / f"process-{rank}.lock")

    def _rows(self, columns: str) -> Iterator[tuple[Any, ...]]:
        """The rows of all readable parts. The process that owns a damaged part reports it."""
        for path in self._parts():
            try:
                with closing(sqlite3.connect(path)) as part:
                    yield from part.execute(f"SELECT {columns} FROM batches").fetchall()
            except sqlite3.OperationalError as error:
                if "no such table" not in str(error):
                    raise OSError(f"{path}: {error}") from error
            except sqlite3.DatabaseError:
                continue


class Follower(Store):
    """A view of a store for processes whose batches another process stores (tensor parallelism).

    Args:
        folder: the folder of the run.
        planned: the keys of all batches.
        rank: number of the process that stores them.
        world: number of processes that store batches.
    """

    keeps = False

    def __init__(self, folder: Path, planned: Sequence[Key], rank: int = 0, world: int = 1) -> None:
        self.folder = folder / STORE
        self.planned, self.rank, self.world = planned, rank, world

    def __exit__(self, *error: object) -> None:
        """Does nothing, because no lock is held."""

    def add(self, key: Key, content: Any) -> None:
        """Stores nothing."""

    def check(self) -> list[Path]:
        """Moves nothing."""
        return []

    def watch(self) -> None:
        """Does nothing: if another process fails, the model's collective operations fail too."""


def all_here() -> None:
    """Waits for the other processes that hold a part of the same model, if there are any."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


@contextmanager
def begun(folder: Path) -> Iterator[None]:
    """Removes the new store and its new parent folders if the context raises.

    It does so only if no process has stored a batch yet.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        if strangers(folder) == [STORE] and not _kept(folder / STORE):
            discard(folder)
            with suppress(OSError):
                for path in made:
                    path.rmdir()
        raise


def _kept(store: Path) -> bool:
    """Whether a store has batches, or living processes that may soon add some."""
    for lock in map(FileLock, store.glob("process-*.lock")):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
    return any(path.stat().st_size for path in store.glob("part-*"))


def discard(folder: Path) -> None:
    """Deletes the store of the complete run in `folder`, but no file that others put there."""
    store = folder / STORE
    with suppress(OSError):
        if (store / MARK).exists():
            for path in (*_files(store), store / MARK):  # the mark last: it names the owner
                path.unlink()
        store.rmdir()


def _files(store: Path) -> list[Path]:
    return sorted(path for pattern in _FILES for path in store.glob(pattern))
