"""The matrix of transfers: drops by hand, and differences from shuffled signs."""

import json

import numpy as np
import pandas as pd
import pytest
from invented import build

from llm_attack.base.errors import UsageError
from llm_attack.suite import commands, results
from llm_attack.suite.analysis.drops import differences
from llm_attack.suite.analysis.summary import summarise
from llm_attack.suite.plan import fixed
from llm_attack.suite.results import Result
from llm_attack.suite.studies import transfer

SHIFTS = {"none": 3.0, "fixed@0.1": 0.5, "fixed-shuffled@0.1": 2.8, "fixed-random@0.1": 2.9}


def run_of(under, found, shift=0.0, tasks=("a", "b"), weights="w"):
    sizes = {task: (40, 4) for task in tasks}
    shifts = {**SHIFTS, "fixed@0.1": SHIFTS["fixed@0.1"] + shift}
    samples, questions = build(sizes, shifts, norm=False, seed=len(under + found))
    infos = {name: {} for name in shifts}
    about = {"model": found, "condition": "fgsm@0.1", "weights": f"{weights}-{found}"}
    run = {"model_name": under, "fingerprint": {"weights": f"{weights}-{under}"}}
    samples = results.with_scores(samples.assign(hookpoint="embed", cluster=None))
    table = summarise(samples, infos, {})
    return Result(table, samples, questions, {**run, "perturbation": about}, {})


@pytest.fixture(scope="module")
def runs():
    pairs = [("base", "base", 0), ("tuned", "base", 1), ("base", "tuned", 1), ("tuned", "tuned", 0)]
    return {f"{found}-{under}": run_of(under, found, shift) for under, found, shift in pairs}


def accuracy(samples, attack):
    return samples[samples["attack"] == attack].groupby("task")["acc"].mean()


def test_drops_by_hand(runs):
    frame = transfer.transfers(runs)
    assert frame.groupby("found_under", sort=False)["scored_under"].unique().map(list).tolist() == [
        ["base", "tuned"],
        ["base", "tuned"],
    ]
    assert frame["same_weights"].tolist() == [True] * 3 + [False] * 6 + [True] * 3
    for (_, rows), result in zip(
        frame.groupby(["found_under", "scored_under"], sort=False), runs.values(), strict=True
    ):
        of_tasks = rows.set_index("task")
        clean = accuracy(result.samples, "none")
        for column, attack in (
            ("drop", "fixed"),
            ("drop_shuffled", "fixed-shuffled"),
            ("drop_random", "fixed-random"),
        ):
            drops = 100 * (clean - accuracy(result.samples, attack))
            assert of_tasks.loc[["a", "b"], column].tolist() == pytest.approx(drops.tolist())
            assert of_tasks.loc["mean", column] == pytest.approx(drops.mean())
        difference = of_tasks["drop"] - of_tasks["drop_shuffled"]
        assert of_tasks["difference"].tolist() == pytest.approx(difference.tolist())
        assert (of_tasks["difference_low"] < difference).all()
        assert (of_tasks["difference_high"] > difference).all()
        stored = result.table.query("attack == 'fixed'").set_index("task")
        for name in ("drop_low", "drop_high"):
            assert of_tasks[name].tolist() == stored.loc[of_tasks.index, name].tolist()


def test_the_difference_is_paired_by_question(runs):
    """As between two runs, of which one had shuffled signs and the other the perturbation."""
    result = runs["base-base"]
    sides = [
        result.samples[result.samples["attack"].isin(["none", attack])].assign(
            condition=lambda rows: np.where(rows["attack"] == "none", "none", "fixed")
        )
        for attack in ("fixed-shuffled", "fixed")
    ]
    expected = differences(sides[0], result.questions, sides[1], result.questions)
    rows = transfer.transfers({"x": result})
    for name in ("difference", "difference_low", "difference_high", "p"):
        assert rows[name].tolist() == expected[name].tolist()


def test_matrices(runs):
    drops, control, both = transfer.matrices(transfer.transfers(runs)).values()
    assert drops.heading == control.heading == both.heading == ["found under", "base", "tuned"]
    assert [row[0] for row in drops.rows] == ["base", "tuned"]
    ends = [["=" in cell for cell in row[1:]] for row in drops.rows]
    assert ends == [[True, False], [False, True]]
    frame = transfer.transfers(runs).query("task == 'mean'").iloc[1]
    low, high = frame["drop_low"], frame["drop_high"]
    assert drops.rows[0][2] == f"{frame['drop']:.1f} ({low:.1f} to {high:.1f})"
    assert control.rows[0][2] == f"{frame['drop_shuffled']:.1f}"
    low, high = frame["difference_low"], frame["difference_high"]
    assert both.rows[0][2] == f"{frame['difference']:+.1f} ({low:+.1f} to {high:+.1f})"


def test_one_task_has_no_mean():
    frame = transfer.transfers({"x": run_of("m", "m", tasks=("a",))})
    assert frame["task"].tolist() == ["a"]


def test_what_is_refused(runs):
    with pytest.raises(UsageError, match="two runs score perturbations of base"):
        transfer.transfers({"x": runs["base-base"], "y": runs["base-base"]})
    other = Result(pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), {}, {})
    with pytest.raises(UsageError, match="x: has no fixed perturbation"):
        transfer.transfers({"x": other})


def test_the_command_writes_the_table(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands.results, "load", lambda folder: runs[folder.name])
    commands.transfer([tmp_path / name for name in runs], str(tmp_path / "out.csv"))
    stored = pd.read_csv(tmp_path / "out.csv")
    assert list(stored) == transfer.COLUMNS and len(stored) == 12
    assert "found under (row), scored under (column)" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "mine.csv").write_text("mine\n")
    with pytest.raises(UsageError, match=r"mine\.csv"):
        commands.transfer([tmp_path / "base-base"], str(tmp_path / "mine.csv"))


def test_one_of_several_conditions_must_be_named(tmp_path):
    attacks = {name: {"attack": "bim", "epsilon_absolute": 0.1} for name in ("bim@1", "bim@2")}
    (tmp_path / "run.json").write_text(json.dumps({"attacks": attacks}), encoding="utf-8")
    with pytest.raises(UsageError, match=r"perturbation_of=: must name one .*: bim@1, bim@2"):
        fixed._of_run(tmp_path, None)
