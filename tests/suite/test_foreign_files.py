"""Output paths with other people's files: refused or left unchanged; links are not followed."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from evaluation import said

from llm_attack import Plan, evaluate
from llm_attack.base.drawing import new_figure
from llm_attack.base.errors import UsageError
from llm_attack.base.folder import claim
from llm_attack.base.record import DRAFT, write_text
from llm_attack.cli import main
from llm_attack.experiments import FIGURES
from llm_attack.suite.run import fingerprint
from llm_attack.suite.run.execute import execute
from llm_attack.suite.run.store import MARK, STORE, Store, discard
from llm_attack.theory import fig4

PLAN = Plan("demo", "demo_piqa", attacks="none,random", limit=3, device="cpu", batch_size=2)
FIG4 = ["fig4", "--seeds", "1", "--points", "20", "--test_points", "20", "--device", "cpu"]
FIG4 = ["reproduce", *FIG4, "--epochs", "2", "-o", "out"]


def invoke(*words):
    return CliRunner().invoke(main, [*map(str, words)])


def refused(*words):
    done = invoke(*words)
    assert done.exit_code == 2, (done.output, done.exception)
    (line,) = said(done.stderr)
    return line


def run(folder, **options):
    return evaluate(PLAN, output=folder, progress="quiet")


def tree(folder):
    """What there is: kinds, times and contents."""
    return {
        path: (path.lstat().st_mode, path.lstat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    }


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def undrawn():
    """Figures take longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_attack.suite.report.figures.draw_all", lambda *_: [])
        patch.setattr(fig4, "draw", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A finished run, and what it was before: stopped when all batches were kept."""
    finished = tmp_path_factory.mktemp("once") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_attack.suite.evaluate.save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(finished)
    stopped = shutil.copytree(finished, finished.with_name("stopped"))
    run(finished)
    return finished, stopped


def stop(*_):
    raise KeyboardInterrupt


@pytest.fixture
def finished(once):
    return shutil.copytree(once[0], Path("out"))


@pytest.fixture
def stopped(once):
    return shutil.copytree(once[1], Path("out"))


@pytest.fixture
def outside(tmp_path):
    """A file of the user's in a folder of the user's."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "file").write_text("mine")
    return folder / "file"


COMMANDS = {"run": ["run", "--model", "nowhere", "-o", "out"], "reproduce": FIG4}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "name",
    ["table.csv", "notes.txt", ".hidden", "batches/part-0.sqlite", "lm_eval/x", "checkpoints/x.pt"],
)
def test_a_folder_without_our_mark_is_refused(command, name, tmp_path):
    write_text(tmp_path / "out" / name, "mine")
    before = tree(tmp_path)
    line = refused(*COMMANDS[command])
    assert line.startswith(f"error: output=out: contains {name.partition('/')[0]}")
    assert "must be a new folder" in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("content", ["{}", "no JSON", '{"command": "x", "settings": 1}'])
def test_a_record_that_is_not_ours_is_refused(command, content, tmp_path):
    write_text(tmp_path / "out" / "run.json", content)
    before = tree(tmp_path)
    assert "output=out: run.json in this folder is not the record of " in refused(
        *COMMANDS[command]
    )
    assert tree(tmp_path) == before


def test_one_command_does_not_take_the_folder_of_another(finished, tmp_path):
    before = tree(finished)
    assert '(command: "llm-attack run --model" there, ' in refused(*FIG4)
    assert tree(finished) == before
    assert invoke(*FIG4[:-1], "fig4").exit_code == 0
    assert "run.json in this folder is not the record of a run" in refused(
        "run", "--model", "demo", "-o", "fig4"
    )
    assert "fig4/run.json: the entry attacks is NoneType" in refused("report", "fig4")


