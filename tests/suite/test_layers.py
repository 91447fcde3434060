"""Accuracy by hookpoint: a run over several equals a run for each; tables and figures of it."""

import json

import numpy as np
import pandas as pd
import pytest
from invented import build

from llm_attack.cli import main
from llm_attack.suite import results
from llm_attack.suite.analysis.summary import MEAN, summarise
from llm_attack.suite.evaluate import evaluate
from llm_attack.suite.plan import Plan
from llm_attack.suite.studies import hookpoints as layers

EXACT = "dtype=float64,softmax_dtype=float64"  # no sign is a matter of rounding
SETTINGS = {
    "model": "demo",
    "tasks": "demo_piqa,demo_arc_easy",
    "attacks": "none,random,fgsm",
    "epsilons": "0.1rms,1rms",
    "limit": 3,
    "model_args": EXACT,
}
PLACES = ["embed", *(f"model.layers.{i}" for i in range(4)), "model.layers.1.mlp"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A run over the embedding, all blocks and an MLP, which knows the gold, and its folder."""
    folder = tmp_path_factory.mktemp("sweep") / "run"
    plan = Plan(**SETTINGS, loss="choice", hookpoints="embed,layers,model.layers.1.mlp")
    return evaluate(plan, output=folder, progress="quiet"), folder


@pytest.mark.parametrize("hookpoint", ["embed", "model.layers.2", "model.layers.1.mlp"])
@pytest.mark.slow
def test_numbers_are_those_of_a_run_for_each(sweep, hookpoint):
    result, _ = sweep
    alone = {} if hookpoint == "embed" else {"hookpoint": hookpoint}
    # in batches of another size, and without trees
    how = {"batch_size": 5, "packing": "off"}
    single = evaluate(Plan(**SETTINGS, **how, loss="choice", **alone), progress="quiet")
    samples = result.samples
    here = samples[(samples["attack"] == "none") | (samples["hookpoint"] == hookpoint)]
    suffix = "" if hookpoint == "embed" else f"@{hookpoint}"
    expected = single.samples.set_index(["task", "doc_id", "condition"])
    assert len(here) == len(expected) == 6 * 5
    for row in here.to_dict("records"):
        condition = row["condition"].removesuffix(suffix)
        other = expected.loc[(row["task"], row["doc_id"], condition)]
        assert row["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-6)
        assert (row["acc"], row["prediction"]) == (other["acc"], other["prediction"])
        assert row["epsilon"] == pytest.approx(other["epsilon"])


def test_what_is_written(sweep):
    result, folder = sweep
    samples = pd.read_parquet(folder / "samples.parquet")
    assert list(samples["hookpoint"].unique()) == PLACES
    table = pd.read_csv(folder / "table.csv")
    assert list(table["hookpoint"].unique()) == PLACES
    assert (samples["condition"] == "none").sum() == 6
    rows = (folder / "layers.md").read_text("utf-8").splitlines()[2 : 2 + len(PLACES)]
    of = table[(table["task"] == MEAN) & ~table["attack"].isin(["none", "worst"])]
    for place, row in zip(PLACES, rows, strict=True):
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        assert name == place
        found = [float(cell.split()[0]) for cell in cells]
        assert found == pytest.approx(of.loc[of["hookpoint"] == place, "acc"], abs=5.1e-4)
    run = json.loads((folder / "run.json").read_text("utf-8"))
    attacked = [name for name in run["attacks"] if name != "none"]
    assert len(attacked) == 4 * len(PLACES)
    page = (folder / "report.html").read_text("utf-8")
    assert "<figcaption>Accuracy by hookpoint " in page
    assert "fgsm@1rms</th>" in page and "fgsm@1rms@model.layers.2</th>" not in page
    assert results.load(folder).table.equals(result.table)


def test_a_report_of_one_hookpoint_says_where_the_rest_is():
    table = table_of(["embed", "h.0"])
    run = {"attacks": {name: {} for name in table["condition"]}, "warnings": ["of the model"]}
    run["warnings"] += ["fgsm@0.1: a", "fgsm@0.1@h.0: b", "fgsm@0.2@h.0: c"]
    shown = layers.shown_of(run, table)
    assert list(shown["attacks"]) == ["none", "fgsm@0.1", "fgsm@0.2"]
    more = "2 of conditions at other hookpoints are in run.json"
    assert shown["warnings"] == ["of the model", "fgsm@0.1: a", more]
    alone = table_of(["embed"])
    run = {"attacks": {name: {} for name in alone["condition"]}, "warnings": ["fgsm@0.1: a"]}
    assert layers.shown_of(run, alone) == run


def test_compared_with_itself(sweep, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, folder = sweep
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(folder), str(folder)])
    assert not ended.value.code
    assert "fgsm@0.1rms@model.layers.3" in capsys.readouterr().out


def table_of(places, shifts=(2.0, 1.0)):
    """The table of a run that never was, over these hookpoints, at two amplitudes."""
    conditions = {"none": (3.0, places[0])}
    for i, place in enumerate(places):
        suffix = "" if place == "embed" else f"@{place}"
        for epsilon, shift in zip((0.1, 0.2), shifts, strict=True):
            conditions[f"fgsm@{epsilon}{suffix}"] = (shift - 0.3 * i, place)
    plain = {str(i): shift for i, (shift, _) in enumerate(conditions.values())}
    samples, _ = build({"a": (80, 4), "b": (40, 2)}, plain)
    names, places = list(conditions), [place for _, place in conditions.values()]
    number = samples["condition"].astype(int)
    samples["condition"] = number.map(dict(enumerate(names)))
    samples["hookpoint"] = number.map(dict(enumerate(places)))
    samples["attack"] = samples["condition"].str.partition("@")[0]
    samples["epsilon"] = samples["condition"].str.extract(r"@([\d.]+)")[0].astype(float).fillna(0)
    return summarise(samples)


def test_lines_are_those_of_the_table():
    blocks = [f"h.{i}" for i in (0, 1, 10)]
    table = table_of(["embed", *blocks, *(f"{name}.attn" for name in blocks), "ln_f"])
    mean = table[table["task"] == MEAN].set_index("condition")
    drawn = layers.figure(table)
    assert [axes.get_title() for axes in drawn.axes] == ["h.*", "h.*.attn"]
    for axes, suffix in zip(drawn.axes, ("", ".attn"), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        assert list(lines) == ["fgsm@0.1", "fgsm@0.2", "none", "random guess"]
        for label in ("fgsm@0.1", "fgsm@0.2"):
            names = [label, *(f"{label}@{name}{suffix}" for name in blocks)]
            assert list(lines[label].get_xdata()) == [0, 1, 2, 11]
            assert np.array_equal(lines[label].get_ydata(), mean.loc[names, "acc"])
        assert lines["none"].get_ydata()[0] == mean.loc["none", "acc"]
        assert lines["random guess"].get_ydata()[0] == mean.loc["none", "baseline"]
        (low, high) = (mean.loc["fgsm@0.1", f"acc_{end}"] for end in ("low", "high"))
        band = axes.collections[0].get_paths()[0].vertices
        assert {low, high} <= set(band[band[:, 0] == 0, 1])


def test_modules_in_no_block_stand_beside_each_other():
    (axes,) = layers.figure(table_of(["embed", "ln_f"])).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["embed", "ln_f"]


def test_one_hookpoint_has_no_figure():
    table = table_of(["embed"])
    assert layers.figure(table) is None and layers.cells(table) is None
