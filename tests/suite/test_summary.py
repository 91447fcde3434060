"""The tables of a run, by hand."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from invented import by_enumeration
from scipy.stats import binomtest

from llm_attack import stats as inference
from llm_attack.base.errors import UsageError
from llm_attack.stats import detectable, mean_of, sign_test
from llm_attack.suite.analysis import summary as s
from llm_attack.suite.analysis.equivalence import with_equivalence
from llm_attack.suite.analysis.outcomes import gold_margin, gold_probability


def test_gold_margin():
    samples = pd.DataFrame(
        {
            "log_likelihoods": [[-1, -3, -2], [-1, -3, -2], [-5.0], [-np.inf, -1], [-4, -4]],
            "gold": [[2], [1, 2], [0], [0], [1]],
        },
        index=[7, 3, 5, 1, 2],
    )
    margins = gold_margin(samples)
    assert margins.index.tolist() == [7, 3, 5, 1, 2]
    np.testing.assert_array_equal(margins, [-1, -1, np.nan, np.nan, 0])


def test_gold_probability():
    """Softmax over the choices, summed over the right ones; scores may be far below 0."""
    rows = {"log_likelihoods": [[-1, -3, -2], [-2001, -2000, -2003], [-np.inf, -4], [np.nan, 0]]}
    samples = pd.DataFrame({**rows, "gold": [[2], [0, 1], [0], [0]]}, index=[4, 2, 9, 1])
    found = gold_probability(samples)
    assert found.index.tolist() == [4, 2, 9, 1]
    e = np.exp
    expected = [e(-2) / (e(-1) + e(-3) + e(-2)), (e(-1) + 1) / (e(-1) + 1 + e(-3)), 0, np.nan]
    np.testing.assert_allclose(found, expected)


def tiny(task, acc, gold=((0,),), n_choices=(4,), acc_norm=None):
    """Samples of `task`: `acc` is condition -> a list of 0 and 1."""
    n = len(next(iter(acc.values())))
    rows = []
    golds, counts = np.resize([len(g) for g in gold], n), np.resize(n_choices, n)
    for i, (g, k) in enumerate(zip(golds, counts, strict=True)):
        for condition, right in acc.items():
            attack, _, epsilon = condition.partition("@")
            normed = None if acc_norm is None else float(acc_norm[condition][i])
            gold_of_row = list(range(g))
            rows.append([task, i, condition, attack, float(epsilon or 0), int(k), gold_of_row])
            rows[-1] += [float(right[i]), normed, [float(right[i])] * g + [0.5] * (k - g)]
    columns = ["task", "doc_id", "condition", "attack", "epsilon", "n_choices", "gold", "acc"]
    return pd.DataFrame(rows, columns=[*columns, "acc_norm", "log_likelihoods"])


def test_table_by_hand():
    """Ten questions of two or five choices and eight of four: every column."""
    clean, attacked = [1] * 8 + [0] * 2, [1, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    first = tiny(
        "zeta", {"none": clean, "fgsm@0.01": attacked}, gold=((0,), (0, 1)), n_choices=(2, 5)
    )
    second = tiny("alpha", {"none": [1] * 8, "fgsm@0.01": [0] * 8}, n_choices=(4,))
    attacks = {"none": {"snr_db": None}, "fgsm@0.01": {"snr_db": 9.5, "snr": 8.9}}
    table = s.summarise(pd.concat([first, second], ignore_index=True), attacks)
    assert table["task"].tolist() == ["zeta"] * 2 + ["alpha"] * 2 + ["mean"] * 2
    assert table["condition"].tolist() == ["none", "fgsm@0.01"] * 3
    assert table["attack"].tolist() == ["none", "fgsm"] * 3
    assert table["epsilon"].tolist() == [0, 0.01] * 3
    np.testing.assert_array_equal(table["snr_db"], [np.nan, 9.5] * 3)
    assert table["n"].tolist() == [10, 10, 8, 8, 18, 18]
    assert table["n_choices_min"].tolist() == [2, 2, 4, 4, 2, 2]
    assert table["n_choices_max"].tolist() == [5, 5, 4, 4, 5, 5]
    np.testing.assert_allclose(table["acc"], [0.8, 0.3, 1, 0, 0.9, 0.15])
    np.testing.assert_allclose(table["baseline"], [0.45, 0.45, 0.25, 0.25, 0.35, 0.35])
    for i, (right, n) in enumerate([(8, 10), (3, 10), (8, 8), (0, 8)]):
        low, high = inference.wilson(right, n)
        assert (table["acc_low"][i], table["acc_high"][i]) == (low, high)
    distances = [table["acc"][i] - table["acc_low"][i] for i in (0, 2)]
    assert table["acc_low"][4] == pytest.approx(0.9 - np.hypot(*distances) / 2)

    pmf = by_enumeration([1 / 2, 2 / 5] * 5)
    p_zeta = [pmf[pmf <= pmf[k] * (1 + 1e-7)].sum() for k in (8, 3)]
    p_alpha = [binomtest(k, 8, 0.25).pvalue for k in (8, 0)]
    np.testing.assert_allclose(table["p_chance"][:4], [*p_zeta, *p_alpha])
    # 8 of 8: the smaller, times two. 0 of 8: smaller than 3 of 10.
    assert p_alpha[0] < p_zeta[0] and p_alpha[1] < p_zeta[1]
    adjusted = [p_zeta[0], min(1, max(p_zeta[1], 2 * p_alpha[1])), 2 * p_alpha[0]]
    np.testing.assert_allclose(table["p_chance_holm"][:3], adjusted)
    assert table["verdict"][:4].tolist() == [
        "above guessing",
        "too few questions to tell from guessing",
        "above guessing",
        "too few questions to tell from guessing",
    ]
    # zeta: questions 1, 2, 3, 5, 6, 7 are lost and 8 is gained
    assert table["lost"].tolist() == [pd.NA, 6, pd.NA, 8, pd.NA, 14]
    assert table["gained"].tolist() == [pd.NA, 1, pd.NA, 0, pd.NA, 1]
    np.testing.assert_allclose(table["drop"], [np.nan, 50, np.nan, 100, np.nan, 75])
    # four lost questions with 2 of 5 choices, two lost and one gained with 1 of 2, by 1 each
    lower = [np.nan, -(4 * 2 / 5 + 1 / 2) / 10, np.nan, -1 / 4]
    np.testing.assert_allclose(table["log_likelihood_change"][:4], lower)
    np.testing.assert_allclose(table["log_likelihood_change"][5], (lower[1] + lower[3]) / 2)
    np.testing.assert_allclose(table["margin_change"], [np.nan, -0.5, np.nan, -1, np.nan, -0.75])
    p_values = [binomtest(1, 7).pvalue, binomtest(0, 8).pvalue]
    np.testing.assert_allclose(table["p_mcnemar"][[1, 3]], p_values)
    np.testing.assert_allclose(table["p_mcnemar_holm"][[1, 3]], [p_values[0], 2 * p_values[1]])
    pooled = table["n"].iloc[[1, 3]].tolist()
    nets = [[-1] * 6 + [1], [-1] * 8]
    errors = inference.paired_error([6, 8], [1, 0], pooled)
    expected = [sign_test(nets, pooled), detectable(errors)]
    assert table["p_mcnemar"][5] == table["p_mcnemar_holm"][5] == expected[0] < 0.001
    assert table["detectable"][5] == 100 * expected[1]
    assert table["p_mcnemar"][[0, 2, 4]].isna().all()
    for row in (1, 3, 5):
        assert table["drop_low"][row] < table["drop"][row] <= table["drop_high"][row]
    assert table["verdict"][4:].isna().all() and table["p_chance_holm"][4:].isna().all()
    assert table[["acc_norm", "acc_norm_low", "acc_norm_high"]].isna().all(axis=None)


def test_verdicts():
    """Of 400 questions with two choices, 200 are expected by guessing."""
    right = {"a": 250, "b": 150, "c": 210}
    tasks = [tiny(t, {"none": [1] * k + [0] * (400 - k)}, n_choices=(2,)) for t, k in right.items()]
    verdicts = s.summarise(pd.concat(tasks)).set_index("task")["verdict"]
    assert verdicts["a"] == "above guessing"
    assert verdicts["b"] == "below guessing"
    assert verdicts["c"] == "indistinguishable from guessing"


def test_verdict_is_adjusted_over_tasks():
    """Alone, 222 of 400 is significant (p = 0.03); as one of six tasks it is not."""
    task = tiny("a", {"none": [1] * 222 + [0] * 178}, n_choices=(2,))
    assert s.summarise(task)["verdict"][0] == "above guessing"
    six = pd.concat([task.assign(task=name) for name in "abcdef"])
    assert set(s.summarise(six)["verdict"][:6]) == {"indistinguishable from guessing"}


def test_acc_norm_and_its_mean():
    """acc_norm has an interval where present; a mean needs it of every task."""
    normed = {"none": [1, 1, 0, 0]}
    both = pd.concat([tiny("a", normed, acc_norm={"none": [1, 0, 0, 0]}), tiny("b", normed)])
    table = s.summarise(both).set_index("task")
    assert table.loc["a", "acc_norm"] == 0.25
    assert (table.loc["a", "acc_norm_low"], table.loc["a", "acc_norm_high"]) == inference.wilson(
        1, 4
    )
    assert table.loc[["b", "mean"], "acc_norm"].isna().all()
    half = tiny("a", normed, acc_norm={"none": [1, np.nan, 0, 0]})
    assert s.summarise(half)["acc_norm"].isna().all()
    alone = s.summarise(both[both["task"] == "a"])
    assert alone["acc_norm"].tolist() == [0.25, 0.25]
    assert alone["acc_norm_low"][1] == pytest.approx(alone["acc_norm_low"][0])


def test_without_none():
    table = s.summarise(tiny("a", {"fgsm@0.1": [1, 0, 1], "bim@0.1": [0, 0, 1]}))
    assert table[["p_mcnemar", "p_mcnemar_holm", "drop", "lost", "gained"]].isna().all(axis=None)
    np.testing.assert_allclose(table["acc"], [2 / 3, 1 / 3] * 2)


@pytest.mark.parametrize("right", [0, 1])
def test_one_question(right):
    table = s.summarise(tiny("a", {"none": [right], "fgsm@0.1": [1 - right]}, n_choices=(2,)))
    assert table["acc"].tolist() == [right, 1 - right] * 2
    assert table["p_chance"][:2].tolist() == [1, 1] and table["p_mcnemar"][1] == 1
    assert table["drop"][1] == 100 * (2 * right - 1)
    assert (table["acc_low"] <= table["acc"]).all() and (table["acc"] <= table["acc_high"]).all()


def test_no_samples(frames):
    with pytest.raises(UsageError, match="at least one question"):
        s.summarise(frames()[0].iloc[:0])


def test_order_of_questions_and_storage_do_not_matter(frames, tmp_path):
    """A shuffle within tasks, and Parquet's arrays instead of lists, change no number."""
    samples, _ = frames({"a": (40, (3, 4)), "b": (30, 2)})
    table = s.summarise(samples)
    samples.to_parquet(tmp_path / "samples.parquet")
    pd.testing.assert_frame_equal(s.summarise(pd.read_parquet(tmp_path / "samples.parquet")), table)
    shuffled = s.summarise(samples.sample(frac=1, random_state=0))
    keys = ["task", "condition"]
    pd.testing.assert_frame_equal(
        shuffled.sort_values(keys, ignore_index=True), table.sort_values(keys, ignore_index=True)
    )


