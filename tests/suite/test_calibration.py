"""Calibration: by hand, against scikit-learn and lm-eval, and for known truths."""

import numpy as np
import pandas as pd
import pytest
from lm_eval.api.metrics import brier_score
from sklearn.calibration import calibration_curve

from llm_attack.suite.analysis.calibration import (
    bins,
    calibration,
    expected_error,
    judged,
    reliability,
)
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.studies import calibration as study


def samples(probabilities, golds, condition="none", task="t", cluster=None):
    """Questions with these probabilities of their choices."""
    rows = []
    for doc_id, (of_choices, gold) in enumerate(zip(probabilities, golds, strict=True)):
        row = {"task": task, "doc_id": doc_id, "condition": condition, "n_choices": len(of_choices)}
        row |= {"attack": condition.partition("@")[0], "epsilon": 0.0}
        row |= {"gold": gold if isinstance(gold, list) else [gold]}
        row |= {"prediction": int(np.argmax(of_choices)), "cluster": cluster and cluster[doc_id]}
        with np.errstate(divide="ignore"):
            scores = np.log(of_choices) - 3.0  # likelihoods need not sum to 1
        row |= {"log_likelihoods": scores.tolist(), "acc": 1.0, "score": "acc", "better": "higher"}
        rows.append({**row, "kind": "right or wrong"})
    return pd.DataFrame(rows)


def calibrated(samples):
    return calibration(judged(samples))


def drawing(samples):
    return study.figure(judged(samples))


def drawn(n, trusted=lambda p: p, seed=0, task="t"):
    """Questions of two choices, right with probability `trusted` of their confidence."""
    rng = np.random.default_rng(seed)
    sure = rng.uniform(0.5, 1, n)
    right = rng.random(n) < trusted(sure)
    return samples(np.stack([sure, 1 - sure], 1), np.where(right, 0, 1).tolist(), task=task)


def row(frame, condition="none", task="t"):
    (found,) = frame[(frame["condition"] == condition) & (frame["task"] == task)].to_dict("records")
    return found


def test_by_hand():
    """Ten questions, so each is a bin."""
    sure = np.array([0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99])
    right = np.array([0, 1, 0, 1, 1, 0, 1, 1, 1, 1])
    clean = samples(np.stack([sure, 1 - sure], 1), (1 - right).tolist())
    after = samples(np.stack([1 - sure, sure], 1), [0] * 10, "fgsm@0.1")
    frame = calibrated(pd.concat([clean, after], ignore_index=True))
    found = row(frame)
    assert found["n"] == 10 and found["acc"] == pytest.approx(0.7)
    assert found["confidence"] == pytest.approx(sure.mean())
    assert found["gap"] == pytest.approx(sure.mean() - 0.7)
    assert found["ece"] == pytest.approx(np.abs(sure - right).mean())
    assert found["brier"] == pytest.approx(2 * ((sure - right) ** 2).mean())
    assert found["fallen"] == 0 and np.isnan(found["fallen_before"])
    attacked = row(frame, "fgsm@0.1")
    fell = right == 1
    assert attacked["acc"] == 0 and attacked["fallen"] == 7
    assert attacked["fallen_before"] == pytest.approx(sure[fell].mean())
    assert attacked["fallen_after"] == pytest.approx(sure[fell].mean())
    parted = pd.concat([clean.iloc[1:], after.iloc[::-1]], ignore_index=True)
    assert row(calibrated(parted), "fgsm@0.1") == pytest.approx(attacked)  # the first never fell


@pytest.mark.parametrize("choices", [2, 4])
def test_brier_score_is_that_of_lm_eval(choices):
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet(np.ones(choices), 50)
    golds = rng.integers(choices, size=50).tolist()
    found = row(calibrated(samples(probabilities, golds)))
    theirs = brier_score([(gold, list(p)) for gold, p in zip(golds, probabilities, strict=True)])
    assert found["brier"] == pytest.approx(theirs)


def test_bins_are_those_of_scikit_learn():
    """Of a number of questions that the bins divide."""
    known = judged(drawn(1000))
    theirs = calibration_curve(known["right"], known["confidence"], n_bins=10, strategy="quantile")
    ours = reliability(known)
    assert [part.n for part in ours] == [100] * 10
    assert [part.accuracy for part in ours] == pytest.approx(theirs[0])
    assert [part.confidence for part in ours] == pytest.approx(theirs[1])


