"""The paper's claims on invented runs, and the area under curves that judges some of them."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from invented import build

from llm_attack import stats as inference
from llm_attack.suite.studies.claims import HOLDS, NOT, UNSHOWN, cells, claims

COSTS, MORE = "the attack costs accuracy", "it costs more than noise of the same amplitude"
GUESSES, SMALL = "its accuracy equals guessing", "questions of small margin fall first"
NOISE, COSINES = "random noise costs accuracy", "right answers have lower cosines"


def told(shifts, n=600, **options):
    samples, _ = build({"a": (n, 4), "b": (n, 2)}, shifts, **options)
    samples["hookpoint"] = "embed"
    return {(c.text, c.condition): c for c in claims(samples)}, samples


def test_what_holds():
    """Noise that changes nothing, and an attack that costs much."""
    found, samples = told({"none": 2.0, "random@0.1": 2.0, "fgsm@0.1": 0.5, "reversed@0.1": 3.0})
    assert found[NOISE, "random@0.1"].verdict in (NOT, UNSHOWN)
    assert found[COSTS, "fgsm@0.1"].verdict == found[MORE, "fgsm@0.1"].verdict == HOLDS
    assert found[GUESSES, "fgsm@0.1"].verdict == NOT
    assert found[SMALL, "fgsm@0.1"].verdict == HOLDS
    assert not any(of == "reversed@0.1" for _, of in found)
    acc = samples.groupby(["condition", "task"])["acc"].mean().groupby("condition").mean()
    drop = 100 * (acc["none"] - acc["fgsm@0.1"])
    assert found[COSTS, "fgsm@0.1"].figure.startswith(f"{drop:.1f} points (")
    over = 100 * (acc["fgsm@0.1"] - 0.375) + 1e-9
    assert found[GUESSES, "fgsm@0.1"].figure.startswith(f"{over:+.1f} points from guessing (")


def test_that_nothing_happens_has_to_be_shown():
    """The same answers of 1,200 questions are evidence, of 20 they are none."""
    for n, verdict in ((600, NOT), (10, UNSHOWN)):
        samples, _ = build({"a": (n, 4), "b": (n, 2)}, {"none": 2.0, "fgsm@0.1": 0})
        clean = samples[samples["condition"] == "none"]
        same = clean.assign(condition="fgsm@0.1", attack="fgsm", epsilon=0.1)
        (claim, *_) = claims(pd.concat([clean, same], ignore_index=True))
        assert (claim.text, claim.verdict) == (COSTS, verdict), claim


def test_guessing_has_to_be_shown():
    """Of 12,000 guesses it is; of 40 nothing is known."""
    assert told({"none": 3.0, "fgsm@0.1": 0.0}, 6000)[0][GUESSES, "fgsm@0.1"].verdict == HOLDS
    assert told({"none": 3.0, "fgsm@0.1": 0.0}, 20)[0][GUESSES, "fgsm@0.1"].verdict == UNSHOWN


def test_cosines():
    """Lower where it is right, in every task, however the tasks differ."""
    samples, _ = build({"a": (200, 4), "b": (200, 2)}, {"none": 0.7})
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, len(samples))
    of_task = np.where(samples["task"] == "a", 5.0, 0.0)
    lower = samples.assign(cosine=of_task - 0.1 * samples["acc"] + noise)
    (claim,) = claims(lower)
    assert claim.text.startswith(COSINES) and claim.verdict == HOLDS and claim.condition == "none"
    (claim,) = claims(lower.assign(cosine=-lower["cosine"]))
    assert claim.verdict == NOT
    (claim,) = claims(lower.assign(cosine=of_task + noise))
    assert claim.verdict == UNSHOWN
    assert claims(lower.assign(cosine=None)) == []
    assert claims(lower.assign(condition="fgsm@1", attack="fgsm")) == []


def test_cells():
    found, _ = told({"none": 2.0, "random@0.1": 2.0, "fgsm@0.1": 0.5}, 50)
    shown = cells(list(found.values()))
    assert [row[:3] for row in shown.rows] == [
        [c.text, c.condition, c.verdict] for c in found.values()
    ]
    assert len(found) == 6


def test_area_under_curve():
    """That of the Mann-Whitney statistic; its test is Brunner and Munzel's."""
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 9, 40), rng.integers(2, 12, 50)  # with ties
    found = inference.auc(x, y)
    assert found.value == pytest.approx(scipy.stats.mannwhitneyu(y, x).statistic / 2000)
    known = scipy.stats.brunnermunzel(x, y, distribution="normal").pvalue
    assert found.p_value == pytest.approx(known, rel=1e-3)
    assert 0.5 < found.low < found.value < found.high < 1
    apart = inference.auc(range(10), range(10, 30))
    assert apart.value == apart.high == 1 and 0.9 < apart.low < 1
    assert np.isnan(inference.auc([1], [2, 3])[1:]).all()


@pytest.mark.parametrize(
    "n, m, shift", [pytest.param(40, 40, 1.0, marks=pytest.mark.slow), (100, 25, 0.5)]
)
@pytest.mark.slow
def test_area_under_curve_covers(n, m, shift):
    """10,000 samples of two normal distributions."""
    rng, truth, inside = np.random.default_rng(2), scipy.stats.norm.cdf(shift / np.sqrt(2)), 0
    for _ in range(10_000):
        found = inference.auc(rng.normal(size=n), rng.normal(shift, size=m))
        inside += found.low <= truth <= found.high
    # 0.95 with a standard deviation of 0.0022; the variance is of few numbers
    assert 0.938 <= inside / 10_000 <= 0.962
