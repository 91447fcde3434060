"""Runs that are killed, stopped and started again, in one process and in several."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time

import pytest
from processes import RUN, Command, computed, contents, until

from llm_attack.suite.run.store import STORE

OUTPUTS = {
    *(f"{name}.{kind}" for name in ("figure", "margin", "cosine") for kind in ("png", "svg")),
    *(f"lm_eval/results_{name}.json" for name in ("none", "random@0.01", "fgsm@0.01", "bim@0.01")),
    *("samples.parquet", "questions.parquet", "table.csv", "table.md", "report.html", "run.json"),
    *("calibration.csv", "calibration.md", "summary.json"),
}


def processes(folder, n, *arguments, **options):
    """A run in n processes, as launchers start them."""
    ranks = [{"RANK": str(rank), "WORLD_SIZE": str(n)} for rank in range(n)]
    return [Command(folder, *arguments, **rank, **options) for rank in ranks]


def killed_and_resumed(folder, moment):
    """What a run leaves that is killed `moment` seconds after its start, and started again."""
    command = Command(folder, *RUN)
    command.process.join(moment)
    command.kill()
    again = Command(folder, *RUN)
    assert again.wait() == 0, again.err
    return contents(folder / "run")


def test_all_outputs(whole):
    files, batches = whole
    assert set(files) == OUTPUTS
    assert batches >= 12


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, whole):
    files, batches = whole
    folder = tmp_path / "timed"
    start = time.monotonic()
    assert Command(folder, *RUN).wait() == 0
    seconds = time.monotonic() - start
    draw = random.Random(0)
    for i in range(20):
        moment = draw.uniform(0, seconds)
        folder = tmp_path / str(i)
        assert killed_and_resumed(folder, moment) == files, moment
        assert computed(folder) <= batches + 1, moment


@pytest.mark.slow
def test_python_m_is_killed(tmp_path, drawn):
    command = [sys.executable, "-m", "llm_attack", *RUN]
    for kept in (2, 7):
        folder = tmp_path / str(kept)
        folder.mkdir()
        run = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
        until(lambda folder=folder, kept=kept: _rows(folder / "run") >= kept)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        assert subprocess.run(command, cwd=folder, check=False).returncode == 0
        assert contents(folder / "run") == drawn


def _rows(folder):
    import sqlite3

    path = folder / STORE / "part-0.sqlite"
    if not path.exists():
        return 0
    try:
        return sqlite3.connect(path).execute("SELECT count(*) FROM batches").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_finished_run_is_read(finished, tmp_path):
    def files():
        found = (p for p in (tmp_path / "run").rglob("*") if p.is_file())
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in found}

    before = files()
    n, table = computed(tmp_path), (tmp_path / "out").read_text()
    (tmp_path / "run" / STORE).mkdir()  # as if killed before the batches were deleted
    again = Command(tmp_path, *RUN)
    assert again.wait() == 0
    assert again.out == table
    assert computed(tmp_path) == n
    assert files() == before


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
@pytest.mark.sampled(2)
def test_stopped(tmp_path, whole, number, code):
    """It says how to go on, and a shell that is told so goes on."""
    files, batches = whole
    command = Command(tmp_path, *RUN, hold=3)
    until(lambda: computed(tmp_path) > 3)
    os.kill(command.pid, number)
    assert command.wait() == code
    *lines, last = command.err.splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events[:3] == ["stage"] * 3 and set(events) == {"stage", "progress"}
    before, again = last.split("to continue: ")
    assert before == "stopped; finished batches are kept; "
    assert _in_a_shell(tmp_path, again) == 0
    assert computed(tmp_path) <= batches + 1
    assert contents(tmp_path / "run") == files


def _in_a_shell(folder, line):
    """The command itself; its first word is taken as the shell takes it, by our process."""
    name, *arguments = shlex.split(line)
    assert name == "llm-attack"
    return Command(folder, *arguments).wait()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.sampled(2)
def test_several_processes(tmp_path, whole, world):
    files, batches = whole
    runs = processes(tmp_path, world, *RUN)
    assert [run.wait() for run in runs] == [0] * world, runs[0].err
    assert computed(tmp_path) == batches
    assert contents(tmp_path / "run") == files
    assert "demo_piqa" in runs[0].out
    assert (tmp_path / "out1").read_text() == (tmp_path / "err1").read_text() == ""


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.sampled(2)
def test_one_of_two_dies(tmp_path, whole, victim):
    """The other stops and says why; one process alone then finishes."""
    files, batches = whole

    def started(rank):
        return Command(tmp_path, *RUN, hold=1, RANK=str(rank), WORLD_SIZE="2")

    first = started(victim)
    until(lambda: computed(tmp_path) == 2)  # it has kept a batch and is at the next
    other = started(1 - victim)  # which finds the first at work
    until(lambda: computed(tmp_path) == 4)
    first.kill()
    (tmp_path / "go").touch()
    assert other.wait() == 1
    err = (tmp_path / ("err" if victim else "err1")).read_text().splitlines()
    assert f"error: process {victim} of 2 died; finished batches are kept; to continue: " in err[-1]
    assert not any("Traceback" in line for line in err)
    alone = Command(tmp_path, *RUN)
    assert alone.wait() == 0, alone.err
    assert computed(tmp_path) <= batches + 2
    assert contents(tmp_path / "run") == files


@pytest.mark.slow
def test_started_with_one_resumed_with_two(tmp_path, whole):
    files, batches = whole
    alone = Command(tmp_path, *RUN, hold=4)
    until(lambda: computed(tmp_path) > 4)
    alone.kill()
    runs = processes(tmp_path, 2, *RUN)
    assert [run.wait() for run in runs] == [0, 0], runs[0].err
    assert computed(tmp_path) <= batches + 1
    assert contents(tmp_path / "run") == files


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_launchers(tmp_path, drawn, launcher):
    options = {
        # without --multi_gpu it starts a single process where there are no GPUs
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2"],
    }[launcher]
    port = ["--main_process_port" if launcher == "accelerate" else "--master_port", "29517"]
    done = subprocess.run(
        [sys.executable, "-m", *options, *port, "-m", "llm_attack", *RUN],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "run") == drawn
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["timings"]["processes"] == 2
