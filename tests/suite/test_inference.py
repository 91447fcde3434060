"""Intervals and tests against scipy, brute force, closed forms and hand examples."""

from fractions import Fraction
from itertools import product
from math import comb, prod
from unittest import mock

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from invented import by_enumeration
from scipy.stats import binomtest, multinomial
from statsmodels.stats.multitest import multipletests

from llm_attack.suite import inference as s

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


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_a_test_of_halves(lost, gained):
    n = lost + gained
    expected = binomtest(lost, n, 0.5).pvalue if n else 1.0
    assert s.mcnemar_test(lost, gained) == pytest.approx(expected, rel=1e-9, abs=1e-290)


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


@given(st.integers(0, 12), st.integers(0, 12), st.integers(25, 40))
def test_of_one_task_the_stratified_test_is_mcnemars(lost, gained, n):
    assert s.stratified_test([lost], [gained], [n]) == pytest.approx(s.mcnemar_test(lost, gained))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=3))
def test_stratified_test_against_enumeration(pairs):
    """Every way in which the changed questions could have been lost or gained."""
    changed = [a + b for a, b in pairs]
    seen = abs(sum(b - a for a, b in pairs))
    ways = product(*(range(k + 1) for k in changed))
    far = sum(
        prod(map(comb, changed, up))
        for up in ways
        if abs(sum(2 * u - k for u, k in zip(up, changed, strict=True))) >= seen
    )
    lost, gained = zip(*pairs, strict=True)
    expected = far / 2 ** sum(changed)
    assert s.stratified_test(lost, gained, [9] * len(pairs)) == pytest.approx(expected)


def test_a_stratified_test_by_hand_and_of_tasks_of_any_size():
    """Two lost of 10, three of 20: -0.2 - 0.15; as far are that and its mirror: 2 of 32."""
    drawn = s.stratified_test([2, 3], [0, 0], [10, 20])
    # a share of 99,999 draws, whose standard deviation is 8e-4
    assert drawn == pytest.approx(2 / 32, abs=4e-3)
    assert drawn == s.stratified_test([2, 3], [0, 0], [10, 20])
    assert s.stratified_test([0, 0], [0, 0], [10, 20]) == 1


@pytest.mark.parametrize("sizes", [(80, 80, 80), (40, 90, 120)])
def test_the_stratified_test_has_its_size(sizes):
    """Of tasks where as many are lost as gained it rejects 5 % or less, and hardly less."""
    rng = np.random.default_rng(4)
    with mock.patch.object(s, "DRAWS", 999):
        p_values = [
            s.stratified_test(lost, changed - lost, sizes)
            for changed in rng.binomial(sizes, 0.3, (1500, 3))
            for lost in [rng.binomial(changed, 0.5)]
        ]
    # 0.05 with a standard deviation of 0.0056
    assert 0.025 <= np.mean(np.array(p_values) <= 0.05) <= 0.067


def test_what_is_detectable_is_detected_with_power():
    """Drops of just that size are found in 80 % of runs, with as many changes."""
    rng, n = np.random.default_rng(5), np.array([300, 300])
    drop = s.detectable([36, 36], [18, 18], n)
    change = 54 / 300
    found = 0
    for _ in range(600):
        lost = rng.binomial(n, (change + drop) / 2)
        gained = rng.binomial(n - lost, (change - drop) / 2 / (1 - (change + drop) / 2))
        found += s.stratified_test(lost, gained, n) <= 0.05
    # an approximation; 0.8 with a standard deviation of 0.016
    assert 0.74 <= found / 600 <= 0.86
