"""Paths with links and other surprises: the path that is checked is the path that is written."""

import errno
import io
import os
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from evaluation import said

from llm_attack import Plan, evaluate
from llm_attack.base import folder
from llm_attack.base.errors import UsageError
from llm_attack.base.failures import NotWritten, ProcessDied, failure
from llm_attack.base.folder import check_writable, resolved, resolved_file
from llm_attack.base.record import DRAFT, write_text
from llm_attack.cli import main
from llm_attack.lm.engine.engine import Engine
from llm_attack.suite.run.fingerprint import keep
from llm_attack.suite.run.store import STORE, Store, begun
from llm_attack.theory import fig4

PLAN = Plan("demo", "demo_piqa", attacks="none,random", limit=2, device="cpu", batch_size=2)
RUN = ["run", "--model", "nowhere", "-o"]
FIG4 = ["reproduce", "fig4", "--seeds", "1", "--points", "20", "--test_points", "20"]
FIG4 += ["--epochs", "2", "--device", "cpu", "-o"]
FIG2 = ["reproduce", "fig2", "--epochs", "1", "--device", "cpu", "-o", "out", "--save"]
EVAL = ["eval", "--model_args", "pretrained=nowhere", "--tasks", "demo_piqa", "--output_path"]
COMMANDS = {"run": RUN, "reproduce": FIG4, "save": FIG2, "eval": EVAL, "all": [
    "reproduce", "all", "-o",
]}  # fmt: skip
FILES = {"compare": ["compare", "run", "run", "-o"], "board": ["compare", "run", "--leaderboard"]}


def refused(*words):
    done = CliRunner().invoke(main, [*words])
    assert done.exit_code == 2, (done.output, done.exception)
    (line,) = said(done.stderr)
    return line


