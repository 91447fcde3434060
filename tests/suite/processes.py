"""The command line in separate processes, forked from a server that has imported it.

So a test can kill a run in the middle, and need not wait for imports each time.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from forks import server
from sketched import drawing, save_figure

# A run of many small batches.
RUN = "run --model demo --tasks demo_piqa,demo_winogrande --limit 6 --steps 2 --device cpu"
RUN = [*RUN.split(), "--batch_size", "2", "--progress", "json", "-o", "run"]

# Keys of lm-eval's results that differ from one evaluation to the next.
TIMES = ("date", "start_time", "end_time", "total_evaluation_time_seconds")


class Command:
    """`llm-attack` with these arguments, running in `folder`, with an environment of its own.

    It writes a byte to `computed` before each batch that goes through the model.

    Args:
        folder: where it runs.
        *arguments: of the command line.
        limit: bytes of a file at most.
        hold: after so many batches of its own it waits for the file `go` before the next one, so
            that what a test does to it meanwhile is done in the middle of a run.
        **environment: variables besides those of this process.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        limit: int | None = None,
        hold: int | None = None,
        **environment: str,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        words = [str(argument) for argument in arguments]
        self.process = server.Process(target=enter, args=(words, folder, environment, limit, hold))
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self, timeout: float = 300) -> int:
        """The exit code; -9: killed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s: {self.err}")
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()


def enter(
    words: list[str],
    folder: Path,
    environment: dict[str, str],
    limit: int | None = None,
    hold: int | None = None,
) -> None:
    """What a process of `Command` does, with its arguments."""
    gc.freeze()  # it need not look through what the server has imported
    os.chdir(folder)
    os.environ.update(environment)
    for name, number in (("out", 1), ("err", 2)):
        name += environment.get("RANK", "").replace("0", "")
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs lack
    count_batches(folder, hold)
    if "DRAWN" not in environment:
        drawing.save_figure = save_figure
    from llm_attack.cli import main

    sys.argv = ["llm-attack", *words]
    main(words)


def count_batches(folder: Path, hold: int | None) -> None:
    """From now on, in this process; it waits for `go` after `hold` batches."""
    from llm_attack.lm.engine.engine import Engine

    compute, left = Engine.compute, hold

    def counted(self, pack):
        nonlocal left
        with (folder / "computed").open("ab", buffering=0) as file:
            file.write(b".")
        if left is not None:
            while left == 0 and not (folder / "go").exists():
                time.sleep(0.01)
            left = max(0, left - 1)
        return compute(self, pack)

    Engine.compute = counted


def until(condition: Callable[[], bool], seconds: float = 300) -> None:
    """Waits for what a command does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def computed(folder: Path) -> int:
    """Batches that all commands together have computed in `folder`."""
    log = folder / "computed"
    return log.stat().st_size if log.exists() else 0


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run, without what says when it was and how long it took."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): timeless(path) for path in files}


def timeless(path: Path) -> bytes:
    """The bytes of a file; of a JSON file, without what says when it was written."""
    content = path.read_bytes()
    if path.suffix != ".json":
        return content
    known = json.loads(content)
    for key in ("timings", *TIMES):
        known.pop(key, None)
    return json.dumps(known).encode()
