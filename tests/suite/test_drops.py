"""The difference of two runs' drops, against closed forms and scipy's bootstrap."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, bootstrap, ttest_1samp

from llm_attack.suite.analysis.drops import differences
from llm_attack.suite.analysis.pairs import paired
from llm_attack.suite.studies import drops
from llm_attack.suite.studies.models import name_of


def run_of(clean, attacked, task="a", cluster=None):
    """Samples and questions of (n,) answers to one task without and with an attack."""
    n = len(clean)
    parts = []
    for name, values, epsilon in (("none", clean, 0.0), ("fgsm@0.01", attacked, 0.01)):
        columns = {"task": task, "doc_id": range(n), "condition": name, "hookpoint": "embed"}
        columns |= {"attack": name.partition("@")[0], "epsilon": epsilon, "acc": values}
        columns |= {"gold": [[0]] * n, "n_choices": 2, "log_likelihoods": [[0.0, -1.0]] * n}
        columns |= {"prediction": 0, "acc_norm": values, "cluster": cluster}
        parts.append(pd.DataFrame(columns))
    questions = pd.DataFrame({"task": task, "doc_id": range(n), "doc_hash": "x"})
    return pd.concat(parts, ignore_index=True).astype({"acc": float}), questions


def drawn(n, seed, task="a"):
    rng = np.random.default_rng(seed)
    shares = (0.8, 0.5, 0.8, 0.3)
    return [(rng.random(n) < share).astype(float) for share in shares]


def several(*runs):
    return tuple(pd.concat(part, ignore_index=True) for part in zip(*runs, strict=True))


def test_one_task_is_a_paired_t_interval():
    clean_a, after_a, clean_b, after_b = drawn(200, 0)
    step = 100 * ((clean_b - after_b) - (clean_a - after_a))
    frame = differences(*run_of(clean_a, after_a), *run_of(clean_b, after_b))
    row = frame[frame["task"] == "a"].iloc[0]
    expected = ttest_1samp(step, 0).confidence_interval()
    assert row["difference"] == pytest.approx(step.mean())
    assert (row["difference_low"], row["difference_high"]) == pytest.approx(tuple(expected))
    assert row["drop_b"] - row["drop_a"] == pytest.approx(row["difference"])
    bounds = bootstrap(
        (step,), np.mean, n_resamples=4000, random_state=np.random.default_rng(0)
    ).confidence_interval
    assert row["difference_low"] == pytest.approx(bounds.low, abs=1)
    assert row["difference_high"] == pytest.approx(bounds.high, abs=1)
    mean = frame[frame["task"] == "mean"].iloc[0]
    assert mean[["difference", "difference_low", "p"]].tolist() == pytest.approx(
        row[["difference", "difference_low", "p"]].tolist()
    )


def test_where_clean_answers_are_equal_it_is_mcnemar():
    """Then the difference of drops is that of the accuracies under attack."""
    clean, after_a, _, after_b = drawn(300, 1)
    a, b = run_of(clean, after_a), run_of(clean, after_b)
    row = differences(*a, *b).iloc[0]
    lost, gained = int((after_a > after_b).sum()), int((after_b > after_a).sum())
    assert row["p"] == pytest.approx(binomtest(lost, lost + gained).pvalue)
    of_pairs = paired(*a, *b)
    attacked = of_pairs[of_pairs["condition"] == "fgsm@0.01"].iloc[0]
    assert row["difference"] == pytest.approx(-attacked["difference"])
    assert row["p"] == pytest.approx(attacked["p_mcnemar"])


def test_the_mean_over_tasks_is_unweighted():
    """Its error is that of independent means; by a bootstrap within tasks."""
    tasks = {"a": drawn(60, 2), "b": drawn(400, 3)}
    a = several(*(run_of(of[0], of[1], task) for task, of in tasks.items()))
    b = several(*(run_of(of[2], of[3], task) for task, of in tasks.items()))
    frame = differences(*a, *b)
    assert frame["task"].tolist() == ["a", "b", "mean"]
    steps = [100 * ((of[2] - of[3]) - (of[0] - of[1])) for of in tasks.values()]
    mean = frame.iloc[2]
    assert mean["difference"] == pytest.approx(np.mean([of.mean() for of in steps]))
    bounds = bootstrap(
        tuple(steps),
        lambda x, y, axis: (x.mean(axis) + y.mean(axis)) / 2,
        n_resamples=4000,
        vectorized=True,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    assert mean["difference_low"] == pytest.approx(bounds.low, abs=1)
    assert mean["difference_high"] == pytest.approx(bounds.high, abs=1)
    assert mean["n"] == 460
    assert (frame["p_holm"][:2] >= frame["p"][:2]).all()


def test_questions_that_share_a_source_count_once():
    clean_a, after_a, clean_b, after_b = drawn(100, 4)
    alone = differences(*run_of(clean_a, after_a), *run_of(clean_b, after_b)).iloc[0]
    twice = [np.repeat(of, 2) for of in (clean_a, after_a, clean_b, after_b)]
    cluster = np.repeat(np.arange(100), 2)
    a, b = run_of(*twice[:2], cluster=cluster), run_of(*twice[2:], cluster=cluster)
    row = differences(*a, *b).iloc[0]
    for key in ("difference", "difference_low", "difference_high", "p"):
        assert row[key] == pytest.approx(alone[key])


def test_lower_is_better():
    clean_a, after_a, clean_b, after_b = drawn(50, 5)
    row = differences(*run_of(clean_a, after_a), *run_of(clean_b, after_b)).iloc[0]
    (a, asked), (b, _) = run_of(clean_a, after_a), run_of(clean_b, after_b)
    turned = {"score": "loss", "kind": "number", "better": "lower"}
    other = differences(a.assign(**turned), asked, b.assign(**turned), asked).iloc[0]
    assert other["difference"] == pytest.approx(-row["difference"])


def test_a_run_with_itself_differs_in_nothing():
    a = run_of(*drawn(50, 6)[:2])
    row = differences(*a, *a).iloc[0]
    assert (row["difference"], row["p"]) == (0, 1)
    assert np.isnan(row["difference_low"])  # nothing varies, so that nothing is known of the error


def test_without_a_shared_attack_nothing_is_compared():
    samples, questions = run_of(*drawn(20, 7)[:2])
    other = samples.replace({"condition": {"fgsm@0.01": "fgsm@0.02"}})
    frame = differences(samples, questions, other, questions)
    assert frame.empty
    (sentence,) = drops.amplitudes(frame, None, None)
    assert "only none" in sentence and "--epsilon_unit rms" in sentence


def test_unequal_amplitudes_are_told():
    frame = differences(*run_of(*drawn(20, 8)[:2]), *run_of(*drawn(20, 8)[2:]))

    def of(rms):
        info = {"epsilon_absolute": 0.01, "embedding_rms": rms, "hookpoint": None}
        return SimpleNamespace(run={"attacks": {"fgsm@0.01": info}})

    assert drops.amplitudes(frame, of(0.1), of(0.1)) == []
    (sentence,) = drops.amplitudes(frame, of(0.1), of(0.05))
    assert "0.1 RMS" in sentence and "0.2" in sentence


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({}, "org/model"),
        ({"revision": "step1000"}, "org/model@step1000"),
        ({"peft": "/some/where/adapter/"}, "org/model+adapter"),
        ({"revision": "v2", "peft": "org/lora"}, "org/model@v2+lora"),
    ],
)
def test_an_adapter_and_a_revision_are_part_of_the_name(arguments, name):
    assert name_of({"model_name": "org/model", "settings": {"model_args": arguments}}) == name


def test_the_figure_and_the_table_show_every_row():
    a = several(*(run_of(*drawn(30, i)[:2], task) for i, task in enumerate("ab")))
    b = several(*(run_of(*drawn(30, i)[2:], task) for i, task in enumerate("ab")))
    frame = differences(*a, *b)
    (axes,) = drops.figure(frame).axes
    shown = sorted(x for line in axes.lines for x in np.ravel(line.get_xdata()))
    for value in frame["difference"]:
        assert np.isclose(shown, value).any()
    assert len(drops.cells(frame, []).rows) == len(frame) == 3