def tree():
    found = sorted(Path().rglob("*"))
    return {p: (p.lstat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in found}


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_attack.suite.report.figures.draw_all", lambda *_: [])
        place = tmp_path_factory.mktemp("once") / "run"
        evaluate(PLAN, output=place, progress="quiet")
    return place


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch, once):
    """A working folder with a run, folders and files of the user's, and all kinds of links."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("llm_attack.suite.report.figures.draw_all", lambda *_: [])
    monkeypatch.setattr(fig4, "draw", lambda *_: None)
    shutil.copytree(once, "run")
    for name in ("T/below", "mine", "home/mine"):
        Path(name).mkdir(parents=True)
    for name in ("mine/notes", "home/mine/notes", "file", "mine.csv", "mine.png"):
        Path(name).write_text("mine")
    Path("T/link").symlink_to(tmp_path / "mine")
    Path("T/up").symlink_to("..")
    Path("T/file").symlink_to(tmp_path / "mine.csv")
    Path("gone").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    os.mkfifo("fifo")
    return tmp_path


ROUNDABOUT = [
    *(
        "T/missing/../../mine",
        "T/missing/a/../../../mine",
        "./mine/",
        "mine/.",
        "T/link",
        "T/up/mine",
    ),
    *("T/link/../mine", "T/up/T/up/mine/x/..", "T/below/../../mine//", "~/mine", "T/./up/./mine"),
]


@pytest.mark.parametrize("command", ["run", "reproduce"])
@pytest.mark.parametrize("path", ROUNDABOUT)
def test_a_folder_of_the_users_by_another_way(command, path):
    before = tree()
    line = refused(*COMMANDS[command], path)
    assert line.startswith("error: output=") and "mine: contains notes, but no run" in line
    assert tree() == before


@pytest.mark.parametrize("command", FILES)
@pytest.mark.parametrize("path", [
    "T/missing/../../mine.csv", "T/up/mine.csv", "./mine.csv", "T/file", "T/link/../mine.csv",
])  # fmt: skip
def test_a_file_of_the_users_by_another_way(command, path):
    before = tree()
    line = refused(*FILES[command], path)
    argument, what = {
        "compare": ("output", "a comparison of two runs"),
        "board": ("leaderboard", "a leaderboard"),
    }[command]
    assert f"{what}; must be such a file" in line and line.startswith(f"error: {argument}=")
    assert tree() == before


NOWHERE = {
    "": "must be a path", "  ": "must be a path", "a\0b": "must be a path",
    "gone": "No such file", "gone/x": "No such file", "T/../gone/x": "No such file",
    "loop": "loop|Too many", "loop/x/y": "loop|Too many",
    "file": "Not a directory", "file/x": "Not a directory", "fifo": "Not a directory",
    "fifo/x": "Not a directory", "/dev/null": "Not a directory", "/dev/full": "Not a directory",
    "/proc/x": "must be", "/proc/self/mem": "must be", "x" * 300: "too long",
    "new/" + "x" * 300 + "/y": "too long", "T/" + "é" * 128: "too long",
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("path", NOWHERE, ids=lambda path: ascii(path[:20]))
def test_a_place_that_cannot_be_written(command, path):
    before = tree()
    line = refused(*COMMANDS[command], path)
    argument = {"save": "save", "eval": "output_path"}.get(command, "output")
    assert line.startswith(f"error: {argument}=")
    assert any(says in line for says in NOWHERE[path].split("|")), line
    assert tree() == before


@pytest.mark.parametrize("command", FILES)
@pytest.mark.parametrize("path", [
    *(path for path in NOWHERE if "file" not in path and "fifo" not in path and path[:4] != "/dev"),
    *("file/x", "fifo/x", "T", "T/", "T/.", "T/..", "/", ".", "fifo", "/dev/null", "x" * 250),
], ids=lambda path: ascii(path[:20]))  # fmt: skip
def test_a_file_that_cannot_be_written(command, path):
    before = tree()
    line = refused(*FILES[command], path)
    assert line.startswith("error: output=" if command == "compare" else "error: leaderboard=")
    assert tree() == before


@pytest.mark.parametrize(("path", "place"), [
    ("T/missing/../out", "T/out"), ("T/up/out", "out"), ("T/below/../out/", "T/out"),
    ("~/out", "home/out"), ("~nobody-here/out", "~nobody-here/out"), (".out", ".out"),
])  # fmt: skip
def test_a_way_round_that_is_free(path, place):
    """Only the place itself is made."""
    before = set(tree())
    assert CliRunner().invoke(main, [*FIG4, path]).exit_code == 0
    inside = {p for p in tree() if Path(place) not in (p, *p.parents)}
    assert inside - {*Path(place).parents} == before - {*Path(place).parents}
    assert (Path(place) / "run.json").exists()


def test_where_a_path_leads(there):
    assert resolved("a/b") == Path("a/b") and resolved("./a/../b") == Path("b")
    assert resolved(there / "a") == there / "a" and resolved(".") == Path()
    assert resolved("T/link/x") == Path("mine/x") and resolved("T/link/../x") == Path("x")
    assert resolved("..") == there.parent and resolved("../x") == there.parent / "x"
    assert resolved_file("T/file") == Path("T/file")  # it is replaced, not followed
    assert resolved_file("T/link/x.csv") == Path("mine/x.csv")
    for path in ("a/../b/c", "T/up/T/below/x", "x/../../y", "T/link/../mine/x"):
        assert there / resolved(path) == Path(os.path.realpath(path))


def test_names_that_are_no_text(once, monkeypatch):
    """A folder whose name is not UTF-8: run, resumed, reported, compared, with a leaderboard."""
    place = os.fsdecode(b"n\xff\xfe")
    result = evaluate(PLAN, output=place, progress="quiet")
    again = evaluate(PLAN, output=place, progress="quiet")
    assert result.table.equals(again.table)
    assert {p.name for p in Path(place).iterdir()} == {p.name for p in once.iterdir()}
    (command,) = [word for word in os.listdir(b".") if word.startswith(b"n")]
    assert command == b"n\xff\xfe"
    for words in (["report", place], ["compare", place, "run", "-o", f"{place}/models.csv"]):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output
    done = CliRunner().invoke(main, ["compare", place, "--leaderboard", f"{place}.csv"])
    assert done.exit_code == 0 and Path(f"{place}.csv").exists(), done.output
    assert CliRunner().invoke(main, [*FIG4, f"{place}/fig4"]).exit_code == 0


def test_one_file_for_two_outputs():
    before = tree()
    words = ["compare", "run", "run", "-o", "x.csv", "--leaderboard", "T/../x.csv"]
    assert "leaderboard=x.csv: must be another file" in refused(*words)
    words = ["compare", "run", "run", "-o", "x.csv", "--leaderboard", "x.png"]
    assert "leaderboard=x.png: must be another file" in refused(*words)
    # neither is written where one is refused
    words = ["compare", "run", "run", "-o", "x.csv", "--leaderboard", "mine.csv"]
    assert "leaderboard=mine.csv: is not a leaderboard" in refused(*words)
    assert tree() == before


class Refuses(io.BytesIO):
    """A file of a disk that is full, or broken, or read-only."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, _):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(("number", "code"), [
    (errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EIO, 1), (errno.EROFS, 2), (errno.EACCES, 2),
])  # fmt: skip
@pytest.mark.parametrize("words", [
    *([*words, "out"] for words in COMMANDS.values()),
    *([*words, "x.csv"] for words in FILES.values()), ["report", "run"],
], ids=lambda words: words[0] + words[-2])  # fmt: skip
def test_a_disk_that_takes_nothing(monkeypatch, words, number, code):
    """Found at the start: a full one is the machine's fault, another place mends the others."""

    def leave(code, line):
        print(line, file=sys.stderr)
        raise SystemExit(code)

    monkeypatch.setattr("llm_attack.suite.evaluate.leave", leave)  # which would end the tests
    monkeypatch.setattr(folder.tempfile, "TemporaryFile", lambda **_: Refuses(number))
    before = tree()
    done = CliRunner().invoke(main, words)
    assert done.exit_code == code and os.strerror(number) in done.stderr, done.output
    assert len(said(done.stderr)) == 1 and tree() == before


