"""Intervals and tests against scipy, brute force, closed forms and hand examples."""

from fractions import Fraction
from itertools import product
from math import comb
from unittest import mock

import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given
from hypothesis import strategies as st
from invented import by_enumeration
from scipy.stats import binomtest, multinomial
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from llm_attack import stats as s

CHANCES = st.lists(
    st.sampled_from([1 / 2, 1 / 3, 1 / 4, 1 / 5, 2 / 5, 1.0]), min_size=1, max_size=9
)
Z = scipy.stats.norm.ppf(0.975)


@given(st.integers(1, 5000), st.data())
def test_wilson_ends_are_just_not_rejected(n, data):
    """By definition the score test of an end against the observed share gives exactly z."""
    right = data.draw(st.integers(0, n))
    share = right / n
    low, high = s.wilson(right, n)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(Z**2 * end * (1 - end) / n, abs=1e-12)
    assert (low == 0) == (right == 0) and (high == 1) == (right == n)


@given(st.floats(0, 1), st.floats(0.5, 1e5))
@example(0.0, 1.0)
@example(1.0, 7.0)
def test_wilson_against_statsmodels(share, n):
    """Of any numbers: counts that are divided by a design effect are not whole."""
    expected = proportion_confint(share * n, n, alpha=0.05, method="wilson")
    assert s.wilson(share * n, n) == pytest.approx(expected, rel=0, abs=1e-15)


def test_rounding_leaves_no_bounds():
    """Where rounding would put a share outside of its interval, or a probability above 1."""
    for n in range(1, 60):
        assert s.wilson(0, n)[0] == 0 and s.wilson(n, n)[1] == 1
        assert s.chance_test(n // 4, np.full(n, 0.25)) <= 1


@given(CHANCES)
def test_guessing_against_enumeration(chances):
    np.testing.assert_allclose(s.guessing(chances), by_enumeration(chances), rtol=1e-12, atol=1e-15)


@given(CHANCES, st.data())
def test_chance_test_against_enumeration(chances, data):
    right = data.draw(st.integers(0, len(chances)))
    pmf = by_enumeration(chances)
    expected = sum(p for p in pmf if p <= pmf[right] * (1 + 1e-7))
    assert s.chance_test(right, chances) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(st.integers(1, 3000), st.sampled_from([1 / 2, 1 / 3, 1 / 4, 1 / 5, 2 / 3]), st.data())
def test_chance_test_with_equal_chances_is_binomtest(n, p, data):
    right = data.draw(st.integers(0, n))
    expected = binomtest(
        right, n, p
    ).pvalue  # its own error grows where it is small: 1e-8 at 1e-283
    assert s.chance_test(right, np.full(n, p)) == pytest.approx(expected, rel=1e-8, abs=1e-200)


@pytest.mark.parametrize(
    ("right", "n", "p"), [(18, 671, 2 / 3), (655, 672, 1 / 3), (0, 60, 0.25), (90, 300, 0.2)]
)
@pytest.mark.sampled(2)
def test_chance_test_against_fractions(right, n, p):
    """Without any rounding."""
    hit = Fraction(p)
    pmf = [comb(n, k) * hit**k * (1 - hit) ** (n - k) for k in range(n + 1)]
    expected = sum(x for x in pmf if x <= pmf[right] * (1 + Fraction(1, 10**7)))
    assert s.chance_test(right, np.full(n, p)) == pytest.approx(float(expected), rel=1e-12, abs=0)


@pytest.mark.parametrize("right", [0, 2400, 2510, 2511, 2600, 3000, 10042])
def test_chance_test_of_a_large_task(right):
    expected = binomtest(right, 10042, 0.25).pvalue
    assert s.chance_test(right, np.full(10042, 0.25)) == pytest.approx(expected, rel=1e-9)


def test_guessing_of_a_large_mixed_task():
    chances = np.resize([1 / 4, 1 / 4, 1 / 4, 1 / 3, 1 / 5], 10042)
    pmf, outcomes = s.guessing(chances), np.arange(10043)
    assert pmf.sum() == pytest.approx(1, abs=1e-11)
    mean = (pmf * outcomes).sum()
    assert mean == pytest.approx(chances.sum(), rel=1e-11)
    variance = (pmf * (outcomes - mean) ** 2).sum()
    assert variance == pytest.approx((chances * (1 - chances)).sum(), rel=1e-9)


@pytest.mark.skipif(not hasattr(scipy.stats, "poisson_binom"), reason="scipy before 1.15")
def test_guessing_against_scipy():
    chances = np.resize([1 / 4, 1 / 4, 1 / 3, 1 / 5, 1 / 2], 500)
    expected = scipy.stats.poisson_binom.pmf(np.arange(501), chances)
    np.testing.assert_allclose(s.guessing(chances), expected, rtol=1e-8, atol=1e-15)


def singles(lost, gained):
    """Net changes of as many clusters of one question each."""
    return np.repeat([-1, 1], [lost, gained])


@given(st.integers(0, 400), st.integers(0, 400))
def test_of_single_questions_the_sign_test_is_mcnemars(lost, gained):
    n = lost + gained
    expected = mcnemar([[0, lost], [gained, 0]], exact=True).pvalue if n else 1.0
    found = s.sign_test([singles(lost, gained)], [n + 5])
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-290)


