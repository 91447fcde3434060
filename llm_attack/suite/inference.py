"""Intervals and exact tests of shares of right answers; numbers in, numbers out."""

from __future__ import annotations

from functools import reduce

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binom, norm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

ALPHA = 0.05  # level of the tests; the intervals cover 1 - ALPHA
POWER = 0.8
DRAWS = 99_999


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share right / n (E. B. Wilson 1927)."""
    low, high = proportion_confint(right, n, alpha=ALPHA, method="wilson")
    # Rounding must not put the share itself outside: 0 of n and n of n lie on the interval's edge.
    return max(0.0, min(low, right / n)), min(1.0, max(high, right / n))


def guessing(chances: ArrayLike) -> np.ndarray:
    """Distribution of the number of right answers when every question is guessed.

    The Poisson binomial distribution. Benchmarks have few different numbers of choices: one
    binomial distribution for each, convolved. All terms are positive, so nothing cancels.

    Args:
        chances: (n,) probability to guess each question right.

    Returns:
        (n + 1,) probability of 0, 1, ..., n right answers.
    """
    values, counts = np.unique(np.asarray(chances, dtype=float), return_counts=True)
    groups = (binom.pmf(np.arange(n + 1), n, p) for p, n in zip(values, counts, strict=True))
    return reduce(np.convolve, groups)


def chance_test(right: int, chances: ArrayLike) -> float:
    """Exact two-sided p-value of `right` answers against guessing.

    As in `scipy.stats.binomtest`, which it equals where all chances are equal: the probability of
    all outcomes that are not likelier than the one observed, with the same tolerance for ties.
    """
    pmf = guessing(chances)
    return min(1.0, float(pmf[pmf <= pmf[right] * (1 + 1e-7)].sum()))


def mcnemar_test(lost: int, gained: int) -> float:
    """Exact p-value of McNemar's test: are `lost` and `gained` questions halves of their sum?"""
    return float(mcnemar([[0, lost], [gained, 0]], exact=True).pvalue)


def stratified_test(lost: ArrayLike, gained: ArrayLike, n: ArrayLike) -> float:
    """Two-sided p-value of the mean over tasks of (gained - lost) / n: McNemar's test, stratified.

    Under the null hypothesis each question that changed was as likely to be lost as gained. The
    distribution of the mean is exact, a convolution of binomials, where all tasks have the same
    `n`; else it is drawn, `DRAWS` times, always the same draws. Of one task it is McNemar's test.

    Args:
        lost: (tasks,) questions right before alone.
        gained: (tasks,) questions right after alone.
        n: (tasks,) questions.
    """
    down, up, sizes = (np.asarray(x, dtype=int) for x in (lost, gained, n))
    changed = down + up
    if len(set(sizes.tolist())) == 1:
        halves = (binom.pmf(np.arange(k + 1), k, 0.5) for k in changed)
        pmf = reduce(np.convolve, halves)
        far = np.abs(2 * np.arange(len(pmf)) - changed.sum())
        return min(1.0, float(pmf[far >= abs((up - down).sum())].sum()))
    heads = np.random.default_rng(0).binomial(changed, 0.5, (DRAWS, len(changed)))
    drawn = np.abs(((2 * heads - changed) / sizes).sum(1))
    # with a little slack: the sums are of floats
    reached = np.count_nonzero(drawn >= abs(((up - down) / sizes).sum()) - 1e-12)
    return float((reached + 1) / (DRAWS + 1))


def detectable(lost: ArrayLike, gained: ArrayLike, n: ArrayLike) -> float:
    """The smallest mean over tasks of (lost - gained) / n that is found with power 0.8.

    By a two-sided paired test at `ALPHA` of the same questions, if as many change as here (Connor
    1987, whose variance under the alternative this is). One question more is counted as lost, and
    one as gained, in each task, as in `paired_interval`: where none changed, the power is not 1.
    """
    down, up, sizes = (np.asarray(x, dtype=float) for x in (lost, gained, n))
    a, b = (down + 1) / (sizes + 2), (up + 1) / (sizes + 2)
    variance = ((a + b - (a - b) ** 2) / (sizes + 2)).sum() / len(sizes) ** 2
    return float((norm.ppf(1 - ALPHA / 2) + norm.ppf(POWER)) * np.sqrt(variance))


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's adjusted p-values; NaN stays NaN and does not count as a test.

    Not `statsmodels.stats.multitest.multipletests`, to which it is equal: that collects garbage at
    every call, which takes 0.3 s beside loaded models and data sets.
    """
    adjusted = np.array(p_values, dtype=float)
    order = np.argsort(adjusted)[: np.count_nonzero(~np.isnan(adjusted))]  # NaN is sorted last
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(adjusted[order] * factors))
    return adjusted


def paired_interval(lost: int, gained: int, n: int) -> tuple[float, float]:
    """95 % interval of the difference (gained - lost) / n of two shares of the same n questions.

    Wald's interval after one more question is lost and one more gained: Bonett and Price 2012,
    recommended by Fagerland, Lydersen and Laake 2014 (doi:10.1002/sim.6148).
    """
    down, up = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = norm.ppf(1 - ALPHA / 2) * np.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, float(up - down - half)), min(1.0, float(up - down + half))


def mean_interval(values: ArrayLike, low: ArrayLike, high: ArrayLike) -> tuple[float, float]:
    """Interval of the mean of independent estimates, from their own intervals.

    The distances to the lower ends are added in squares, and so are those to the upper ends (the
    method of variance estimates recovery: Zou and Donner 2008). Of one estimate: its own interval.
    """
    values = np.asarray(values, dtype=float)
    down, up = (np.linalg.norm(values - end) / len(values) for end in (low, high))
    return float(values.mean() - down), float(values.mean() + up)
