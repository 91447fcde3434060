"""Bad input and faults: one clear line for each, the right exit code, nothing written or lost."""

import errno
import json
import os
import sqlite3
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from evaluation import said
from processes import RUN, Command, computed, contents, until
from rich.console import Console

from llm_attack import evaluate
from llm_attack.base.errors import UsageError
from llm_attack.base.record import write_text
from llm_attack.cli import main
from llm_attack.suite.plan import Plan
from llm_attack.suite.run import fingerprint
from llm_attack.suite.run.execute import execute, prepare
from llm_attack.suite.run.progress import RunProgress
from llm_attack.suite.run.store import STORE, Store

DEMO = ["run", "--model", "demo", "--tasks", "demo_piqa", "--limit", "4", "--device", "cpu"]


def refused(*arguments):
    """The one line that a command ends with."""
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == 2, (done.output, done.exception)
    (line,) = said(done.stderr)
    assert line.startswith("error: ")
    return line


def test_bad_calls():
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'"):
        Plan("demo", epsilon=0.1)
    with pytest.raises(UsageError, match="steps='many'"):
        Plan("demo", steps="many")
    with pytest.raises(UsageError, match="limit='ten'"):
        Plan("demo", limit="ten")
    with pytest.raises(UsageError, match=r"progress=bra: must be one of .*did you mean 'bar'"):
        evaluate(Plan("demo"), progress="bra")


def test_plan_reads_flags_lists_and_single_values():
    flags = Plan(tasks="a, b", attacks="fgsm,none", epsilons="0.1,0.20", batch_size="8", limit=5.0)
    lists = Plan(
        tasks=["a", "b"], attacks=("fgsm", "none"), epsilons=[0.1, 0.2], batch_size=8, limit=5
    )
    assert flags == lists
    assert flags.settings() == lists.settings()
    names = [c.attack_in_units.condition for c in flags.conditions]
    assert names == ["none", "fgsm@0.1", "fgsm@0.2"]
    assert Plan(epsilons=0.1).plain()["epsilons"] == (0.1,)
    assert Plan(model_args="dtype=float64,peft=x").model_args == {"dtype": "float64", "peft": "x"}


@pytest.fixture
def two_runs():
    """Two plans for the same folder, prepared before either has written there."""
    console = Console(quiet=True)
    plans = [Plan("demo", "demo_piqa", attacks="none", limit=n, batch_size=2) for n in (4, 5)]
    return [(prepare(plan, "quiet", console), "quiet", console) for plan in plans]


