"""A run may end after any durable operation: nothing is lost, and nothing is left behind.

By default, the last of three operations are tried: a batch that is kept, an output that takes its
place, and a deletion. Slow tests try all operations.
"""

import errno
import hashlib
import itertools
import os
from collections import Counter

import pytest
from injection import GROWING, Fault, Forks, operations
from processes import computed, contents, timeless

from llm_attack.suite.run.store import STORE

KILLED = -9
GOES_ON = "; finished batches are kept; to continue: llm-attack run "


TRIED = 3  # files of `render.try_out`


class Runs:
    """Runs that meet a fault, and are started again in the same folder."""

    def __init__(self, forks, folder):
        self.forks, self.folder = forks, folder
        whole = folder / "whole"
        assert forks.run(whole) == 0, (whole / "err").read_text()
        self.operations = operations(whole)
        self.batches = computed(whole)
        self.files = contents(whole / "run")
        self._settled = set()
        self._number = itertools.count()

    def tried(self, every, until=None):
        """The operations that a fault strikes, with their numbers: before the number `until`."""
        known = [*enumerate(self.operations)][:until]
        if every:
            return known
        last = {name: (number, name) for number, name in known}
        return sorted(last[name] for name in ("commit", "replace", "unlink") if name in last)

    def meets(self, fault, **environment):
        """The folder of a new run that meets `fault`, and its exit code."""
        name = "-".join(map(str, (next(self._number), *fault, *environment.values())))
        folder = self.folder / name
        return folder, self.forks.run(folder, fault, **environment)

    def goes_on(self, folder, lost=1):
        """A run there ends well, and leaves what an undisturbed one does; `lost` batches at most
        are computed twice.

        What it does depends on the folder alone, and is looked at once for each state of it.
        """
        state = _state(folder / "run")
        if state in self._settled:
            return
        assert self.forks.run(folder) == 0, (folder / "err").read_text()
        assert contents(folder / "run") == self.files
        assert computed(folder) <= self.batches + lost
        self._settled.add(state)


def _state(folder):
    """Digest of all that is in a folder, without moments."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        try:
            content = timeless(path) if path.is_file() else b""
        except ValueError:  # half a file
            content = path.read_bytes()
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.digest()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    forks = Forks()
    yield Runs(forks, tmp_path_factory.mktemp("durable"))
    forks.close()


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "every"])
def every(request):
    """Whether all operations are tried."""
    return request.param


def test_the_operations(runs):
    """They are found: those of the mark, of the batches, of the outputs, and the deletions."""
    found = Counter(runs.operations)
    assert found["create"] == found["rmdir"] == 1
    assert found["commit"] == runs.batches == 2
    # each output and the mark: a draft, on disk before it takes its place
    assert found["replace"] == len(runs.files) + 1
    # those and the files of `render.try_out`, in a temporary folder
    assert found["fsync"] == found["replace"] + TRIED
    assert found["open"] >= len(runs.files) - 2  # all but the frames, which Arrow writes
    assert found["unlink"] >= 3


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.sampled(2)
def test_killed(runs, moment, every):
    for number, name in runs.tried(every):
        folder, code = runs.meets(Fault(moment, number))
        assert code == KILLED, (number, name)
        assert operations(folder) == runs.operations[: number + 1]
        runs.goes_on(folder)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("full", (os.strerror(errno.ENOSPC), "database or disk is full")),
        ("read-only", (os.strerror(errno.EROFS), "attempt to write a readonly database")),
    ],
)
@pytest.mark.slow
def test_disk(runs, kind, says, every):
    """It is full, or read-only, from an operation on; deletions are put off until the next run."""
    for number, name in runs.tried(every):
        if kind == "full" and name not in GROWING:
            continue
        if kind == "read-only" and name in runs.operations[:number]:
            continue
        folder, code = runs.meets(Fault(kind, number))
        *_, last = (folder / "err").read_text().splitlines()
        complete = "replace" not in runs.operations[number:]
        assert (folder / "run" / "run.json").exists() == complete
        if complete:
            assert code == 0 and (folder / "run" / STORE).exists()
        else:
            assert code == 1, (number, name)
            reason, command = last.removeprefix("error: ").split(GOES_ON)
            assert any(text in reason for text in says), (number, name, reason)
            assert command.endswith("-o run")
        runs.goes_on(folder)


@pytest.mark.slow
def test_one_of_two_is_killed(runs, every):
    """At each operation on its share; the other then says so, and one alone goes on."""
    started = [{"RANK": str(rank), "WORLD_SIZE": "2"} for rank in (0, 1)]
    # the first alone tries out what is needed at the end: files that are synced, and removed
    reached = len(runs.operations) - runs.operations[::-1].index("commit") - 1 - 2 * TRIED
    for number, _ in runs.tried(every, reached):
        folder, code = runs.meets(Fault("before", number), **started[1])
        assert code == KILLED
        assert runs.forks.run(folder, PATIENCE="0", **started[0]) == 1
        *_, last = (folder / "err").read_text().splitlines()
        assert last.startswith(f"error: process 1 of 2 died{GOES_ON}")
        runs.goes_on(folder, lost=2)

        folder = runs.folder / f"first-{number}"
        assert runs.forks.run(folder, **started[1]) == 0
        assert runs.forks.run(folder, Fault("before", number), **started[0]) == KILLED
        runs.goes_on(folder)
