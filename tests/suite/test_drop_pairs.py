"""Differences of drops of three models or more, and the figure of two as PDF."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.multitest import multipletests
from test_drops import drawn, run_of, several

from llm_attack.base.errors import UsageError
from llm_attack.suite import commands
from llm_attack.suite.analysis.drops import differences
from llm_attack.suite.results import Result, save_frames
from llm_attack.suite.studies import drop_pairs

STORED = Path(__file__).parents[2] / "results" / "demo" / "sequence"


@pytest.fixture(scope="module")
def runs():
    """Three models on two tasks."""
    named = {}
    for i, name in enumerate("xyz"):
        tasks = {task: drawn(80, 10 * i + t) for t, task in enumerate("ab")}
        samples, questions = several(
            *(run_of(of[0], of[1 + i % 2 * 2], task) for task, of in tasks.items())
        )
        named[name] = Result(pd.DataFrame(), samples, questions, {}, {}, samples)
    return named


@pytest.fixture(scope="module")
def frame(runs):
    return drop_pairs.pairs(runs)


def test_each_pair_is_as_it_is_alone(runs, frame):
    assert list(dict.fromkeys(zip(frame["a"], frame["b"], strict=True))) == [
        ("x", "y"),
        ("x", "z"),
        ("y", "z"),
    ]
    for (a, b), rows in frame.groupby(["a", "b"]):
        alone = differences(
            *(runs[a].samples, runs[a].questions, runs[b].samples, runs[b].questions)
        )
        same = [name for name in alone if name != "p_holm"]
        pd.testing.assert_frame_equal(
            rows[same].reset_index(drop=True), alone[same].reset_index(drop=True)
        )


def test_differences_add_up(frame):
    """All models answered the same questions: z over x is z over y and y over x."""
    means = frame[frame["task"] == "mean"].set_index(["a", "b"])["difference"]
    assert means["x", "z"] == pytest.approx(means["x", "y"] + means["y", "z"])


def test_p_values_are_adjusted_over_the_pairs(frame):
    for _, rows in frame.groupby(["condition", "task"]):
        expected = multipletests(rows["p"], method="holm")[1]
        np.testing.assert_allclose(rows["p_holm"], expected)
        assert len(rows) == 3


def test_the_table_has_the_means(frame):
    cells = drop_pairs.cells(frame)
    means = frame[frame["task"] == "mean"]
    assert [row[:3] for row in cells.rows] == means[["condition", "a", "b"]].to_numpy().tolist()
    for row, value in zip(cells.rows, means["difference"], strict=True):
        assert float(row[6].split()[0]) == pytest.approx(value, abs=0.051)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Three folders of a stored run, which differ in some answers under attack."""
    folders = []
    for i in range(3):
        folder = tmp_path_factory.mktemp("runs") / f"run-{i}"
        shutil.copytree(STORED, folder)
        samples = pd.read_parquet(folder / "samples.parquet")
        attacked = samples.index[samples["condition"] == "fgsm@0.01"][: 30 * i]
        samples.loc[attacked, "acc"] = 1 - samples.loc[attacked, "acc"]
        save_frames(folder, samples=samples)
        folders.append(folder)
    return folders


def test_three_runs_write_their_differences(stored, tmp_path, capsys):
    folders = stored
    table = tmp_path / "models.csv"
    commands.compare(folders, str(table), None, None)
    written = pd.read_csv(tmp_path / "models-drops.csv")
    assert list(written.columns) == drop_pairs.COLUMNS
    assert len(written.groupby(["a", "b"])) == 3
    assert "differences of drops" in capsys.readouterr().out
    (tmp_path / "models-drops.csv").write_text("mine\n")
    with pytest.raises(UsageError, match=r"models-drops\.csv: is not a comparison of drops"):
        commands.compare(folders, str(table), None, None)


def test_pairs_of_many_are_not_compared(stored, tmp_path, capsys, monkeypatch):
    """What is in the file then is not of an earlier comparison either."""
    table = tmp_path / "models.csv"
    commands.compare(stored, str(table), None, None)
    monkeypatch.setattr(drop_pairs, "MOST", 2)
    capsys.readouterr()
    commands.compare(stored, str(table), None, None)
    assert "differences of drops: not compared; give 2 runs or fewer" in capsys.readouterr().out
    assert (tmp_path / "models-drops.csv").read_text() == ",".join(drop_pairs.COLUMNS) + "\n"
    assert len(pd.read_csv(table)) > 0


def test_two_runs_have_a_figure_for_a_paper(stored, tmp_path):
    first, second, _ = stored
    commands.compare([first, second], str(tmp_path / "pair.csv"), None, None, formats="pdf,tex")
    assert (tmp_path / "pair-drops.pdf").read_bytes().startswith(b"%PDF")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"pair.csv", "pair.tex", "pair-drops.csv", "pair-drops.png"} <= names
    (tmp_path / "two-drops.pdf").write_text("mine")
    with pytest.raises(UsageError, match="the figure beside it would replace a file"):
        commands.compare([first, second], str(tmp_path / "two.csv"), None, None, formats="pdf")
    assert (tmp_path / "two-drops.pdf").read_text() == "mine"
