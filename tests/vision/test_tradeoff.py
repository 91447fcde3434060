"""Clean and robust accuracy: files, numbers, resuming, bad input."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.stats import rank_correlation
from llm_attack.vision import fig2, stages, tradeoff
from llm_attack.vision.data import load_dataset
from llm_attack.vision.momentum import momentum_spread

SMALL = {"width": 0.25, "epochs": 2, "train_size": 32, "test_size": 40, "batch_size": 16}


def test_the_command(tmp_path, monkeypatch):
    """A row for each network, training, seed, epoch and condition; other trainings, other ones."""
    monkeypatch.chdir(tmp_path)
    options = [part for key, value in SMALL.items() for part in (f"--{key}", str(value))]
    options += ["--network", "cnn", "--widths", "1,2", "--seeds", "2", "--attacks", "fgsm,pgd"]
    done = CliRunner().invoke(main, ["reproduce", "tradeoff", *options, "-o", "out"])
    assert done.exit_code == 0, done.output
    files = {"table.csv", "correlations.csv", "trends.csv", "figure.png", "figure.svg", "run.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*files, "checkpoints"}
    table = pd.read_csv("out/table.csv")
    keys = ["network", "width", "training", "seed", "epoch", "condition"]
    assert len(table) == len(table[keys].drop_duplicates()) == 2 * 3 * 2 * 2 * 6
    assert set(table["width"]) == {0.25, 0.5} and set(table["seed"]) == {0, 1}
    last = table[(table["epoch"] == 2) & (table["condition"] == "none")]
    assert last["dp"].nunique() == 2 * 3 * 2  # all are other networks
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["settings"]["widths"] == [1, 2] and len(record["results"]["overall"]) == 8
    assert {"TRADES", "PGD", "clean images"} <= set(_words("out/figure.svg"))

    settings = fig2.Settings(**SMALL, train_attack="trades", seed=1)
    network, rows = stages.trained(
        load_dataset("digits", settings),
        "cnn",
        settings,
        ["fgsm"],
        tradeoff.Stopwatch(),
        epsilon=0.1,
    )
    of = table[(table["training"] == "trades") & (table["seed"] == 1) & (table["width"] == 0.25)]
    both = of.set_index(["epoch", "condition"])
    for row in rows:
        assert both.loc[(row["epoch"], row["condition"]), "accuracy"] == pytest.approx(
            row["accuracy"]
        ) or row["condition"] in ("lowest", "highest")
    few = load_dataset("digits", settings).test[: tradeoff.PRESETS["quick"].subset]
    spread = momentum_spread(network, few)
    assert both.loc[(2, "none"), "dp"] == pytest.approx(spread, rel=1e-4)


def _words(path):
    from xml.etree import ElementTree

    return [of.text for of in ElementTree.parse(path).iter() if of.tag.endswith("text")]


def invented():
    """Three trainings, two seeds, four epochs; in each, robust accuracy falls as clean rises."""
    rng, rows = np.random.default_rng(0), []
    for i, training in enumerate(("none", "pgd", "trades")):
        for seed in (0, 1):
            for epoch in range(1, 5):
                clean = 0.9 - 0.1 * i + 0.01 * epoch + 0.001 * rng.random()
                robust = 0.2 + 0.2 * i - 0.02 * epoch + 0.001 * seed
                at = {"dataset": "d", "network": "cnn", "width": 1.0, "training": training}
                at |= {"seed": seed, "epoch": epoch, "dp": 9 * clean}
                rows.append({**at, "condition": "none", "accuracy": clean, "fooled": math.nan})
                fooled = 1 - robust / clean
                rows.append({**at, "condition": "fgsm", "accuracy": robust, "fooled": fooled})
                rows.append({**at, "condition": "all", "accuracy": clean, "fooled": math.nan})
    return pd.DataFrame(rows)


def test_correlations():
    table = invented()
    found = tradeoff.correlations(table).set_index(["training", "epochs", "x", "y"])
    assert set(found["attack"]) == {"fgsm"}
    clean, robust = (table[table["condition"] == c] for c in ("none", "fgsm"))
    wanted = rank_correlation(clean["accuracy"], robust["accuracy"])
    of = found.loc[("all", "all", "clean", "robust")]
    assert tuple(of[["correlation", "low", "high"]]) == pytest.approx(wanted[:3])
    assert of["n"] == 24
    seeds = [
        rank_correlation(*(x.loc[x["seed"] == seed, "accuracy"] for x in (clean, robust))).value
        for seed in (0, 1)
    ]
    assert (of["lowest"], of["highest"]) == pytest.approx((min(seeds), max(seeds)))
    within = found.loc[("pgd", "all", "clean", "robust")]
    assert within["n"] == 8 and within["lowest"] == within["highest"] == pytest.approx(-1)
    last = found.loc[("all", "last", "clean", "robust")]
    assert last["n"] == 6 and math.isnan(last["lowest"])  # of one seed there are three points
    assert math.isnan(found.loc[("pgd", "last", "clean", "dp"), "correlation"])
    assert found.loc[("all", "all", "clean", "dp"), "correlation"] == pytest.approx(1)


def test_trends():
    found = tradeoff.trends(invented()).set_index(["training", "condition"])
    assert set(found["seeds"]) == {2} and set(found["epochs"]) == {4}
    for training, value in (("none", 0.18), ("trades", 0.58)):
        row = found.loc[(training, "fgsm")]
        assert (row["trend"], row["first"], row["verdict"]) == (
            -1,
            pytest.approx(value + 5e-4),
            "falls",
        )
    assert found.loc[("pgd", "none"), "trend"] == found.loc[("pgd", "dp"), "trend"] == 1
    assert found.loc[("pgd", "dp"), "last"] == pytest.approx(9 * 0.84, rel=1e-2)


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch):
    settings = tradeoff.Settings(**SMALL, train_attack="none,pgd", seeds=2)
    tradeoff.run(settings, tmp_path / "whole")
    measure, calls = stages.measure, []

    def breaks(*args, **options):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*args, **options)

    monkeypatch.setattr(stages, "measure", breaks)
    with pytest.raises(KeyboardInterrupt):
        tradeoff.run(settings, tmp_path / "parts")
    tradeoff.run(settings, tmp_path / "parts")
    assert len(calls) == 9  # of 8 epochs, the one that was stopped again
    for name in ("table", "correlations", "trends"):
        whole, parts = (tmp_path / of / f"{name}.csv" for of in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()
    # a network of it can be attacked by the other commands
    state = tmp_path / "whole" / "checkpoints" / "digits-cnn-0.25-pgd-1.pt"
    fig2.run(
        fig2.Settings(load=str(state), attacks="pgd", seed=1, test_size=40), tmp_path / "again"
    )
    again, first = (pd.read_csv(tmp_path / of / "table.csv") for of in ("again", "whole"))
    first = first[(first["training"] == "pgd") & (first["seed"] == 1) & (first["epoch"] == 2)]
    assert list(again["accuracy"]) == list(first["accuracy"]) and len(again) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"train_attack": "none,trade"}, r"train_attack=trade: .*'trades'"),
        ({"attacks": "pdg"}, r"attacks=pdg: .*'pgd'"),
        ({"network": "cnn,resnet"}, r"network=resnet: .*'resnet18'"),
        ({"load": "somewhere"}, r"load='somewhere': must be absent"),
        ({"weights": "somewhere"}, r"weights='somewhere': must be absent"),
    ),
    ids=str,
)
def test_bad_settings_are_refused_before_any_work(tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr(stages, "train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(UsageError, match=message):
        tradeoff.run(tradeoff.Settings(**settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()
