"""Rising and falling values: against scipy's Kendall, its exact moments, and drawn curves."""

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from llm_attack.vision.trends import trend, verdict


def test_the_mean_over_seeds_of_kendalls_correlation():
    curves = np.random.default_rng(0).random((4, 9))
    taus = [stats.kendalltau(range(9), curve).statistic for curve in curves]
    value, low, high = trend(curves)
    assert value == pytest.approx(np.mean(taus))
    wide = stats.t.interval(0.95, 3, np.mean(taus), stats.sem(taus))
    assert (low, high) == pytest.approx(wide)


def test_random_order_has_the_variance_of_all_orders():
    """Of one seed, and where seeds agree; six epochs have 720 orders."""
    squares = [trend([order])[0] ** 2 for order in permutations(range(6))]
    half = 1.959964 * np.mean(squares) ** 0.5
    value, low, high = trend([[1, 2, 3, 4, 6, 5]])
    assert value == pytest.approx(13 / 15) and (low, high) == (pytest.approx(value - half), 1)
    value, low, high = trend(3 * [[6, 4, 5, 3, 1, 2]])
    assert (value, low, high) == (
        pytest.approx(-11 / 15),
        -1,
        pytest.approx(-11 / 15 + half / 3**0.5),
    )


def test_what_does_not_change_and_what_is_short():
    assert (
        trend(np.zeros((3, 5)))[0] == 0
        and verdict(*trend(np.zeros((3, 5)))[1:]) == "cannot be told"
    )
    assert trend([[0, 0, 1]])[0] == pytest.approx(2 / 3)  # ties are neither
    found = trend([[0.5], [0.6]])
    assert np.isnan(found).all() and verdict(*found[1:]) == "cannot be told"


def test_verdicts():
    rising = np.arange(8) + np.zeros((3, 1))
    assert verdict(*trend(rising)[1:]) == "rises" and verdict(*trend(-rising)[1:]) == "falls"
    assert (
        verdict(*trend(rising[:, :2])[1:]) == "cannot be told"
    )  # of eight orders of three seeds, two are as far
    assert verdict(*trend([*rising[:2], -rising[0]])[1:]) == "cannot be told"  # a seed disagrees


def test_the_interval_covers():
    """Curves without a trend: it is found in a twentieth of them at most; five sigma aside."""
    draws = np.random.default_rng(1).random((400, 3, 8))
    wrong = sum(verdict(*trend(curves)[1:]) != "cannot be told" for curves in draws)
    assert wrong <= 20 + 5 * (400 * 0.05 * 0.95) ** 0.5
