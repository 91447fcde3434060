"""Robustness curves and their predictors: closed forms, scipy, sklearn, a run of the demo."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from invented import build
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from llm_attack import stats
from llm_attack.suite.analysis import critical
from llm_attack.suite.studies import survival

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


@pytest.mark.slow
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
    assert stats.spearman(known, outcome) == pytest.approx(
        [spearmanr(a, b).statistic for a, b in zip(known, outcome, strict=True)]
    )
    stands = (outcome > 0).astype(float)
    assert stats.auroc(known, stands) == pytest.approx(
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
    assert survival.tables(samples) == {}
    survival.save({}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
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
    apgd = beside[(beside["attack"] == "apgd") & beside["condition"].str.startswith("critical")]
    assert len(apgd) == 2 and ((apgd["curve"] - apgd["acc"]).abs() <= 1 / 12 + 1e-9).all()
    assert "Critical epsilon" in (tmp_path / "run" / "report.html").read_text()


def of_answers(rows):
    """Samples from (doc_id, condition, critical epsilon, log-likelihoods, gold, lengths)."""
    samples, questions = [], {}
    for doc_id, condition, found, values, gold, lengths in rows:
        attack, _, epsilon = condition.partition("@")
        samples.append(
            {
                **{"task": "t", "doc_id": doc_id, "condition": condition, "attack": attack},
                **{"epsilon": float(epsilon or 0), "gold": gold, "critical_epsilon": found},
                # as lm-eval judges
                "prediction": int(np.argmax(values)),
                "prediction_norm": int(np.argmax(np.array(values) / lengths)),
                "acc": float(np.argmax(values) in gold),
                "acc_norm": float(np.argmax(np.array(values) / lengths) in gold),
                **{"log_likelihoods": values, "cosine": 0.1, "first_order": 0.1},
            }
        )
        questions[doc_id] = {"task": "t", "doc_id": doc_id, "lengths": lengths}
    return pd.DataFrame(samples), pd.DataFrame(list(questions.values()))


ONES = [1.0, 1.0, 1.0]
EQUAL = [-2.0, -2.0, -3.0]


@pytest.mark.parametrize(
    "clean, gold, found, after, expected",
    [
        (EQUAL, [1], INF, EQUAL, 0.0),  # the first of equal scores is the answer, and it is wrong
        (EQUAL, [0], INF, EQUAL, INF),
        (EQUAL, [0, 1], INF, EQUAL, INF),
        (EQUAL, [2, 0], 0.3, [-2.0, -1.0, -3.0], 0.3),
        (
            [-1.0, -2.0, -3.0],
            [0],
            INF,
            [-2.0, -2.0, -1.0],
            0.5,
        ),  # within epsilon, no one knows where
        ([-1.0, -2.0, -3.0], [0], 0.3, [-1.0, -1.0, -3.0], INF),  # in float32 the answer is right
        ([-1.0, -2.0, -3.0], [0], INF, [np.nan, -2.0, -3.0], INF),  # numpy takes the first of these
        ([-1.0, -2.0, -3.0], [1], 0.2, [-1.0, -2.0, -3.0], 0.0),
    ],
)
def test_critical_epsilons_agree_with_the_answers(clean, gold, found, after, expected):
    rows = [(0, "none", np.nan, clean, gold, ONES), (0, "critical@0.5", found, after, gold, ONES)]
    samples, _ = of_answers(rows)
    judged = critical.judged(samples, "acc")
    assert judged["critical_epsilon"].tolist()[1] == expected
    assert np.isnan(judged["critical_epsilon"][0])
    if expected > 0:
        assert np.isinf(expected) == (judged["acc"][1] == 1)
    shown = critical.robustness(judged).iloc[0]
    assert shown["acc"] == judged["acc"][0]


def by_length():
    """Of each question what acc says is the reverse of what acc_norm says."""
    rng = np.random.default_rng(5)
    rows = []
    for doc_id in range(40):
        lengths = [4.0, 2.0, 1.0]
        per_letter = rng.normal(-3, 1, 3)
        gold = [int(per_letter.argmax())] if doc_id % 3 else [0]
        far = 0.4 * rng.random()
        rows.append((doc_id, "none", np.nan, (per_letter * lengths).tolist(), gold, lengths))
        for condition, found in (("fgsm@0.2", np.nan), ("critical@0.5", far), ("apgd@0.2", np.nan)):
            after = per_letter.copy()
            if condition != "fgsm@0.2" or far < 0.2:
                after[gold] -= 9
            rows.append((doc_id, condition, found, (after * lengths).tolist(), gold, lengths))
    return of_answers(rows)


def test_one_score_throughout(tmp_path):
    """With acc_norm the curve, the accuracies beside it, and what foretells are of acc_norm."""
    samples, questions = by_length()
    samples = critical.judged(samples, "acc_norm")
    told = critical.of_score(samples, questions, "acc_norm")
    clean = samples[samples["condition"] == "none"]
    assert clean["acc"].mean() != clean["acc_norm"].mean()
    curves = critical.robustness(told)
    assert curves["acc"].iloc[0] == pytest.approx(clean["acc_norm"].mean())
    beside = critical.against_fixed(told).set_index("fixed")
    for name in ("fgsm@0.2", "apgd@0.2"):
        here = samples[samples["condition"] == name]
        assert beside.loc[name, "acc"] == pytest.approx(here["acc_norm"].mean())
    right = clean[clean["acc_norm"] == 1]
    found = critical.foretold(told).set_index(["condition", "task", "predictor"])
    assert set(found["n"]) == {len(right)}
    margins = []
    for values, gold in zip(right["log_likelihoods"], right["gold"], strict=True):
        of = np.divide(values, [4.0, 2.0, 1.0])
        margins.append(of[gold[0]] - np.delete(of, gold[0]).max())
    needed = samples[samples["condition"] == "critical@0.5"].set_index("doc_id")["critical_epsilon"]
    needed = needed[right["doc_id"]]
    expected = spearmanr(margins, needed).statistic
    assert found.loc[("critical@0.5", "all", "margin"), "value"] == pytest.approx(expected)
    stands = samples[samples["condition"] == "fgsm@0.2"].set_index("doc_id")["acc_norm"]
    expected = roc_auc_score(stands[right["doc_id"]], margins)
    assert found.loc[("fgsm@0.2", "all", "margin"), "value"] == pytest.approx(expected)
    found = survival.tables(told, "acc_norm")
    survival.save(found, tmp_path)
    texts = {title: cells for title, (cells, _) in found.items()}
    assert texts[survival.CURVES].heading[3] == "clean acc_norm"
    assert any("acc_norm" in note for note in texts[survival.FORETOLD].notes)
    assert list(pd.read_csv(tmp_path / "critical.csv"))[4] == "acc_norm"
    drawn = survival.figure(told, score="acc_norm")
    assert drawn.get_supylabel() == "share of questions still right (acc_norm)"
    (marks,) = (line for line in drawn.axes[0].get_lines() if line.get_label() == "apgd")
    assert marks.get_ydata()[0] == pytest.approx(beside.loc["apgd@0.2", "acc"])


def test_acc_is_as_it_is_stored():
    samples, questions = by_length()
    told = critical.of_score(critical.judged(samples, "acc"), questions, "acc")
    assert told["acc"].tolist() == samples["acc"].tolist()
    assert told["log_likelihoods"].tolist() == samples["log_likelihoods"].tolist()
    assert critical.score_of({"settings": {"score": "acc_norm"}}) == "acc_norm"
    assert critical.score_of({"settings": {}}) == critical.score_of({}) == "acc"


def test_what_fmn_did_not_find_is_marked(tmp_path):
    low, high = [-1.0, -2.0, -3.0], [-3.0, -2.0, -1.0]
    rows = []
    for doc_id in range(5):
        rows.append((doc_id, "none", np.nan, low, [0], ONES))
        stalls = doc_id < 3
        rows.append((doc_id, "fmn@0.5", INF if stalls else 0.1, low if stalls else high, [0], ONES))
        ends = doc_id < 1
        rows.append(
            (doc_id, "critical@0.5", INF if ends else 0.1, low if ends else high, [0], ONES)
        )
    samples, _ = of_answers(rows)
    (text,) = critical.stalled(samples).values()
    assert text.startswith("fmn found no wrong answer for 3 of 5 questions.")
    assert text.endswith("; critical found one for 2 of them")
    cells = survival.tables(samples)[survival.CURVES][0]
    beyond = {(row[0], row[1]): row[-1] for row in cells.rows}
    assert beyond["t", "fmn@0.5"] == "3¶" and beyond["t", "critical@0.5"] == "1"
    assert any(note == f"¶ fmn@0.5: {text}" for note in cells.notes)
    found = samples[samples["attack"] != "critical"].assign(
        critical_epsilon=lambda of: of["critical_epsilon"].replace(INF, 0.4)
    )
    assert critical.stalled(found) == {}


@pytest.mark.parametrize("largest", ["0", "0.5", "1e+30", "1e-30"])
@pytest.mark.parametrize("known", [0.3, INF, np.nan])
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.sampled(5)
def test_tables_of_runs_that_say_little(largest, known, right, tmp_path):
    """One value of first_order, no question right at first, an epsilon_max of 0."""
    values = [0.0, INF] if largest == "0" else [0.0, 0.5 * float(largest), INF]
    samples = with_critical(values, f"critical@{largest}", first_order=[known] * len(values))
    if not right:
        samples = samples.assign(
            acc=0.0,
            critical_epsilon=0
            * samples["critical_epsilon"].mask(samples["critical_epsilon"] == INF, 0),
        )
    texts = survival.tables(samples)
    survival.save(texts, tmp_path)
    row = critical.robustness(samples).iloc[0]
    assert row["acc"] == pytest.approx((len(values) - 1) / len(values) if right else 0)
    if largest == "0":
        assert row["area"] == row["acc"]
        assert survival.figure(samples) is None
    if not right or np.isnan(known):
        assert list(texts) == [survival.CURVES]