def test_equivalence():
    """Of two tasks and their mean; nothing without a limit, a line for one that makes no sense."""
    right = {"none": [1] * 300 + [0] * 100, "random@1": [1] * 296 + [0] * 100 + [1] * 4}
    right["fgsm@1"] = [1] * 200 + [0] * 200
    table = s.summarise(pd.concat([tiny("a", right), tiny("b", right)]))
    assert with_equivalence(table, None) is table
    found = with_equivalence(table, 3).set_index(["task", "condition"])
    assert (found["within"] == 3).all()
    error = inference.paired_error(4, 4, 400)
    alone = inference.equivalence_test(0, error, 0.03)
    assert found.loc[("a", "random@1"), "p_equivalence"] == pytest.approx(alone)
    assert found.loc[("b", "random@1"), "p_equivalence_holm"] == pytest.approx(2 * alone)
    pooled = inference.equivalence_test(0, error / np.sqrt(2), 0.03)
    both = found.loc[("mean", "random@1"), ["p_equivalence", "p_equivalence_holm"]]
    assert both.tolist() == pytest.approx([pooled, pooled]) and pooled < alone < 0.001
    assert found.loc[("mean", "fgsm@1"), "p_equivalence"] == pytest.approx(1)
    assert found.xs("none", level="condition")["p_equivalence"].isna().all()
    for within in (0, -1, 101, np.nan):
        with pytest.raises(UsageError, match=f"equivalence={within}: must be percentage points"):
            with_equivalence(table, within)
    with pytest.raises(UsageError, match="equivalence=2: needs"):
        with_equivalence(table[table["condition"] != "none"].assign(drop=np.nan), 2)


