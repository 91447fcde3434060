"""Many models compared, their rank correlation, and the leaderboard."""

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from click.testing import CliRunner
from invented import build

from llm_attack import stats as inference
from llm_attack.base.errors import UsageError
from llm_attack.base.record import write_json
from llm_attack.cli import main
from llm_attack.suite import results
from llm_attack.suite.analysis.summary import MEAN, summarise
from llm_attack.suite.results import Result
from llm_attack.suite.studies import models

TASKS = {"a": (60, 4), "b": (40, 2)}


def run_of(name, clean, attacked, *, rms=0.1, tasks=TASKS, seed=0):
    """A run that never was, of which log-likelihoods of gold stand so far above the others."""
    samples, questions = build(tasks, {"none": clean, "fgsm@0.01": attacked}, seed=seed)
    attacks = {
        condition: {"epsilon_absolute": epsilon, "embedding_rms": rms, "hookpoint": None}
        for condition, epsilon in (("none", 0.0), ("fgsm@0.01", 0.01))
    }
    record = {
        **{"command": "llm-attack run", "model": f"hub/{name}", "model_name": name},
        **{"settings": {"loss": "sequence"}, "attacks": attacks, "warnings": []},
        **{"fingerprint": {"weights": f"hash of {name}"}, "versions": {"torch": "2.0"}},
    }
    return Result(summarise(samples), samples, questions, record, {})


@pytest.fixture(scope="module")
def five():
    """The more accurate, the more it loses."""
    shifts = [(0.5, 0.4), (1.0, 0.7), (1.6, 0.9), (2.4, 1.0), (3.5, 0.8)]
    return {f"m{i}": run_of(f"m{i}", *of, seed=i) for i, of in enumerate(shifts)}


def test_across(five):
    frame = models.across(five)
    assert frame["model"].tolist() == list(five) and set(frame["condition"]) == {"fgsm@0.01"}
    assert frame["epsilon_relative"].tolist() == pytest.approx([0.1] * 5)
    for row, of in zip(frame.to_dict("records"), five.values(), strict=True):
        mean = of.table[of.table["task"] == MEAN].set_index("condition")
        assert row["clean"] == mean.loc["none", "acc"] and row["n"] == 100
        for key in ("acc", "drop", "drop_low", "p_mcnemar", "gold_probability_drop"):
            assert row[key] == mean.loc["fgsm@0.01", key], key


def test_only_what_all_were_asked(five):
    """A model with fewer questions, and one with another prompt of one of them."""
    few = run_of("few", 1.0, 0.5, tasks={"a": (30, 4), "b": (40, 2)}, seed=9)
    other = five["m1"]
    hashes = other.questions["doc_hash"].where(other.questions["doc_id"] > 0, "other")
    other = replace(other, questions=other.questions.assign(doc_hash=hashes))
    frame = models.across({"few": few, "other": other, "m2": five["m2"]})
    assert frame["n"].tolist() == [29 + 39] * 3
    samples = five["m2"].samples
    some = samples[(samples["doc_id"] > 0) & ((samples["task"] == "b") | (samples["doc_id"] < 30))]
    expected = summarise(some).set_index(["task", "condition"]).loc[(MEAN, "fgsm@0.01"), "drop"]
    assert frame["drop"].iloc[2] == expected


def test_nothing_in_common(five):
    strange = run_of("strange", 1.0, 0.5, tasks={"c": (9, 4)})
    with pytest.raises(UsageError, match="share no question"):
        models.across({**five, "strange": strange})
    first = five["m0"]
    clean = first.samples[first.samples["condition"] == "none"]
    with pytest.raises(UsageError, match="share no condition beside none"):
        models.across({**five, "m0": replace(first, samples=clean)})


def test_trends(five):
    frame = models.across(five)
    (row,) = models.trends(frame).to_dict("records")
    expected = inference.rank_correlation(frame["clean"], frame["drop"])
    assert (row["correlation"], row["low"], row["high"], row["p"]) == expected
    assert row["correlation"] > 0.8 and row["models"] == 5 and row["even"]
    other = {**five, "m0": run_of("m0", 0.5, 0.4, rms=0.2)}
    assert not models.trends(models.across(other))["even"][0]
    three = models.trends(models.across({name: five[name] for name in ("m0", "m1", "m2")}))
    assert np.isnan(three["correlation"][0])
    notes = models.cells(frame).notes[1]
    assert notes.startswith("fgsm@0.01: rank correlation of clean accuracy and drop +")
    assert "differ" in models.cells(models.across(other)).notes[1]


def test_figure_shows_the_frame(five):
    frame = models.across(five)
    (axes,) = models.figure(frame).axes
    points = [line.get_xydata()[0] for line in axes.lines if line.get_marker() not in ("None", "")]
    shown = {tuple(np.round(xy, 9)) for xy in points}
    expected = zip(frame["clean"], frame["drop"], strict=True)
    assert {tuple(np.round(xy, 9)) for xy in expected} <= shown