def test_files_beside_ours_stay_as_they_are(stopped, tmp_path):
    for name in ("notes.txt", "batches/mine.txt", "lm_eval/mine.json", ".table.csv"):
        write_text(stopped / name, "mine")
    before = tree(stopped)
    for _ in range(2):  # as it ends, and when it is read
        run(stopped)
        after = tree(stopped)
        mine = {path: kept for path, kept in before.items() if kept[-1] == b"mine"}
        assert len(mine) == 4 and mine.items() <= after.items()
    assert [path.name for path in (stopped / STORE).iterdir()] == ["mine.txt"]


def test_batches_without_our_mark_are_not_deleted(finished):
    for name in ("part-0.sqlite", "process-0.lock", "file"):
        write_text(finished / STORE / name, "mine")
    before = tree(finished)
    discard(finished)
    run(finished)
    assert tree(finished) == before
    (finished / "samples.parquet").write_text("no samples")
    before = tree(finished)
    with pytest.raises(UsageError, match="batches in this folder has no fingerprint"):
        run(finished)
    assert tree(finished) == before


@pytest.mark.parametrize("part", [STORE, "lm_eval"])
def test_a_part_that_is_a_link_is_refused(part, finished, outside):
    shutil.rmtree(finished / part, ignore_errors=True)
    (finished / part).symlink_to(outside.parent)
    with pytest.raises(UsageError, match=f"output=out: contains the link {part}"):
        run(finished)
    assert list(outside.parent.iterdir()) == [outside]


def test_links_are_replaced(stopped, outside):
    """Of results and of drafts, by a run and by a report."""
    names = ["run.json", "samples.parquet", "table.csv", "table.md", "report.html"]
    links = [stopped / name for name in names]
    links += [stopped / f".{name}{DRAFT}" for name in names]
    links += [stopped / STORE / "process-0.lock", stopped / STORE / "part-1.sqlite"]
    for link in links:
        link.unlink(missing_ok=True)
        link.symlink_to(outside)
    (stopped / "run.json").unlink()
    run(stopped)
    assert not any(link.is_symlink() for link in links)
    assert not any(path.name.endswith(DRAFT) for path in stopped.rglob("*"))
    for link in links[2:5]:
        link.unlink()
        link.symlink_to(outside)
    assert invoke("report", stopped).exit_code == 0
    assert all(link.is_file() and not link.is_symlink() for link in links[:5])
    assert outside.read_text() == "mine"


def test_figures_replace_links(tmp_path, outside):
    names = ["figure.png", "figure.svg", f".figure.png{DRAFT}"]
    for name in names:
        (tmp_path / name).symlink_to(outside)
    with new_figure(tmp_path, (1, 1)):
        pass
    assert outside.read_text() == "mine"
    assert {path.name for path in tmp_path.glob("*.???")} == set(names[:2])
    assert not any((tmp_path / name).is_symlink() for name in names)


def test_a_link_that_was_named_is_followed(finished, tmp_path):
    (tmp_path / "link").symlink_to(finished)
    assert run(tmp_path / "link") is not None
    (tmp_path / "empty").mkdir()
    (tmp_path / "to-empty").symlink_to(tmp_path / "empty")
    assert invoke(*FIG4[:-1], "to-empty").exit_code == 0
    assert (tmp_path / "empty" / "run.json").exists()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    assert "output=nowhere: must be a folder" in refused(*FIG4[:-1], "nowhere")


def test_drafts_of_the_dead_are_cleared(stopped):
    for name in (".table.csv", "lm_eval/.results_gone.json"):
        write_text(stopped / f"{name}{DRAFT}", "half")
    run(stopped)
    assert not any(path.name.endswith(DRAFT) for path in stopped.rglob("*"))


def test_what_a_start_leaves_is_no_mark_and_no_stranger(tmp_path):
    """A process finds another that has its lock, and has not marked the folder yet."""

    def marked(names):
        raise AssertionError(names)

    with Store(tmp_path / "out", []):
        (tmp_path / "out" / STORE / f".{MARK}{DRAFT}").write_text("half")
        claim(tmp_path / "out", marked, (STORE,))
        fingerprint.keep(tmp_path / "out", {"limit": 4})
    assert fingerprint.kept(tmp_path / "out") == {"limit": 4}
    assert {path.suffix for path in (tmp_path / "out" / STORE).iterdir()} <= {".json", ".lock"}