def test_the_order_of_questions_does_not_matter():
    """Also not where confidences are equal."""
    frame = drawn(60)
    frame.loc[:40, "log_likelihoods"] = frame.loc[:40, "log_likelihoods"].map(lambda _: [-1.0, -2])
    turned = frame.iloc[::-1].reset_index(drop=True)
    pd.testing.assert_frame_equal(calibrated(frame), calibrated(turned))


def test_what_chance_makes_of_a_calibrated_model():
    """By drawing right answers with the probabilities that the model claims."""
    sure = np.random.default_rng(2).uniform(0.5, 1, 400)
    parts = bins(sure, np.zeros(400))
    rng, errors = np.random.default_rng(3), []
    for _ in range(2000):
        away = sure - (rng.random(400) < sure)
        errors.append(sum(abs(away[part].sum()) for part in parts) / 400)
    assert expected_error(sure, parts) == pytest.approx(np.mean(errors), rel=0.03)


def test_intervals_hold_the_truth():
    """Of models that are surer than they are right, by as much as is known: 19 times of 20."""

    def halved(p):
        return p / 2

    hits = {"gap": 0, "ece": 0}
    for seed in range(120):
        found = row(calibrated(drawn(200, halved, seed)))
        for name in hits:  # the mean of p / 2 over uniform p from 0.5 to 1
            hits[name] += found[f"{name}_low"] <= 0.375 <= found[f"{name}_high"]
    # 114 expected; 4 standard deviations are 10
    assert all(hit >= 104 for hit in hits.values()), hits


def test_sources_that_questions_share_widen_the_interval():
    """Each question four times tells no more than once."""
    one = drawn(50)
    four = pd.concat([one.assign(doc_id=one["doc_id"] + 50 * i) for i in range(4)])
    four["cluster"] = np.tile(np.arange(50), 4)
    once, often = row(calibrated(one)), row(calibrated(four.reset_index(drop=True)))
    for end in ("low", "high"):
        assert often[f"gap_{end}"] == pytest.approx(once[f"gap_{end}"], abs=1e-9)


def test_the_mean_over_tasks():
    """Each task counts the same; so do its questions that fell."""
    frame = calibrated(pd.concat([drawn(40), drawn(10, seed=1, task="u")], ignore_index=True))
    mean = row(frame, task=MEAN)
    for name in ("acc", "confidence", "gap", "ece", "ece_by_chance", "brier"):
        assert mean[name] == pytest.approx((row(frame)[name] + row(frame, task="u")[name]) / 2)
    assert mean["n"] == 50


def test_questions_that_fell_are_of_their_own_task():
    """And the mean over tasks is over all questions that fell."""
    sure = {"t": [0.6, 0.7, 0.8], "u": [0.9]}
    parts = []
    for task, of_task in sure.items():
        probabilities = np.stack([of_task, 1 - np.array(of_task)], 1)
        parts.append(samples(probabilities, [0] * len(of_task), task=task))
        parts.append(samples(probabilities[:, ::-1], [0] * len(of_task), "fgsm@0.1", task))
    frame = calibrated(pd.concat(parts, ignore_index=True))
    for task, fallen, before in (("t", 3, 0.7), ("u", 1, 0.9), (MEAN, 4, 0.75)):
        found = row(frame, "fgsm@0.1", task)
        assert found["fallen"] == fallen
        assert found["fallen_before"] == pytest.approx(before)


def test_what_has_no_confidence():
    """One choice, or a likelihood that is not a number; two golds have no Brier score."""
    odd = samples([[1.0], [0.4, 0.6], [0.3, 0.7]], [0, 0, [0, 1]])
    odd.at[1, "log_likelihoods"] = [np.nan, -1.0]
    found = row(calibrated(odd))
    assert found["n"] == 1 and found["acc"] == 1.0
    assert np.isnan(found["brier"])
    assert calibrated(odd.iloc[:2]).empty and study.cells(calibrated(odd.iloc[:2])) is None


def test_table_and_figure():
    frame = pd.concat([drawn(100), drawn(100, seed=1).assign(condition="fgsm@0.1", attack="fgsm")])
    table = study.cells(calibrated(frame.reset_index(drop=True)))
    assert drawing(frame.iloc[1:].reset_index(drop=True)) is None  # 99 questions
    assert [line[:2] for line in table.rows] == [["t", "none"], ["t", "fgsm@0.1"]]
    assert table.rows[0][-1] == "–"
    (axes,) = drawing(frame.reset_index(drop=True)).axes
    assert axes.get_title() == "fgsm@0.1"
    assert [line.get_label() for line in axes.lines] == ["calibrated", "none", "under attack"]