def test_rank_correlation_against_scipy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=6)
    y = x + rng.normal(size=6)
    found = inference.rank_correlation(x, y)
    known = scipy.stats.spearmanr(x, y).statistic
    ranks = scipy.stats.rankdata(y)
    all_of = [scipy.stats.spearmanr(x, order).statistic for order in permutations(ranks)]
    assert found.value == pytest.approx(known)
    assert found.p_value == pytest.approx(np.mean(np.abs(all_of) >= abs(known) - 1e-9))
    x, y = rng.normal(size=(2, 30))
    found, known = inference.rank_correlation(x, y), scipy.stats.spearmanr(x, y)
    assert found.p_value == pytest.approx(known.pvalue, abs=0.01)
    perfect = inference.rank_correlation([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    assert perfect == pytest.approx((1, 1, 1, 2 / 120))
    assert np.isnan(inference.rank_correlation([1, 1, 1, 1], [1, 2, 3, 4])).all()
    assert np.isnan(inference.rank_correlation([1, 2, 3], [1, 2, 3])).all()


@pytest.mark.parametrize("n, rho", [(8, 0.0), (12, 0.5), (30, 0.8)])
def test_rank_correlation_covers(n, rho):
    """10,000 samples of a normal distribution, whose rank correlation is known."""
    rng, truth = np.random.default_rng(1), 6 / np.pi * np.arcsin(rho / 2)
    x = rng.normal(size=(10_000, n))
    y = rho * x + np.sqrt(1 - rho**2) * rng.normal(size=x.shape)
    ranks = [scipy.stats.rankdata(of, axis=1) - (n + 1) / 2 for of in (x, y)]
    values = (ranks[0] * ranks[1]).sum(1) / (n * (n**2 - 1) / 12)
    assert inference.rank_correlation(x[0], y[0]).value == pytest.approx(values[0])
    low, high = inference.rank_interval(values, n)
    # 0.95 with a standard deviation of 0.0022; an approximation of few pairs
    assert 0.93 <= np.mean((low <= truth) & (truth <= high)) <= 0.975


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def folders(five, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name, of in five.items():
        results.save_frames(
            Path(name), samples=of.samples.assign(hookpoint="embed"), questions=of.questions
        )
        write_json(Path(name) / "run.json", of.run)
    return list(five)


def invoke(*words):
    return CliRunner().invoke(main, list(map(str, words)))


def test_command(folders, five):
    done = invoke("compare", *folders, "-o", "models.csv", "--leaderboard", "board.csv")
    assert done.exit_code == 0, (done.output, done.exception)
    frame = models.across(five)
    found = pd.read_csv("models.csv")
    np.testing.assert_allclose(found["drop"], frame["drop"], atol=1e-6)
    assert Path("models.png").exists() and Path("models.svg").exists()
    assert "rank correlation" in done.stdout and "written: board.csv" in done.stdout


def test_leaderboard_grows(folders):
    """A row for each model and condition; of the same weights and condition the last one counts."""
    assert invoke("compare", *folders[:2], "--leaderboard", "board.csv").exit_code == 0
    assert invoke("compare", folders[2], "--leaderboard", "board.csv").exit_code == 0
    before = Path("board.csv").read_text()
    board = pd.read_csv("board.csv")
    assert board["model"].tolist() == ["m0", "m1", "m2"]
    assert board["weights"].tolist() == [f"hash of m{i}" for i in range(3)]
    assert (board["tasks"] == "a,b").all() and (board["hookpoint"] == "embed").all()
    assert invoke("compare", *folders[:3], "--leaderboard", "board.csv").exit_code == 0
    assert Path("board.csv").read_text() == before


def test_leaderboard_replaces_no_other_file(folders):
    Path("mine.csv").write_text("model,score\nx,1\n")
    for name in ("mine.csv", "m0/samples.parquet", "m0"):
        done = invoke("compare", *folders, "--leaderboard", name)
        assert done.exit_code == 2 and f"={name}: is not a leaderboard" in done.stderr
    assert Path("mine.csv").read_text() == "model,score\nx,1\n"
    Path("models.png").write_bytes(b"mine")
    done = invoke("compare", *folders, "-o", "models.csv")
    assert done.exit_code == 2 and "would replace models.png" in done.stderr
    assert Path("models.png").read_bytes() == b"mine" and not Path("models.csv").exists()


def test_names_of_models_and_of_folders(five):
    runs = list(five.values())
    assert models.names([Path("x"), Path("y")], runs[:2]) == ["m0", "m1"]
    assert models.names([Path("x"), Path("y")], [runs[0], runs[0]]) == ["x", "y"]


def test_what_is_not_compared(folders):
    done = invoke("compare", folders[0])
    assert done.exit_code == 2 and "two folders or more" in done.stderr
    done = invoke("compare", *folders, "--equivalence", "1")
    assert done.exit_code == 2 and "needs exactly two folders" in done.stderr
