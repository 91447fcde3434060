"""A report computes numbers per question for all questions at once."""

import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, binomtest, rankdata

from llm_attack import stats
from llm_attack.suite.analysis.outcomes import gold_margin, gold_probability, groups, log_likelihood
from llm_attack.suite.analysis.pairs import paired
from llm_attack.suite.analysis.summary import summarise
from llm_attack.suite.analysis.worst import with_worst
from llm_attack.suite.report.page import columns

RUN = {"settings": {"loss": "choice"}, "attacks": {}}


def made(n):
    """Samples of `n` questions under three conditions, and the questions."""
    rng = np.random.default_rng(0)
    gold = [np.array([i % 3]) for i in range(n)]
    rows = []
    for condition in ("none", "fgsm@0.01", "bim@0.01"):
        scores = [rng.normal(size=3) for _ in range(n)]
        best = np.array([int(of.argmax()) for of in scores])
        right = [float(b in g) for b, g in zip(best, gold, strict=True)]
        attack, _, epsilon = condition.partition("@")
        rows.append(
            pd.DataFrame(
                {
                    **{"task": "a", "doc_id": range(n), "condition": condition, "attack": attack},
                    **{"epsilon": float(epsilon or 0), "hookpoint": "embed", "n_choices": 3},
                    **{"gold": gold, "prediction": best, "prediction_norm": best, "acc": right},
                    **{"acc_norm": right, "log_likelihoods": scores, "cosine": np.nan},
                }
            )
        )
    texts = {"doc_hash": [str(i) for i in range(n)], "question": "?", "n_choices": 3, "gold": gold}
    more = {"choices": [["a", "b", "c"]] * n, "lengths": [np.ones(3)] * n}
    questions = pd.DataFrame({"task": "a", "doc_id": range(n), **texts, **more})
    return pd.concat(rows, ignore_index=True), questions


def everything(samples, questions):
    worst = with_worst(samples, RUN)
    summarise(worst)
    paired(worst, questions, worst, questions)
    columns(worst, questions)


def calls(n):
    """How often each function of the package is called for `n` questions."""
    content, found = made(n), Counter()

    everything(*content)  # what is imported, and kept, on the first call

    def count(frame, event, _):
        code = frame.f_code  # names in <> are of comprehensions and generators, which are inline
        if event == "call" and "llm_attack" in code.co_filename and code.co_name[0] != "<":
            found[code.co_filename, code.co_name] += 1

    sys.setprofile(count)
    try:
        everything(*content)
    finally:
        sys.setprofile(None)
    return found


def test_groups():
    """As pandas groups them, in the order in which they appear."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.choice(list("zxy"), 40), "b": rng.integers(3, size=40)})
    frame = frame.assign(c=rng.normal(size=40)).set_index(rng.permutation(40))
    for by in ("a", ["a", "b"]):
        for (key, group), (expected, rows) in zip(
            groups(frame, by), frame.groupby(by, sort=False), strict=True
        ):
            assert key == expected
            assert {name: list(column) for name, column in group.items()} == rows.to_dict("list")


def test_no_function_is_called_per_question():
    """Of so many that no task has too few for a test."""
    assert calls(2000) == calls(1000) != Counter()


@pytest.mark.parametrize("choices", [1, 2, 9, 20])
def test_measures_of_a_question(choices):
    """By their definitions, one question at a time; some have two right choices."""
    rng = np.random.default_rng(choices)
    scores = [rng.normal(-30, 9, choices) for _ in range(50)]
    gold = [sorted({0, i % choices}) for i in range(50)]
    samples = pd.DataFrame({"log_likelihoods": scores, "gold": gold}, index=range(7, 57))
    weights = [np.exp(of - of.max()) for of in scores]
    share = [w[g].sum() / w.sum() for w, g in zip(weights, gold, strict=True)]
    others = [np.delete(of, g) for of, g in zip(scores, gold, strict=True)]
    margin = [
        of[g].max() - rest.max() if len(rest) else np.nan
        for of, g, rest in zip(scores, gold, others, strict=True)
    ]
    np.testing.assert_allclose(gold_probability(samples), share, rtol=1e-14)
    np.testing.assert_array_equal(gold_margin(samples), margin)
    np.testing.assert_allclose(log_likelihood(samples), [of.mean() for of in scores], rtol=1e-14)
    assert gold_margin(samples).index.equals(samples.index)


def test_numbers_that_are_none():
    nan, inf = np.nan, np.inf
    scores = [[-inf, -inf], [nan, -1.0], [-1.0, -inf], [-inf, -1.0]]
    samples = pd.DataFrame({"log_likelihoods": map(np.array, scores), "gold": [[0]] * 4})
    np.testing.assert_array_equal(gold_margin(samples), [nan] * 4)
    np.testing.assert_array_equal(gold_probability(samples), [nan, nan, 1, 0])


@pytest.mark.parametrize("n", [0, 1, 2, 7, 300, 1100, 5001])
def test_binomial_distributions(n):
    for p in (0.0, 1e-3, 0.2, 1 / 3, 0.5, 0.9, 1.0):
        expected = binom.pmf(np.arange(n + 1), n, p)
        np.testing.assert_allclose(stats.binomial(n, p), expected, rtol=1e-11, atol=1e-300)
    expected = binom.pmf(np.arange(n + 1), n, 0.5)
    np.testing.assert_allclose(stats.fair(n), expected, rtol=1e-11, atol=1e-300)
    assert stats.fair(n).sum() == pytest.approx(1, abs=1e-12)


def test_fair_coins_are_exact():
    """11 of 15 or more, twice: 3/32 and so on are floats."""
    assert stats.fair(4).tolist() == [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]
    assert stats.sign_test([[1] * 3 + [-1] * 8], [300]) == 0.2265625


@pytest.mark.parametrize(("more", "less"), [(1, 0), (3, 1), (9, 8), (400, 300)])
def test_more_often(more, less):
    expected = binomtest(more, more + less, alternative="greater").pvalue
    assert stats.more_often(more, less) == pytest.approx(expected, rel=1e-12)


def test_ranks():
    values = np.random.default_rng(0).integers(0, 5, (4, 30)).astype(float)
    np.testing.assert_array_equal(stats.ranks(values), rankdata(values, axis=-1))
    values[0, 3], values[1, 2] = np.nan, np.inf
    np.testing.assert_array_equal(stats.ranks(values), rankdata(values, axis=-1))


def test_draws_that_cannot_get_there_are_not_drawn(monkeypatch):
    """Of tasks of different size, as the mean of many draws: with all of them drawn it is equal."""
    net = [np.r_[np.ones(ones), -np.ones(40)] for ones in (60, 150, 300, 600)]
    alone = [stats.sign_test([of, [1]], [len(of), 7]) for of in net]
    stats._by_draws.cache_clear()
    monkeypatch.setattr(stats, "_SURE", np.inf)
    assert [stats.sign_test([of, [1]], [len(of), 7]) for of in net] == alone
    stats._by_draws.cache_clear()
    assert alone[-1] == 1 / (stats.DRAWS + 1) < alone[0]
