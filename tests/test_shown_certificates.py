"""The numbers of `docs/certify.md` beside its table, and of the results behind them."""

import json

import pandas as pd
import pytest
from shown import ROOT

from llm_attack.suite.analysis.certified import largest_radius

PAGE = " ".join((ROOT / "docs" / "certify.md").read_text("utf-8").split())
RUN = ROOT / "results" / "certify" / "demo"


def test_the_largest_radius():
    """How many questions have it, and what it is with 1000 and with 10,000 draws."""
    frame = pd.read_parquet(RUN / "certificates.parquet")
    level = json.loads((RUN / "run.json").read_text("utf-8"))["smoothing"]["failure_probability"]
    equal = int((frame["hits"] == 1000).sum())
    assert f"For {equal} of the {len(frame)} questions, all 1000 draws agree" in PAGE
    most = [largest_radius(1.0, n, level) for n in (1000, 10_000)]
    assert f"the largest possible, {most[0]:.2f} sigma" in PAGE
    assert f"10,000 draws allow {most[1]:.2f} sigma" in PAGE
    reached = (frame["radius"] / frame["sigma"]).max()
    assert reached == pytest.approx(most[0])
    assert f"{level * len(frame):.2g} wrong ones are expected among {len(frame)}" in PAGE


def test_smollm2():
    curve = pd.read_csv(ROOT / "results/certify/smollm2-135m/certified.csv").query("task != 'mean'")
    row = curve.loc[curve["radius_in_sigma"] == 0].iloc[0]
    right = round(row["certified"] * row["n"])
    assert f"The vote is right and certified for {right}, and abstains for 2" in PAGE
    assert f"8 of the first {row['n']:.0f} questions of ARC-Easy are right" in PAGE
    notes = (ROOT / "results/certify/smollm2-135m/certified.md").read_text("utf-8")
    assert f"| arc_easy | 0.3rms | 12 | {8 / 12:.3f} | {right / 12:.3f} | 2 |" in notes
    most = largest_radius(1.0, 150, 0.001)
    assert f"With 150 draws, the largest possible radius is {most:.2f} sigma" in PAGE


def test_the_medians_of_the_first_lines():
    frame = pd.read_parquet(RUN / "certificates.parquet")
    unit = json.loads((RUN / "run.json").read_text("utf-8"))["smoothing"]["unit_l2"]
    assert f"{frame['radius'].median() / unit:.3f} in L2 at the median" in PAGE
    assert f"An attack on the network needs {critical_in_l2():.3f}" in PAGE


def critical_in_l2():
    """The median critical epsilon of the run with certificates, in RMS."""
    unit = json.loads((RUN / "run.json").read_text("utf-8"))["smoothing"]["unit_l2"]
    return pd.read_parquet(RUN / "samples.parquet")["critical_epsilon"].dropna().median() / unit


def test_the_reach_of_interval_and_of_linear_bounds():
    """In RMS, beside the critical epsilons of the same questions."""
    stored = json.loads((ROOT / "results/certify/intervals/run.json").read_text("utf-8"))
    best = max(row["reach_rms"] for row in stored["questions"])
    assert (
        len(stored["questions"]) == 20
        and f"interval bounds: the best question | {best:.2g} | |" in PAGE
    )
    asked = {row["doc_id"] for row in stored["questions"]}
    samples = pd.read_parquet(ROOT / "results/critical/demo/samples.parquet")
    here = samples["task"].eq("demo_arc_easy") & samples["doc_id"].isin(asked)
    here &= samples["condition"].eq("critical@0.5rms")
    median = samples.loc[here, "critical_epsilon"].median() / stored["rms"]
    said = (
        f"the network, median | {median:.3f} (`results/critical/demo`) | {critical_in_l2():.3f} |"
    )
    assert here.sum() == 20 and said in PAGE
    assert best < 2.0**-51 < median
    linear = json.loads((ROOT / "results/certify/linear/run.json").read_text("utf-8"))["questions"]
    assert {row["doc_id"] for row in linear} == asked
    reach = pd.DataFrame(linear)[["reach_linf_rms", "reach_l2_rms"]]
    # torch's median, as the program prints it: the lower one of the two in the middle
    for name, row in (("the best question", reach.max()), ("median of 20", reach.quantile(
        0.5, interpolation="lower"))):  # fmt: skip
        cells = " | ".join(f"{x:.1e}" for x in row)
        assert f"certified by linear bounds: {name} | {cells} |" in PAGE
    times = median / reach["reach_linf_rms"].quantile(0.5, interpolation="lower")
    assert f"an attack needs {times / 1e6:.0f} million times" in PAGE
