"""The leaderboard as a file: who may write it, when, and what it replaces."""

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from shown import ROOT
from test_models import five as five
from test_models import folders, invoke  # noqa: F401 (a fixture)

from llm_attack.base.errors import UsageError
from llm_attack.suite.studies import leaderboard, models


def test_a_row_says_all_that_it_depends_on(five, tmp_path):
    board = tmp_path / "board.csv"
    run = five["m0"]
    leaderboard.add(board, {"m": run})
    (row,) = pd.read_csv(board, dtype=str).to_dict("records")
    assert "epsilon=0.01" in row["settings"].split() and "num_fewshot=None" in row["settings"]
    marks = run.run["fingerprint"]
    for other in (
        {"fingerprint": marks | {"weights": "retrained"}},
        {"fingerprint": marks | {"dtype": "torch.bfloat16"}},
        {"fingerprint": marks | {"config": "with longer context"}},
        {"fingerprint": marks | {"tokenizer": "another"}},
        {"fingerprint": marks | {"model_args": {"max_length": 8}}},
        {"fingerprint": marks | {"tasks": {"a": "other questions"}}},
        {"settings": {"loss": "sequence", "num_fewshot": 5}},
        {"settings": {"loss": "sequence", "system_instruction": "You are right."}},
        {"settings": {"loss": "sequence", "context": "shared"}},
        {"settings": {"loss": "sequence", "positions": "not_first"}},
    ):
        before = len(pd.read_csv(board))
        for _ in range(2):
            leaderboard.add(board, {"m": replace(run, run=run.run | other)})
        assert len(pd.read_csv(board)) == before + 1, other
    # of which the numbers do not depend
    for other in ({"versions": {"torch": "9"}}, {"timings": {}}, {"model_name": "renamed"}):
        leaderboard.add(board, {"n": replace(run, run=run.run | other)})
        assert len(pd.read_csv(board)) == before + 1


def test_two_runs_of_the_same_kind_are_one_row(five, tmp_path):
    """Given at once, as one after the other."""
    leaderboard.add(tmp_path / "board.csv", {"first": five["m0"], "second": five["m0"]})
    assert pd.read_csv(tmp_path / "board.csv")["model"].tolist() == ["second"]


def test_models_without_a_hash_are_known_by_their_names(five, tmp_path):
    run = replace(five["m0"], run=five["m0"].run | {"fingerprint": {}})
    for name in ("a", "b", "a"):
        leaderboard.add(tmp_path / "board.csv", {name: run})
    assert pd.read_csv(tmp_path / "board.csv")["model"].tolist() == ["b", "a"]


def test_a_second_writer_waits(five, tmp_path, monkeypatch):
    """One that comes while the first has read and not yet written."""
    board, write = tmp_path / "board.csv", leaderboard.write_text
    others = [(name, run) for name, run in five.items() if name != "m0"]
    waiting = []

    def slow(path, text):
        if not waiting:
            for name, run in others:
                of_runs = {name: run}
                waiting.append(threading.Thread(target=leaderboard.add, args=(board, of_runs)))
                waiting[-1].start()
            for thread in waiting:
                thread.join(timeout=0.3)
            assert all(thread.is_alive() for thread in waiting)
        write(path, text)

    monkeypatch.setattr(leaderboard, "write_text", slow)
    leaderboard.add(board, {"m0": five["m0"]})
    for thread in waiting:
        thread.join()
    assert set(pd.read_csv(board)["model"]) == set(five)


@pytest.mark.slow
def test_three_processes_lose_no_row(folders):  # noqa: F811
    words = [sys.executable, "-m", "llm_attack", "compare"]
    board = ["--leaderboard", "board.csv"]
    running = [subprocess.Popen([*words, folder, *board]) for folder in folders[:3]]
    assert [process.wait() for process in running] == [0] * 3
    assert set(pd.read_csv("board.csv")["model"]) == set(folders[:3])