def test_unreadable_samples_leave_the_folder_marked(finished, monkeypatch):
    """A run that is killed between the renaming of what cannot be read and its first batch."""
    (finished / "samples.parquet").write_text("no samples")
    monkeypatch.setattr("llm_attack.suite.evaluate.execute", stop)
    with pytest.raises(KeyboardInterrupt):
        run(finished)
    monkeypatch.setattr("llm_attack.suite.evaluate.execute", execute)
    assert not (finished / "run.json").exists()
    assert run(finished) is not None


# -- reproduce -------------------------------------------------------------------------------------


def test_a_finished_experiment_is_not_replaced_by_another(tmp_path):
    assert invoke(*FIG4).exit_code == 0
    before = tree(tmp_path)
    assert "with other settings (epochs: 2 there, 3 here)" in refused(*FIG4, "--epochs", "3")
    words = ["reproduce", "fig6", "-o", "out"]
    assert '(command: "llm-attack reproduce fig4" there, "' in refused(*words)
    assert tree(tmp_path) == before
    assert invoke(*FIG4).exit_code == 0
    after = tree(tmp_path)
    assert before.keys() == after.keys()
    same = Path("out/curves.csv").resolve()
    assert before[same][2] == after[same][2] and before[same][1] != after[same][1]


def test_an_experiment_that_was_stopped_knows_its_folder(tmp_path, monkeypatch):
    def stop_behind(settings, folder):
        write_text(folder / "checkpoints" / "x.pt", "half")
        raise KeyboardInterrupt

    def begin(run, *words):
        with monkeypatch.context() as patch:
            patch.setattr(fig4, "train", run)
            patch.setattr(fig4, "write_text", run)
            return invoke(*FIG4, *words)

    # before anything is written: nothing stays
    assert begin(stop).exit_code == 130
    assert not list(tmp_path.iterdir())
    # afterwards: the folder is that run's
    begin(lambda settings: stop_behind(settings, tmp_path / "out"))
    before = tree(tmp_path)
    assert Path("out/started.json").resolve() in before
    assert "with other settings (epochs: 2 there, 3 here)" in refused(*FIG4, "--epochs", "3")
    assert tree(tmp_path) == before
    assert invoke(*FIG4).exit_code == 0
    assert not Path("out/started.json").exists()
    assert json.loads(Path("out/run.json").read_text())["settings"]["epochs"] == 2


def test_all_folders_are_looked_at_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(fig4, "train", stop)
    both = [command for command in FIGURES if command.name in ("fig4", "fig6")]
    monkeypatch.setattr("llm_attack.experiments.FIGURES", both)
    write_text(tmp_path / "out" / "README.md", "mine")
    write_text(tmp_path / "out" / "fig6" / "notes", "mine")
    assert "output=out/fig6: " in refused("reproduce", "all", "--device", "cpu")


# -- compare ---------------------------------------------------------------------------------------


def test_compare_replaces_comparisons_alone(finished, outside, tmp_path):
    words = ["compare", finished, finished, "-o", "table"]
    Path("table").write_text("")
    for _ in range(2):
        assert invoke(*words).exit_code == 0
    text = Path("table").read_text()
    assert text.startswith("task,condition,n,left_out,")
    Path("link").symlink_to("table")
    for name in (outside, finished / "samples.parquet", finished / "table.csv", finished, "link"):
        before = tree(tmp_path)
        line = refused(*words[:-1], name)
        fault = "is a link, and not" if name == "link" else "is not"
        assert f"output={name}: {fault} a comparison of two runs; must be" in line
        assert tree(tmp_path) == before
