"""Robustness curves and what foretells them: closed forms, scipy, sklearn, a run of the demo."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from invented import build
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from llm_attack.suite import critical, survival

INF = np.inf


def with_critical(values, condition="critical@0.5", **columns):
    """Samples of one task: the clean condition and one with these critical epsilons."""
    samples, _ = build({"t": (len(values), 4)}, {"none": 3.0, condition: 0.0})
    found = np.repeat(values, 2)
    found[::2] = np.nan
    of_none = {name: np.repeat(of, 2) for name, of in columns.items()}
    return samples.assign(critical_epsilon=found, **of_none)


def test_curve_is_the_share_that_stands():
    tasks = [np.array([0, 0.1, 0.3, INF]), np.array([0.2, 0.2])]
    at = np.array([0, 0.1, 0.15, 0.2, 0.3, 9])
    expected = [(0.75 + 1) / 2, (0.5 + 1) / 2, (0.5 + 1) / 2, (0.5 + 0) / 2, 0.25 / 2, 0.25 / 2]
    assert critical.curve(tasks, at) == pytest.approx(expected)


@given(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 2.0, INF]), min_size=1, max_size=20))
def test_curve_falls_and_half_life_and_area_are_its_own(values):
    of = [np.array(values)]
    grid = np.linspace(0, 3, 301)
    curve = critical.curve(of, grid)
    assert (np.diff(curve) <= 0).all()
    assert critical.area(of, 1.0) == pytest.approx(
        critical.curve(of, np.arange(0, 1, 0.001)).mean()
    )
    half = critical.half_life(of)
    if curve[0] == 0:
        assert np.isnan(half)
    else:
        at, before = critical.curve(of, np.array([half, min(half, 9) * 0.999])) / curve[0]
        assert (at <= 0.5 + 1e-9 or half == INF) and before > 0.5 + 1e-9


def test_half_life_of_one_task_is_the_median_of_those_right_at_first():
    values = np.array([0, 0, 0.3, 0.1, 0.2])
    assert critical.half_life([values]) == 0.2
    assert critical.half_life([np.array([0.0, 0.1, INF, INF])]) == INF


def test_intervals_hold_what_they_should():
    """Of exponentials with mean 1: the median is ln 2, the area up to 2 is (1 - exp(-2)) / 2."""
    rng = np.random.default_rng(1)
    inside = np.zeros(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(critical, "RESAMPLES", 200)
        for _ in range(100):
            frame = critical.robustness(with_critical(rng.exponential(size=60), "critical@2"))
            row = frame.iloc[0]
            for i, (name, truth) in enumerate(
                (("median", np.log(2)), ("area", (1 - np.exp(-2)) / 2))
            ):
                inside[i] += row[f"{name}_low"] <= truth <= row[f"{name}_high"]
    # 95 of 100 with a standard deviation of 2.2
    assert (inside >= 87).all()


def test_measures_are_scipys_and_sklearns():
    rng = np.random.default_rng(2)
    known, outcome = rng.normal(size=(3, 40)).round(1), rng.normal(size=(3, 40)).round(1)
    assert critical._spearman(known, outcome) == pytest.approx(
        [spearmanr(a, b).statistic for a, b in zip(known, outcome, strict=True)]
    )
    stands = (outcome > 0).astype(float)
    assert critical._auroc(known, stands) == pytest.approx(
        [roc_auc_score(s, k) for s, k in zip(stands, known, strict=True)]
    )


def test_foretold():
    rng = np.random.default_rng(3)
    values = rng.exponential(size=50)
    values[:5] = INF
    known = {"first_order": np.where(values == INF, 99, values), "cosine": rng.normal(size=50)}
    samples = with_critical(values, **known)
    clean = samples[samples["condition"] == "none"]
    right = clean["acc"].to_numpy() > 0
    found = critical.foretold(samples).set_index(["task", "predictor"])
    assert set(found["n"]) == {right.sum()}
    row = found.loc[("all", "first_order")]
    assert (row["value"], row["low"], row["high"]) == pytest.approx((1, 1, 1))
    margin = critical.gold_margin(clean)[right]
    for name, of in {"margin": margin, "cosine": -np.abs(known["cosine"])[right]}.items():
        expected = spearmanr(of, values[right]).statistic
        assert found.loc[("t", name), "value"] == pytest.approx(expected)
    difference = found.loc[("t", "first_order - margin")]
    assert difference["value"] == pytest.approx(1 - found.loc[("t", "margin"), "value"])
    assert difference["low"] > 0


def test_runs_without_critical_epsilons_have_no_such_tables(tmp_path):
    samples, _ = build()
    assert critical.looked_for(samples) == [] and survival.figure(samples) is None
    assert survival.save(samples, tmp_path) == {} and not list(tmp_path.iterdir())


def test_of_a_run(tmp_path):
    """The curve is what apgd of one epsilon finds, which has the same steps."""
    from llm_attack import Plan, evaluate

    plan = Plan(
        model="demo",
        tasks="demo_arc_easy",
        attacks="none,fgsm,apgd",
        epsilons="0.001,0.002",
        critical=True,
        epsilon_max=0.01,
        loss="margin",
        limit=12,
        steps=6,
    )
    result = evaluate(plan, output=tmp_path / "run", progress="quiet")
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"critical.csv", "foretold.csv", "critical.md", "survival.png"} <= written
    samples = result.samples
    assert critical.looked_for(samples) == ["critical@0.01", "fmn@0.01"]
    table = pd.read_csv(tmp_path / "run" / "critical.csv")
    assert (table["epsilon_max"] == 0.01).all() and (table["n"] == 12).all()
    needed = samples.pivot_table(index="doc_id", columns="condition", values="critical_epsilon")
    clean = samples[samples["condition"] == "none"].set_index("doc_id")
    assert ((needed == 0).all(axis=1) == (clean["acc"] == 0)).all()
    # none of the two is exact, and one may end where the other does not, but hardly ever far off
    assert (needed["critical@0.01"] <= 1.5 * needed["fmn@0.01"]).mean() > 0.9
    beside = critical.against_fixed(samples)
    apgd = beside[
        beside["attack"].str.startswith("apgd") & beside["condition"].str.startswith("critical")
    ]
    assert len(apgd) == 2 and ((apgd["curve"] - apgd["acc"]).abs() <= 1 / 12 + 1e-9).all()
    assert "Critical epsilon" in (tmp_path / "run" / "report.html").read_text()