def test_one_that_never_lets_go(five, tmp_path, monkeypatch):
    monkeypatch.setattr(leaderboard, "_PATIENCE", 0.01)
    board = tmp_path / "board.csv"
    with (
        leaderboard.FileLock(tmp_path / ".board.csv.lock"),
        pytest.raises(UsageError, match=r"leaderboard=.*board\.csv: another process has held"),
    ):
        leaderboard.add(board, {"m": five["m0"]})
    assert not board.exists()


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_a_lock_of_somebody_else(five, tmp_path, kind):
    """Locking empties the file."""
    mine, lock = tmp_path / "mine.txt", tmp_path / ".board.csv.lock"
    mine.write_text("mine")
    if kind == "link":
        lock.symlink_to(mine)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.write_text("mine")
    with pytest.raises(UsageError, match=r"leaderboard=.*is not a lock of llm-attack"):
        leaderboard.add(tmp_path / "board.csv", {"m": five["m0"]})
    assert mine.read_text() == "mine" and (kind == "folder" or lock.read_text() == "mine")
    assert not (tmp_path / "board.csv").exists()


DAMAGED = {
    "open quote": ('"m0', "unexpected end of data"),
    "open quote in a cell": ('m0,"abc', "unexpected end of data"),
    "a letter behind a quote": ('"m0"x,1', "expected after"),
    "few cells": ("m0,abc", "row 3 has 2 cells"),
    "many cells": (",".join("x" * 99), "row 3 has 99 cells"),
    "no UTF-8": (b"\xff\xfe", "can't decode"),
    "a giant cell": ("x" * 200_000, "larger than field limit"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.sampled(3)
def test_a_damaged_leaderboard(folders, damage):  # noqa: F811
    """One line before anything is printed or written, and the file as it was."""
    assert invoke("compare", folders[0], "--leaderboard", "board.csv").exit_code == 0
    line, says = DAMAGED[damage]
    raw = line if isinstance(line, bytes) else line.encode()
    content = Path("board.csv").read_bytes() + raw + b"\n"
    Path("board.csv").write_bytes(content)
    for given in (folders[:1], folders[:2], folders[:3]):
        more = ["-o", "out.csv"] if len(given) > 1 else []
        done = invoke("compare", *given, *more, "--leaderboard", "board.csv")
        assert done.exit_code == 2 and done.stdout == ""
        assert done.stderr.startswith("error: leaderboard=board.csv: cannot be read")
        assert says in done.stderr and len(done.stderr.splitlines()) == 1
        assert Path("board.csv").read_bytes() == content and not Path("out.csv").exists()


def test_one_of_an_earlier_version_goes_on(five, tmp_path):
    """Its rows stay; what they depend on is not known, so that none of them is replaced."""
    board = tmp_path / "board.csv"
    old = (ROOT / "results/demo/models/leaderboard.csv").read_text("utf-8")
    board.write_text(old)
    for _ in range(2):
        leaderboard.add(board, {"m0": five["m0"]})
    before, after = pd.read_csv(ROOT / "results/demo/models/leaderboard.csv"), pd.read_csv(board)
    pd.testing.assert_frame_equal(after[list(before)][: len(before)], before)
    assert after["identity"].isna().tolist() == [True] * len(before) + [False]
    assert set(after.columns) - set(before.columns) == {*("settings", "failed_checks", "identity")}
    assert models.across({"m0": five["m0"]})["drop"].tolist() == pytest.approx(
        after["drop"][-1:].tolist(), abs=1e-5
    )


def test_one_without_checks_goes_on(five, tmp_path):
    board = tmp_path / "board.csv"
    leaderboard.add(board, {"m0": five["m0"], "m1": five["m1"]})
    pd.read_csv(board).drop(columns="failed_checks").to_csv(board, index=False)
    leaderboard.add(board, {"m2": five["m2"], "again": five["m0"]})
    after = pd.read_csv(board)
    assert after["model"].tolist() == ["m1", "m2", "again"] and after["failed_checks"].isna().all()
    assert after["identity"].nunique() == 3


def test_commas_quotes_and_lines_survive(five, tmp_path):
    board = tmp_path / "board.csv"
    names = ['a "quoted", name', "two\nlines", "=1+1", "é,ü"]
    for _ in range(2):
        for name, run in zip(names, five.values(), strict=False):
            leaderboard.add(board, {name: run})
    # what a spreadsheet would compute has an apostrophe
    assert pd.read_csv(board)["model"].tolist() == [*names[:2], "'=1+1", names[3]]