def test_two_runs_that_start_in_one_folder_at_once(two_runs, tmp_path, monkeypatch):
    """The later one is refused, though neither was there when it looked."""
    (first, *how), (second, *_) = two_runs
    interrupt_after(first, 2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        execute(first, tmp_path, *how)
    before = kept_in(tmp_path)
    assert any(path.suffix == ".sqlite" for path in before)
    with pytest.raises(
        UsageError, match=r"contains a run with other settings \(limit: 4 there, 5 here"
    ):
        execute(second, tmp_path, *how)
    assert kept_in(tmp_path) == before


def test_a_mark_is_the_first_runs(tmp_path):
    fingerprint.keep(tmp_path, {"limit": 4})
    fingerprint.keep(tmp_path, {"limit": 4})
    with pytest.raises(UsageError, match="limit: 4 there, 5 here"):
        fingerprint.keep(tmp_path, {"limit": 5})
    assert fingerprint.kept(tmp_path) == {"limit": 4}


def test_what_a_model_makes_of_its_weights_is_in_its_mark(two_runs):
    """The same weights, normalised otherwise, are another model."""
    prepared = two_runs[0][0]
    config = prepared.lm.model.config
    before = fingerprint.of_run(prepared.plan, prepared.lm, [], [], [])
    config.rms_norm_eps = 2 * config.rms_norm_eps
    after = fingerprint.of_run(prepared.plan, prepared.lm, [], [], [])
    assert {key for key in before if before[key] != after[key]} == {"config"}


def test_a_mark_that_changes_under_a_run(two_runs, tmp_path, monkeypatch):
    """Nothing more is kept once the folder is another run's."""
    (first, *how), (second, *_) = two_runs

    def changed():
        text = json.dumps({"fingerprint": fingerprint.plain(second.mark)})
        (tmp_path / STORE / "fingerprint.json").write_text(text)

    after(first, 2, changed, monkeypatch)
    with pytest.raises(UsageError, match="contains a run with other settings"):
        execute(first, tmp_path, *how)
    with Store(tmp_path, [w.key for w in first.work]) as store:
        assert len(store.keys()) == 1


def test_batches_without_a_mark_are_nobodys(two_runs, tmp_path, monkeypatch):
    (first, *how), (second, *_) = two_runs
    interrupt_after(first, 2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        execute(first, tmp_path, *how)
    (tmp_path / STORE / "fingerprint.json").unlink()
    for run in (first, second):
        with pytest.raises(UsageError, match=r"batches in this folder has no fingerprint\.json"):
            execute(run, tmp_path, *how)


def kept_in(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path: path.read_bytes() for path in files}


def after(prepared, number, do, monkeypatch):
    """Calls `do` when the run begins its `number`-th batch."""
    compute, left = prepared.lm.engine.compute, [number]

    def counted(pack):
        left[0] -= 1
        if left[0] == 0:
            do()
        return compute(pack)

    monkeypatch.setattr(prepared.lm.engine, "compute", counted)


def interrupt_after(prepared, number, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    after(prepared, number, interrupt, monkeypatch)


def test_no_data_and_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "nothing")
    line = refused("run", "--model", "demo", "--tasks", "piqa", "-o", tmp_path / "out")
    assert "tasks=piqa: the data of the tasks cannot be loaded (" in line and "hub" in line
    assert not (tmp_path / "out").exists()


def test_missing_config(tmp_path):
    assert "suite.yaml: cannot be read" in refused("run", "--config", tmp_path / "suite.yaml")


def test_output_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    for output in (path, path / "below"):
        line = refused(*DEMO, "-o", output)
        assert f"output={output}: must be a folder that can be written, or not exist yet (" in line
    assert path.read_text() == "mine"


def test_output_is_read_only(tmp_path, monkeypatch):
    def refuses(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.TemporaryFile", refuses)
    line = refused(*DEMO, "-o", tmp_path / "run")
    assert f"output={tmp_path / 'run'}: must be a folder that can be written" in line
    assert "(Read-only file system)" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ['{"mine": 1}', '{"model": "de', "[]", '{"fingerprint": 3}'])
@pytest.mark.parametrize("name", ["run.json", f"{STORE}/fingerprint.json"])
def test_foreign_folder(tmp_path, content, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    line = refused(*DEMO, "-o", tmp_path)
    assert f"output={tmp_path}: {name} in this folder is not the record of a run" in line
    assert path.read_text() == content


@pytest.mark.slow
def test_another_run(finished, tmp_path, whole):
    """Finished, and then unfinished."""
    before = contents(tmp_path / "run")
    other = Command(tmp_path, *RUN, "--epsilons", "0.02", "--tasks", "demo_piqa")
    assert other.wait() == 2
    (line,) = said(other.err)
    assert "run: contains a run with other settings (epsilons: [0.01] there, [0.02] here; " in line
    assert 'tasks.demo_winogrande: "' in line and '" there, null here' in line
    assert contents(tmp_path / "run") == before

    folder = tmp_path / "stopped"
    command = Command(folder, *RUN, hold=1)
    until(lambda: computed(folder) > 1)
    command.kill()
    other = Command(folder, *RUN, "--seed", "1")
    assert other.wait() == 2
    assert "(seed: 0 there, 1 here)" in other.err
    again = Command(folder, *RUN)
    assert again.wait() == 0
    assert contents(folder / "run") == whole[0]


@pytest.mark.slow
def test_two_runs_at_once(tmp_path, whole):
    first = Command(tmp_path, *RUN, hold=1)
    until(lambda: computed(tmp_path) > 1)
    second = Command(tmp_path / "elsewhere", *RUN[:-1], tmp_path / "run")
    assert second.wait() == 2
    (tmp_path / "go").touch()
    assert "another run is writing into this folder" in second.err
    assert first.wait() == 0
    assert computed(tmp_path) == whole[1]
    assert contents(tmp_path / "run") == whole[0]


def damage(path, share=0.5):
    """One bit."""
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["bit", "truncated", "foreign", "removed"])
@pytest.mark.sampled(4)
def test_damaged_samples(finished, tmp_path, whole, how):
    folder = tmp_path / "run"
    path = folder / "samples.parquet"
    if how == "bit":
        # of the pages, which have checksums: what is between them may not matter
        column = pq.ParquetFile(path).metadata.row_group(0).column(0)
        end = column.data_page_offset + column.total_compressed_size
        damage(path, (end - 2) / path.stat().st_size)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "foreign":
        path.write_text("a,b\n1,2\n")
    else:
        path.unlink()
    again = Command(tmp_path, *RUN)
    assert again.wait() == 0, again.err
    note = json.loads(said(again.err)[0])["text"]
    assert "samples.parquet" in note and "moved aside, and computed again" in note
    assert computed(tmp_path) == 2 * whole[1]
    found = contents(folder)
    aside = {name for name in found if name.endswith(".unreadable")}
    expected = {"run.json", "questions.parquet", *(["samples.parquet"] if how != "removed" else [])}
    assert aside == {f"{name}.unreadable" for name in expected}
    assert {name: found[name] for name in found if name not in aside} == whole[0]


@pytest.mark.parametrize("how", ["digit", "page", "foreign", "empty"])
@pytest.mark.sampled(3)
def test_damaged_store(tmp_path, whole, how):
    command = Command(tmp_path, *RUN, hold=5)
    until(lambda: computed(tmp_path) > 5)
    command.kill()
    path = tmp_path / "run" / STORE / "part-0.sqlite"
    if how == "digit":
        part = sqlite3.connect(path)
        with part:
            part.execute("UPDATE batches SET content = replace(content, '1', '2')")
        part.close()
    elif how == "page":
        content = bytearray(path.read_bytes())
        content[4096:4200] = bytes(104)
        path.write_bytes(content)
    else:
        path.write_bytes(b"not a database" * 500 if how == "foreign" else b"")
    again = Command(tmp_path, *RUN)
    assert again.wait() == 0, again.err
    if how != "empty":
        note = json.loads(said(again.err)[0])["text"]
        assert "part-0.sqlite: cannot be read; moved aside, and computed again: " in note
        assert note.endswith("part-0.corrupt")
    assert contents(tmp_path / "run") == whole[0]


def test_disk_full(tmp_path, whole):
    """As the system says it: no file may grow beyond a size, which the batches' comes to first."""
    command = Command(tmp_path, *RUN, limit=12_000)
    assert command.wait() == 1
    *_, line = command.err.splitlines()
    assert line.startswith("error: ") and "; finished batches are kept; to continue: " in line
    assert "Traceback" not in command.err
    assert not (tmp_path / "run" / "run.json").exists()
    before = computed(tmp_path)
    again = Command(tmp_path, *RUN)
    assert again.wait() == 0, again.err
    assert computed(tmp_path) <= whole[1] + 1 and before > 0
    assert contents(tmp_path / "run") == whole[0]


def test_killed_while_writing(tmp_path):
    """What it leaves behind goes when the file is written again."""
    code = (
        "import os, pathlib; from llm_attack.base.record import write_text;"
        "os.fsync = lambda file: os.kill(os.getpid(), 9); write_text(pathlib.Path('file'), 'half')"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == -9
    assert [path.name for path in tmp_path.iterdir()] != ["file"]
    write_text(tmp_path / "file", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_modes_of_progress(finished, tmp_path):
    events = map(json.loads, (tmp_path / "err").read_text().splitlines())
    *_, line = [event for event in events if event["event"] == "progress"]
    assert line["requests"] == line["total"] == 2 * 6 * 2
    assert line["seconds_left"] == 0
    results = {path: json.loads(path.read_text()) for path in (tmp_path / "run").rglob("results_*")}
    for path, of_condition in results.items():
        name = path.stem.removeprefix("results_")
        accuracies = [found["acc,none"] for found in of_condition["results"].values()]
        assert line["accuracy"][name] == pytest.approx(sum(accuracies) / 2, abs=1e-4)
    assert "written" in (tmp_path / "out").read_text()
    quiet = Command(tmp_path, *RUN, "--progress", "quiet")
    assert quiet.wait() == 0
    assert quiet.err == ""
    assert "written" not in quiet.out and "demo_piqa" in quiet.out


def test_bar_fits_eighty_columns():
    """The accuracy of every condition can be read, however many there are."""
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    names = ["none", *(f"{a}@{e}" for a in ("random", "fgsm", "bim") for e in (0.002, 0.01, 0.02))]
    with RunProgress("bar", console, names, total=62566, done=500) as progress:
        progress.add(4, [[1.0] + [0.0] * 9, [1.0] * 10])
    shown = console.file.getvalue()
    for name in names:
        assert f"{name} {1.0 if name == 'none' else 0.5:.3f}" in shown
    assert all(len(line) <= 80 for line in shown.split("\x1b[2K")[-1].splitlines()[:-1])


def test_json_lines_estimate_the_time_left(monkeypatch):
    import io

    from rich.console import Console

    now = iter([100.0, 120.0, 120.0, 125.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    console = Console(file=io.StringIO())
    progress = RunProgress("json", console, ["none", "fgsm@0.1"], total=100, done=40)
    progress.add(20, [[1.0, 0.0], [0.0, 0.0]])
    (line,) = console.file.getvalue().splitlines()
    assert json.loads(line) == {
        "event": "progress",
        "requests": 60,
        "total": 100,
        "seconds": 20.0,
        "seconds_left": 40.0,
        "accuracy": {"none": 0.5, "fgsm@0.1": 0.0},
    }
