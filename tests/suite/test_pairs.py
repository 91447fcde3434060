"""Two runs compared, by hand."""

import numpy as np
import pytest
from invented import SHIFTS
from scipy.stats import binomtest

from llm_attack import stats as inference
from llm_attack.base.errors import UsageError
from llm_attack.suite.analysis.pairs import paired, unshared


def test_paired_with_itself(frames):
    run = frames({"a": (20, 4), "b": (10, 2)})
    result = paired(*run, *run)
    assert result["task"].tolist() == ["a"] * 4 + ["b"] * 4 + ["mean"] * 4
    assert result["condition"].tolist() == [*SHIFTS] * 3  # in the order of the run
    assert result["n"].tolist() == [20] * 4 + [10] * 4 + [30] * 4
    assert (result[["left_out", "lost", "gained", "difference"]] == 0).all(axis=None)
    assert (result["p_mcnemar"] == 1).all()
    assert (result["acc_a"] == result["acc_b"]).all()
    assert unshared(*run, *run) == []


def test_paired_numbers(frames):
    """Questions whose prompt differs or that one run lacks are left out, on both sides."""
    a = frames({"a": (40, 4), "b": (30, 2), "c": (5, 2)}, {"none": 3.0, "fgsm@0.1": 1.0}, seed=1)
    b = frames({"b": (30, 2), "a": (40, 4)}, {"fgsm@0.1": 0.5, "bim@0.1": 0.0}, seed=2)
    b[1].loc[(b[1]["task"] == "a") & (b[1]["doc_id"] < 10), "doc_hash"] = "other"
    drop = (b[1]["task"] == "b") & (b[1]["doc_id"] >= 25)
    b = (b[0][~((b[0]["task"] == "b") & (b[0]["doc_id"] >= 25))], b[1][~drop])
    result = paired(*a, *b)
    assert result["task"].tolist() == ["a", "b", "mean"]
    assert set(result["condition"]) == {"fgsm@0.1"}
    assert result["n"].tolist() == [30, 25, 55] and result["left_out"].tolist() == [10, 5, 15]
    expected = []
    for i, (task, kept) in enumerate([("a", range(10, 40)), ("b", range(25))]):
        of_run = []
        for samples, _ in (a, b):
            rows = samples[(samples["task"] == task) & (samples["condition"] == "fgsm@0.1")]
            of_run.append(rows.set_index("doc_id")["acc"].loc[list(kept)].to_numpy())
        lost = int(((of_run[0] == 1) & (of_run[1] == 0)).sum())
        gained = int(((of_run[0] == 0) & (of_run[1] == 1)).sum())
        row = result.loc[i]
        assert (row["acc_a"], row["acc_b"]) == (of_run[0].mean(), of_run[1].mean())
        assert (row["lost"], row["gained"]) == (lost, gained)
        assert row["difference"] == pytest.approx(100 * (row["acc_b"] - row["acc_a"]))
        ends = row["difference_low"] / 100, row["difference_high"] / 100
        assert ends == pytest.approx(inference.paired_interval(lost, gained, len(kept)))
        assert row["p_mcnemar"] == pytest.approx(binomtest(lost, lost + gained).pvalue)
        expected.append(row["p_mcnemar"])
    np.testing.assert_allclose(result["p_mcnemar_holm"][:2], inference.holm(expected))
    mean = result.loc[2]
    assert mean["difference"] == pytest.approx(result["difference"][:2].mean())
    counts = [result[key][:2].to_numpy(int) for key in ("lost", "gained", "n")]
    nets = [np.repeat([-1, 1], of) for of in zip(counts[0], counts[1], strict=True)]
    pooled = inference.sign_test(nets, counts[2].tolist())
    assert mean["p_mcnemar"] == mean["p_mcnemar_holm"] == pooled
    assert mean["detectable"] == 100 * inference.detectable(inference.paired_error(*counts))
    assert unshared(*a, *b) == [
        "tasks only in run a: c",
        "conditions only in run a: none",
        "conditions only in run b: bim@0.1",
    ]


def test_paired_with_nothing_in_common(frames):
    a, b = frames({"a": (3, 4)}), frames({"b": (3, 4)})
    with pytest.raises(UsageError, match="share no task: a against b"):
        paired(*a, *b)
    with pytest.raises(UsageError, match="share no condition: none against fgsm@1"):
        paired(*frames({"a": (3, 4)}, {"none": 1}), *frames({"a": (3, 4)}, {"fgsm@1": 1}))
    other = (a[0], a[1].assign(doc_hash="other"))
    with pytest.raises(UsageError, match="share no question"):
        paired(*a, *other)
    both = frames({"a": (3, 4), "b": (3, 4)})
    changed = both[1].assign(doc_hash=both[1]["doc_hash"].where(both[1]["task"] == "b", "other"))
    assert unshared(*both, both[0], changed) == ["no question is the same in both runs: a"]
