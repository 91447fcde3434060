"""Finished batches on disk: durable one by one, written by any number of processes.

Every process writes a database of its own, so that no two ever wait for each other, and holds a
lock for as long as it lives, which the system lets go of however it dies.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llm_attack.errors import UsageError

Key = tuple[str, int]

# The store's folder in that of the run.
STORE = "batches"

# Seconds after which a process that was never seen alive counts as dead.
LONGEST_START = 600.0


class ProcessDied(Exception):
    """Another process of this run is gone, and its share of the batches with it."""


class Store:
    """The batches of one run.

    Args:
        folder: of the run; the store is a subfolder of it.
        rank: of this process.
        world: number of processes.

    Raises:
        UsageError: another run is writing there.
    """

    def __init__(self, folder: Path, rank: int = 0, world: int = 1) -> None:
        self.folder = folder / STORE
        self.rank, self.world = rank, world
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._lock_of(rank)
        try:
            self._lock.acquire(timeout=2)  # longer than another process tries it in `watch`
        except Timeout:
            raise UsageError(
                f"output={folder}: another run is writing there; must be a folder of its own, or"
                " wait until that run has ended"
            ) from None
        self._finished = self.folder / f"finished-{rank}"
        self._finished.unlink(missing_ok=True)
        self._seen: set[int] = set()  # processes that have been alive
        self._began = time.monotonic()
        self._part: sqlite3.Connection | None = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        if self._part is not None:
            self._part.close()
        self._lock.release()

    def add(self, key: Key, content: Any) -> None:
        """Keeps a finished batch; once this returns, it outlasts a kill or a loss of power."""
        if self._part is None:
            self._part = sqlite3.connect(self._path(self.rank))
            self._part.execute("PRAGMA synchronous = FULL")
            self._part.execute(
                "CREATE TABLE IF NOT EXISTS batches"
                " (task TEXT, number INTEGER, content TEXT, PRIMARY KEY (task, number))"
            )
        with self._part:
            row = (*key, json.dumps(content, separators=(",", ":")))
            self._part.execute("INSERT OR REPLACE INTO batches VALUES (?, ?, ?)", row)

    def keys(self) -> set[Key]:
        """Batches that are finished, by whichever process of whichever attempt."""
        return {row[:2] for rows in self._read("SELECT task, number FROM batches") for row in rows}

    def contents(self) -> dict[Key, Any]:
        """What was kept, in order of the keys."""
        rows = self._read("SELECT task, number, content FROM batches")
        found = {(task, n): content for part in rows for task, n, content in part}
        return {key: json.loads(found[key]) for key in sorted(found)}

    def check(self) -> list[Path]:
        """Moves parts that cannot be read aside, and returns where they are now."""
        set_aside = []
        for path in sorted(self.folder.glob("part-*.sqlite")):
            try:
                with sqlite3.connect(path) as part:
                    (answer,) = part.execute("PRAGMA integrity_check").fetchone()
                    part.execute("SELECT task, number, content FROM batches").fetchall()
                if answer != "ok":
                    raise sqlite3.DatabaseError(answer)
            except sqlite3.OperationalError as error:
                if "no such table" not in str(error):
                    raise
            except sqlite3.DatabaseError:
                aside = path.with_suffix(".corrupt")
                path.replace(aside)
                set_aside.append(aside)
        return set_aside

    def finish(self) -> None:
        """Says that this process has computed all of its share."""
        self._finished.touch()

    def watch(self) -> None:
        """Raises ProcessDied when another process of this run has ended without finishing."""
        for rank in set(range(self.world)) - {self.rank}:
            lock = self._lock_of(rank)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                self._seen.add(rank)
                continue
            # looked for after the lock: a process says that it has finished before it lets go
            ended = (self.folder / f"finished-{rank}").exists()
            lock.release()
            started = rank in self._seen or time.monotonic() - self._began > LONGEST_START
            if started and not ended:
                raise ProcessDied(f"process {rank} of {self.world} died")

    def wait(self, done: Callable[[], bool], pause: float = 0.2) -> None:
        """Returns when `done()`; ProcessDied as of `watch`."""
        while not done():
            self.watch()
            time.sleep(pause)

    def _path(self, rank: int) -> Path:
        return self.folder / f"part-{rank}.sqlite"

    def _lock_of(self, rank: int) -> Any:
        return FileLock(self.folder / f"process-{rank}.lock")

    def _read(self, query: str) -> Iterable[list[tuple]]:
        for path in sorted(self.folder.glob("part-*.sqlite")):
            part = sqlite3.connect(path)
            try:
                yield part.execute(query).fetchall()
            except sqlite3.OperationalError as error:
                if "no such table" not in str(error):
                    raise
            finally:
                part.close()


def discard(folder: Path) -> None:
    """Deletes the store of the run in `folder`, which is complete."""
    shutil.rmtree(folder / STORE, ignore_errors=True)