def twins(samples, task="a"):
    """With every two neighbours of a task from one source."""
    return samples.assign(
        cluster=pd.array(np.where(samples["task"] == task, samples["doc_id"] // 2, pd.NA), "Int64")
    )


def test_shared_sources():
    """Twins that are lost together: half as many count, in interval and tests; others as before."""
    clean, attacked = [1] * 40 + [0] * 20, [1] * 30 + [0] * 30
    samples = pd.concat([tiny(t, {"none": clean, "fgsm@1": attacked}) for t in "ab"])
    alone = s.summarise(samples).set_index(["task", "condition"])
    table = s.summarise(twins(samples)).set_index(["task", "condition"])
    assert table["clusters"].tolist() == [30, 30, 60, 60, 90, 90]
    pd.testing.assert_frame_equal(table.loc[["b"]], alone.loc[["b"]])
    of_a, before = table.loc[("a", "fgsm@1")], alone.loc[("a", "fgsm@1")]
    assert of_a["p_mcnemar"] == pytest.approx(2 / 2**5)  # five pairs, all lost
    assert before["p_mcnemar"] == pytest.approx(2 / 2**10)
    labels, step = np.repeat(range(30), 2), np.subtract(attacked, clean)
    effect = inference.design_effect(step, labels)
    assert of_a["design_effect"] == effect > 1.9
    ends = inference.paired_interval(10 / effect, 0, 60 / effect)
    assert (-100 * ends[1], -100 * ends[0]) == (of_a["drop_low"], of_a["drop_high"])
    assert of_a["detectable"] == 100 * detectable(
        [inference.paired_error(10 / effect, 0, 60 / effect)]
    )
    effect = inference.design_effect(attacked, labels)
    ends = inference.wilson(30 / effect, 60 / effect)
    assert (of_a["acc_low"], of_a["acc_high"]) == ends
    for key in ("acc", "drop", "lost", "gained", "baseline", "p_chance"):
        assert of_a[key] == before[key], key
    mean = table.loc[("mean", "fgsm@1")]
    assert mean["p_mcnemar"] == sign_test([[-2] * 5, [-1] * 10], [60, 60])
    within = with_equivalence(table.reset_index(), 25).set_index(["task", "condition"])
    counts = [[10 / of_a["design_effect"], 10], [0, 0], [60 / of_a["design_effect"], 60]]
    error = inference.error_of_mean(inference.paired_error(*counts))
    expected = inference.equivalence_test(10 / 60, error, 0.25)
    assert within.loc[("mean", "fgsm@1"), "p_equivalence"] == pytest.approx(expected)


def test_gold_probability_as_an_outcome(frames):
    """Means and paired drops in points with a t interval, of each task and of their mean."""
    samples, _ = frames({"a": (40, 4), "b": (30, 2)})
    samples = twins(samples)
    table = s.summarise(samples).set_index(["task", "condition"])
    shares = samples.assign(share=gold_probability(samples))
    tasks = []
    for task, of_task in shares.groupby("task"):
        by = of_task.pivot(index="doc_id", columns="condition", values="share")
        step = by["bim@0.01"] - by["none"]
        source = step.index // 2 if task == "a" else step.index
        tasks.append((step.to_numpy(), source))
        row, found = table.loc[(task, "bim@0.01")], mean_of(tasks[-1:])
        assert row["gold_probability"] == pytest.approx(by["bim@0.01"].mean())
        names = ["", "_low", "_high"]
        drops = [row[f"gold_probability_drop{end}"] for end in names]
        assert drops == pytest.approx([-100 * found.value, -100 * found.high, -100 * found.low])
        assert row["p_gold_probability"] == pytest.approx(found.p_value)
    row, found = table.loc[("mean", "bim@0.01")], mean_of(tasks)
    assert row["gold_probability_drop_high"] == pytest.approx(-100 * found.low)
    assert row["p_gold_probability"] == pytest.approx(found.p_value)
    assert table.xs("none", level="condition")["gold_probability_drop"].isna().all()


def test_imports_neither_torch_nor_lm_eval():
    code = "import sys, llm_attack.suite.analysis.summary\n"
    code += "print({'torch', 'lm_eval'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