def test_holm_by_hand():
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1; never below the one before."""
    adjusted = s.holm([0.01, np.nan, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(adjusted, [0.03, np.nan, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(s.holm([0.7, 0.6]), [1, 1])
    np.testing.assert_allclose(s.holm([0.02]), [0.02])
    assert s.holm([0, 1]).dtype == np.float64
    assert np.isnan(s.holm([np.nan, np.nan])).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_against_statsmodels(p_values):
    with mock.patch("gc.collect"):  # which the other library calls every time
        expected = multipletests(p_values, method="holm")[1]
    np.testing.assert_allclose(s.holm(p_values), expected)


def test_paired_interval_by_hand():
    """21 pairs, one lost, seven gained: shares 2/23 and 8/23 after one more of each."""
    low, high = s.paired_interval(1, 7, 21)
    half = Z * np.sqrt((10 / 23 - 36 / 529) / 23)
    assert (low, high) == (pytest.approx(6 / 23 - half), pytest.approx(6 / 23 + half))
    assert s.paired_interval(0, 1, 1)[1] == 1 and s.paired_interval(1, 0, 1)[0] == -1


@given(st.integers(1, 2000), st.data())
def test_paired_interval_holds_the_difference(n, data):
    lost = data.draw(st.integers(0, n))
    gained = data.draw(st.integers(0, n - lost))
    low, high = s.paired_interval(lost, gained, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1 and low < high
    mirrored = s.paired_interval(gained, lost, n)
    assert mirrored == (pytest.approx(-high), pytest.approx(-low))


@pytest.mark.parametrize("lost, gained", [(0.3, 0.02), (0.1, 0.1), (0.5, 0.05), (0.05, 0.3)])
@pytest.mark.parametrize("n", [30, 60])
def test_paired_interval_covers(n, lost, gained):
    """The exact probability that the interval holds the true difference, over all outcomes."""
    covered = 0.0
    law = multinomial(n, [lost, gained, 1 - lost - gained])
    for i in range(n + 1):
        for j in range(n + 1 - i):
            low, high = s.paired_interval(i, j, n)
            if low <= gained - lost <= high:
                covered += law.pmf([i, j, n - i - j])
    assert 0.935 < covered < 0.975


def test_mean_interval():
    assert s.mean_interval([0.4], [0.3], [0.6]) == (pytest.approx(0.3), pytest.approx(0.6))
    low, high = s.mean_interval([0.5] * 4, [0.3] * 4, [0.6] * 4)
    assert (low, high) == (pytest.approx(0.4), pytest.approx(0.55))
    low, high = s.mean_interval([0.2, 0.8], [0.17, 0.76], [0.2, 0.85])
    assert (low, high) == (pytest.approx(0.5 - 0.05 / 2), pytest.approx(0.5 + 0.05 / 2))


NETS = st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=4), min_size=1, max_size=3)


@given(NETS)
def test_sign_test_against_enumeration(nets):
    """Every way in which what changed in each cluster could have changed the other way."""
    flat = np.concatenate(nets)
    sums = [np.dot(flat, signs) for signs in product((-1, 1), repeat=len(flat))]
    expected = np.mean(np.abs(sums) >= abs(flat.sum()))
    assert s.sign_test(nets, [9] * len(nets)) == pytest.approx(expected)


def test_a_sign_test_by_hand_and_of_tasks_of_any_size():
    """Two lost of 10, three of 20: -0.2 - 0.15; as far are that and its mirror: 2 of 32."""
    apart = [singles(2, 0), singles(3, 0)]
    drawn = s.sign_test(apart, [10, 20])
    # a share of 99,999 draws, whose standard deviation is 8e-4
    assert drawn == pytest.approx(2 / 32, abs=4e-3)
    assert drawn == s.sign_test(apart, [10, 20])
    # the same from one source each: 2 of 4
    assert s.sign_test([[-2], [-3]], [10, 20]) == pytest.approx(1 / 2, abs=6e-3)
    assert s.sign_test([[0, 0], [0]], [10, 20]) == 1


@pytest.mark.parametrize("sizes", [(80, 80, 80), (40, 90, 120)])
def test_the_sign_test_has_its_size(sizes):
    """Of twins in tasks where as many are lost as gained it rejects 5 % or less, hardly less."""
    rng = np.random.default_rng(4)
    with mock.patch.object(s, "DRAWS", 999):
        p_values = [
            s.sign_test([twin_changes(rng, n, 0.15, 0.15).sum(1) for n in sizes], sizes)
            for _ in range(1500)
        ]
    # 0.05 with a standard deviation of 0.0056
    assert 0.025 <= np.mean(np.array(p_values) <= 0.05) <= 0.067


def twin_changes(rng, n, lost, gained, alike=0.7):
    """(n // 2, 2) changes of twins, -1 lost and 1 gained; both are the same in `alike` of pairs."""
    chances = [lost, 1 - lost - gained, gained]
    drawn = rng.choice([-1, 0, 1], (n // 2, 2), p=chances)
    return np.where(rng.random((n // 2, 1)) < alike, drawn[:, :1], drawn)


def test_what_is_detectable_is_detected_with_power():
    """Drops of just that size are found in 80 % of runs, with as many changes."""
    rng, n = np.random.default_rng(5), np.array([300, 300])
    drop = s.detectable(s.paired_error([36, 36], [18, 18], n))
    change = 54 / 300
    found = 0
    for _ in range(600):
        lost = rng.binomial(n, (change + drop) / 2)
        gained = rng.binomial(n - lost, (change - drop) / 2 / (1 - (change + drop) / 2))
        found += s.sign_test(list(map(singles, lost, gained)), n.tolist()) <= 0.05
    # an approximation; 0.8 with a standard deviation of 0.016
    assert 0.74 <= found / 600 <= 0.86


def equivalence(lost, gained, n, within):
    """Of the mean over tasks, from counts."""
    lost, gained, n = (np.asarray(of) for of in (lost, gained, n))
    error = s.error_of_mean(s.paired_error(lost, gained, n))
    return s.equivalence_test(((gained - lost) / n).mean(-1), error, within)


def test_equivalence_by_hand():
    """4 lost and 2 gained of 100: -0.02, with 5 and 3 of 102 its error; 0.05 is 0.03 away."""
    error = np.sqrt((8 / 102 - (2 / 102) ** 2) / 102)
    expected = scipy.stats.norm.sf(0.03 / error)
    assert equivalence([4], [2], [100], 0.05) == pytest.approx(expected)
    assert equivalence([2], [4], [100], 0.05) == pytest.approx(expected)
    assert equivalence([9], [2], [100], 0.05) > 0.5
    # nothing changed in few questions: no evidence
    assert equivalence([0], [0], [20], 0.05) > 0.1
    pooled = equivalence([4, 0], [2, 0], [100, 100], 0.05)
    error = np.hypot(error, np.sqrt(2 / 102 / 102)) / 2
    assert pooled == pytest.approx(scipy.stats.norm.sf(0.04 / error))


@pytest.mark.parametrize("changed", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("n", [[400], [500] * 6, [80, 200, 500]])
def test_equivalence_is_claimed_wrongly_in_5_percent_at_most(n, changed):
    """10,000 runs whose difference is just the limit: the claim is wrong there."""
    rng, within = np.random.default_rng(6), 0.03
    shape = (10_000, len(n))
    lost = rng.binomial(n, (changed + within) / 2, shape)
    share = (changed - within) / 2 / (1 - (changed + within) / 2)
    gained = rng.binomial(np.array(n) - lost, share)
    claimed = np.mean(equivalence(lost, gained, np.broadcast_to(n, shape), within) <= 0.05)
    # 0.05 with a standard deviation of 0.0022; of few changes the counts are coarse
    assert claimed <= 0.057
    if len(n) == 6 and changed < 0.2:
        assert claimed >= 0.043


def test_design_effect_against_statsmodels():
    """Variance of the intercept by clusters over that of independent questions, and quantiles."""
    rng = np.random.default_rng(7)
    clusters = rng.integers(0, 40, 150)
    values = (rng.normal(size=40)[clusters] + rng.normal(size=150) > 0.4).astype(float)
    model = OLS(values, np.ones(150))
    k = len(set(clusters))
    robust = model.fit(cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": False})
    together = robust.cov_params()[0, 0] * k / (k - 1)
    quantiles = scipy.stats.t.ppf(0.975, k - 1) / scipy.stats.t.ppf(0.975, 149)
    expected = together / model.fit().cov_params()[0, 0] * quantiles**2
    assert s.design_effect(values, clusters) == pytest.approx(expected) and expected > 1.2
    found = s.mean_of([(values, clusters)])
    assert found.value == values.mean()
    half = scipy.stats.t.ppf(0.975, k - 1) * np.sqrt(together)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))
    ratio = values.mean() / np.sqrt(together)
    assert found.p_value == pytest.approx(2 * scipy.stats.t.sf(ratio, k - 1))


def test_design_effects_that_are_known():
    assert s.design_effect([1, 0, 1, 0], [0, 1, 2, 3]) == 1  # none shared
    assert s.design_effect([1, 0, 1, 0], [5, 5, 5, 5]) == 1  # nothing to compare
    assert s.design_effect([1] * 6, [0, 0, 0, 1, 1, 1]) == 3  # all equal: the size
    assert s.design_effect([0, 1] * 50, np.repeat(range(50), 2)) == 1  # opposites: not below 1
    # twins that always agree count once: 2, but for the quantiles and n - 1
    twins = s.design_effect(np.repeat([0, 1] * 500, 2), np.repeat(range(1000), 2))
    assert twins == pytest.approx(2, rel=2e-3)


def test_mean_of_single_questions_is_the_t_test():
    rng = np.random.default_rng(8)
    values = rng.normal(0.1, 1, 30)
    found, known = s.mean_of([(values, range(30))]), scipy.stats.ttest_1samp(values, 0)
    ends = known.confidence_interval()
    assert found == pytest.approx((values.mean(), ends.low, ends.high, known.pvalue))
    other = rng.normal(0, 3, 12)
    found, known = (
        s.mean_of([(values, range(30)), (-other, range(12))]),
        scipy.stats.ttest_ind(values, other, equal_var=False),
    )
    ends = known.confidence_interval()
    assert found == pytest.approx((known._estimate / 2, ends.low / 2, ends.high / 2, known.pvalue))


def test_mean_of_what_does_not_vary():
    assert s.mean_of([([0.0, 0.0], [0, 1])]) == (0, 0, 0, 1)
    assert s.mean_of([([0.5, 0.5], [0, 1])]) == (0.5, 0.5, 0.5, 0)
    value, *unknown = s.mean_of([([0.5, 0.1], [0, 0])])
    assert value == pytest.approx(0.3) and np.isnan(unknown).all()


def beta_clusters(rng, sizes, share, alike):
    """Answers of clusters of these sizes, right with `share`, their correlation `alike`."""
    scale = (1 - alike) / alike
    chances = rng.beta(share * scale, (1 - share) * scale, len(sizes))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return (rng.random(len(labels)) < chances[labels]).astype(float), labels


@pytest.mark.parametrize(
    "sizes, share, alike",
    [
        pytest.param([2] * 150, 0.6, 0.5, marks=pytest.mark.slow),
        ([1, 2, 3, 4, 8] * 12, 0.35, 0.3),
        pytest.param([5] * 40, 0.5, 0.2, marks=pytest.mark.slow),
    ],
)
def test_intervals_of_clusters_cover(sizes, share, alike):
    """10,000 runs with a known correlation inside of clusters; without it the interval is short."""
    rng, inside, naive = np.random.default_rng(9), 0, 0
    for _ in range(10_000):
        values, labels = beta_clusters(rng, sizes, share, alike)
        effect = s.design_effect(values, labels)
        n, right = len(values), values.sum()
        low, high = s.wilson(right / effect, n / effect)
        inside += low <= share <= high
        low, high = s.wilson(right, n)
        naive += low <= share <= high
    # 0.95 with a standard deviation of 0.0022; sizes that differ cost up to a point
    assert 0.935 <= inside / 10_000 <= 0.965
    assert naive / 10_000 < 0.91


@pytest.mark.slow
def test_drops_of_clusters_are_covered():
    """10,000 runs of twins that are lost together: by counts, and the mean of two tasks by t."""
    rng, inside, by_t = np.random.default_rng(10), 0, 0
    labels = np.repeat(np.arange(100), 2)
    for _ in range(10_000):
        steps = [twin_changes(rng, 200, 0.2, 0.05).ravel() for _ in range(2)]
        effect = s.design_effect(steps[0], labels)
        lost, gained = (np.count_nonzero(steps[0] == sign) / effect for sign in (-1, 1))
        low, high = s.paired_interval(lost, gained, 200 / effect)
        inside += low <= -0.15 <= high
        found = s.mean_of([(step, labels) for step in steps])
        by_t += found.low <= -0.15 <= found.high
    assert 0.94 <= inside / 10_000 <= 0.965 and 0.94 <= by_t / 10_000 <= 0.96
