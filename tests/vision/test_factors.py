"""The factorial experiment: each combination once, effects of factors, bad input."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.vision import factors, stages

SMALL = {"width": 0.25, "epochs": 2, "train_size": 32, "test_size": 20, "batch_size": 16}


def test_the_command(tmp_path, monkeypatch):
    """A row for each combination, epoch and condition; each is a training of its own."""
    monkeypatch.chdir(tmp_path)
    options = [part for key, value in SMALL.items() for part in (f"--{key}", str(value))]
    options += ["--attacks", "fgsm", "--augmentations", "usual"]
    done = CliRunner().invoke(main, ["reproduce", "factors", *options, "-o", "out"])
    assert done.exit_code == 0, done.output
    files = {"table.csv", "effects.csv", "figure.png", "figure.svg", "run.json", "checkpoints"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    table = pd.read_csv("out/table.csv")
    keys = [*factors.FACTORS, "seed", "epoch", "condition"]
    assert len(table) == len(table[keys].drop_duplicates()) == 2 * 2 * 2 * 5
    last = table[(table["epoch"] == 2) & (table["condition"] == "none")]
    assert last["promised"].nunique() == 4  # all are other networks
    assert (last["kept"] - last["rise"] / last["promised"]).abs().max() < 1e-5
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["settings"]["label_smoothings"] == [0, 0.1]
    assert len(record["results"]["last_epoch"]) == 4 * 2


def invented():
    """Smoothing adds 0.2 under FGSM, the cycle 0.1, each epoch 0.05; and noise of a pair."""
    rows = []
    for smoothing, schedule, epoch in itertools.product((0.0, 0.1), ("constant", "cycle"), (1, 2)):
        known = {"network": "cnn", "width": 1.0, "smoothing": smoothing, "augmentation": "usual"}
        known |= {"schedule": schedule, "seed": 0, "epoch": epoch}
        value = 0.1 + 2 * smoothing + 0.1 * (schedule == "cycle") + 0.05 * epoch
        value += 0.02 * (schedule == "cycle" and smoothing > 0)
        weaker = 3 * smoothing
        attacked = (("fgsm", value), ("apgdt", value - weaker))
        for condition, accuracy in (("none", 0.9), *attacked, ("all", 0.9)):
            numbers = dict.fromkeys(factors.DIAGNOSTICS, value)
            rows.append({**known, "condition": condition, "accuracy": accuracy, **numbers})
    return pd.DataFrame(rows)


def test_effects_are_of_pairs_that_differ_in_one_factor():
    found = factors.effects(invented()).set_index(["factor", "of"])
    smoothing = found.loc[("smoothing", "fgsm")]
    assert (smoothing["before"], smoothing["after"], smoothing["pairs"]) == (0, 0.1, 2)
    assert smoothing["difference"] == pytest.approx(0.21)
    # of 0.20 and 0.22: their standard error is 0.01, and t of one degree of freedom 12.706
    assert smoothing["low"] == pytest.approx(0.21 - 0.12706, abs=1e-5)
    assert smoothing["high"] == pytest.approx(0.21 + 0.12706, abs=1e-5)
    assert found.loc[("schedule", "cosine"), "difference"] == pytest.approx(0.11)
    epochs = found.loc[("epoch", "fgsm")]
    assert (epochs["pairs"], epochs["difference"]) == (4, pytest.approx(0.05))
    accuracies = {"clean", "fgsm", "apgdt", "gap"}
    assert set(found.loc["smoothing"].index) == accuracies | {*factors.DIAGNOSTICS}
    assert found.loc[("smoothing", "gap"), "difference"] == pytest.approx(0.3)
    assert found.loc[("schedule", "gap"), "difference"] == pytest.approx(0)
    # nothing else has two levels
    assert set(found.index.get_level_values("factor")) == {"epoch", "smoothing", "schedule"}
    alone = factors.effects(invented()[lambda table: table["schedule"] == "cycle"])
    alone = alone.set_index(["factor", "of"]).loc[("smoothing", "fgsm")]
    assert alone["pairs"] == 1 and alone["difference"] == pytest.approx(0.22)
    assert np.isnan(alone["low"])


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"augmentations": "none,usuall"}, r"augmentations=usuall: .*'usual'"),
        ({"schedules": "cycles"}, r"schedules=cycles: .*'cycle'"),
        ({"label_smoothings": (0.0, 1.0)}, r"label_smoothing.*1"),
        ({"dataset": "digits,mnist"}, r"dataset='digits,mnist': must be one data set"),
        ({"load": "somewhere"}, r"load='somewhere': must be absent"),
    ),
    ids=str,
)
def test_bad_settings_are_refused_before_any_work(tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr(stages, "train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(UsageError, match=message):
        factors.run(factors.Settings(**settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()