def test_the_trial_leaves_no_trace():
    before = tree()
    check_writable(Path("T/new/below"), "x.csv")
    check_writable(Path("T"))
    assert tree() == before
    with pytest.raises(UsageError, match="too long"):
        check_writable(Path("T"), "x" * (255 - len(DRAFT)))
    check_writable(Path("T"), "x" * (254 - len(DRAFT)))
    write_text(Path("T") / ("x" * (254 - len(DRAFT))), "y")


def test_a_file_that_cannot_be_written_in_the_end(monkeypatch):
    """What was tried at the start is no bad input any more."""
    Path("T/x").mkdir()
    with pytest.raises(NotWritten) as raised:
        write_text(Path("T/x"), "text")
    assert failure(raised.value).code == 1 and "T/x" in failure(raised.value).line
    assert raised.value.errno == errno.EISDIR
    assert not [p for p in Path("T").iterdir() if p.name.endswith(DRAFT)]


# -- what a run leaves that ended before it had anything ------------------------------------------


@pytest.mark.parametrize("error", [UsageError("refused"), RuntimeError("x"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["out", "new/below/out", "T"])
@pytest.mark.sampled(3)
def test_a_run_that_has_nothing_leaves_nothing(monkeypatch, error, place):
    def compute(*_):
        raise error

    monkeypatch.setattr("llm_attack.lm.engine.engine.Engine.compute", compute)
    shutil.rmtree("T")
    Path("T").mkdir()
    before = {*Path().rglob("*")}
    with pytest.raises(type(error)):
        evaluate(PLAN, output=place, progress="quiet")
    assert {*Path().rglob("*")} == before


def test_what_is_kept_or_used_is_not_taken_back():
    def begin(name):
        with pytest.raises(UsageError), begun(Path(name)), Store(Path(name), [("a", 0)]) as store:
            keep(Path(name), {"limit": 4})
            if name == "kept":
                store.add(("a", 0), 1)
            raise UsageError("refused")

    begin("kept")
    assert Path("kept", STORE, "part-0.sqlite").exists()
    begin("mine")  # beside what is not ours
    assert Path("mine", STORE).exists()
    with Store(Path("used"), [("a", 0), ("a", 1)], rank=1, world=2):
        begin("used")
        assert Path("used", STORE, "process-1.lock").exists()
    begin("used")
    begin("none")
    assert not Path("none").exists() and not Path("used", STORE).exists()


# -- a folder that goes away ----------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.sampled(3)
def test_a_folder_that_is_removed_in_the_middle(monkeypatch, after):
    """Before the first batch, between two, behind the last: the fault of the machine, in a line."""
    compute, done = Engine.compute, []

    def removing(self, pack):
        found = compute(self, pack)
        if len(done) == after:
            shutil.rmtree("out")
        done.append(pack)
        return found

    monkeypatch.setattr(Engine, "compute", removing)
    with pytest.raises((OSError, ProcessDied)) as raised:
        evaluate(replace(PLAN, limit=4), output="out", progress="quiet")
    found = failure(raised.value)
    assert found.code == 1 and "out/batches" in found.line and "\n" not in found.line
    assert len(done) == after + 1
    assert evaluate(replace(PLAN, limit=4), output="out", progress="quiet") is not None


def test_an_experiments_folder_that_is_removed(monkeypatch):
    train = fig4.train

    def removing(settings):
        shutil.rmtree("out")
        return train(settings)

    monkeypatch.setattr(fig4, "train", removing)
    assert CliRunner().invoke(main, [*FIG4, "out"]).exit_code == 0
    assert Path("out/run.json").exists() and Path("out/curves.csv").exists()


def test_the_threads_that_computed_are_recorded(monkeypatch):
    monkeypatch.setattr("llm_attack.suite.run.on_ray.threads_of", lambda _: 7)
    run = evaluate(PLAN, output="out", progress="quiet").run
    assert run["hardware"]["threads"] == 7


def test_in_another_thread(once):
    """`evaluate` needs no handlers of signals, which only the main thread may set."""
    found = []
    thread = threading.Thread(
        target=lambda: found.append(evaluate(PLAN, output="o", progress="quiet"))
    )
    thread.start()
    thread.join()
    assert found and {p.name for p in Path("o").iterdir()} == {p.name for p in once.iterdir()}


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("config", ["run"]),
        ("words", ["reproduce", "fig6", "-o", "out"]),
        ("load", ["reproduce", "fig2", "-o", "out"]),
        ("weights", ["reproduce", "fig2", "-o", "out", "--network", "cnn"]),
    ],
)
def test_what_can_be_read_for_ever_is_refused(argument, words, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = "/dev/zero" if kind == "device" else "pipe"
    os.mkfifo("pipe")
    before = tree()
    line = refused(*words, f"--{argument}", path)
    assert line == f"error: {argument}={path}: must be a file, not a pipe or a device"
    assert tree() == before


def test_a_shells_substitution_is_read():
    """`--config <(command)` is the reading end of a pipe that the shell opened."""
    read, write = os.pipe()
    os.write(write, b"attacks: [none, nonsense]")
    os.close(write)
    try:
        assert "nonsense" in refused("run", "--config", f"/dev/fd/{read}")
    finally:
        os.close(read)
