"""Intervals and exact tests of shares of right answers; numbers in, numbers out.

Does without `scipy.stats`: importing that takes longer than all that a small report computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache, reduce
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtrc, expit, logit, ndtr, ndtri, stdtr, stdtrit

ALPHA = 0.05  # level of the tests; the intervals cover 1 - ALPHA
POWER = 0.8
DRAWS = 99_999
_ALL = 7  # pairs whose permutations are all tried
_SURE = 82  # exponent of Hoeffding's inequality (1963), from which on no draw gets there
_SIGNS = 16  # clusters whose signs are all tried


def wilson(right: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of the share right / n (E. B. Wilson 1927, doi:10.2307/2276774).

    Not `scipy.stats.binomtest(...).proportion_ci`, to which it is equal: that takes whole numbers.

    Args:
        right: answers; divided by `design_effect` where questions share sources.
        n: questions, likewise.
    """
    z, share = float(-ndtri(ALPHA / 2)), float(right / n)
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # Rounding must not put the share itself outside: 0 of n and n of n lie on the interval's edge.
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


def binomial(n: int, p: float) -> np.ndarray:
    """(n + 1,) probability of 0, 1, ..., n successes of n, each of probability p.

    From the likeliest number to both sides by the ratio of neighbours, then divided by the sum:
    every term is the product of positive numbers, so that the relative error is of rounding alone.
    """
    if p in (0, 1):
        return np.asarray(np.eye(n + 1)[round(n * p)])
    k = np.arange(n)
    ratio = (n - k) / (k + 1) * (p / (1 - p))  # of k + 1 successes to k
    best = min(n, int((n + 1) * p))
    start = [1e280]  # the smallest terms are rounded once, at the end
    below, above = (
        np.cumprod([*start, *ratios]) for ratios in (1 / ratio[:best][::-1], ratio[best:])
    )
    terms = np.concatenate([below[:0:-1], above])
    return np.asarray(terms / terms.sum())


@cache
def fair(n: int) -> np.ndarray:
    """(n + 1,) probability of 0, 1, ..., n heads of n fair coins, each rounded once."""
    ways = [1]
    for k in range(n // 2):
        ways.append(ways[-1] * (n - k) // (k + 1))
    half = [way / 2**n for way in ways]  # of whole numbers of any size
    return np.array(half + half[: (n + 1) // 2][::-1])


def more_often(more: int, less: int) -> float:
    """One-sided p-value of `more` against `less` of pairs that differ (McNemar's exact test)."""
    return float(bdtrc(more - 1, more + less, 0.5))


def ranks(values: ArrayLike) -> np.ndarray:
    """Ranks along the last axis from 1 on, the mean of them for ties; NaN where a row has one."""
    return np.asarray(np.apply_along_axis(_ranks, -1, np.asarray(values, dtype=float)))


def _ranks(row: np.ndarray) -> np.ndarray:
    if np.isnan(row).any():
        return np.full(len(row), np.nan)
    there = np.sort(row)
    below, to = (np.searchsorted(there, row, side) for side in ("left", "right"))
    return np.asarray((below + to + 1) / 2)


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
    groups = (
        fair(int(n)) if p == 0.5 else binomial(n, p) for p, n in zip(values, counts, strict=True)
    )
    return reduce(np.convolve, groups)


def chance_test(right: int, chances: ArrayLike) -> float:
    """Exact two-sided p-value of `right` answers against guessing.

    As in `scipy.stats.binomtest`, which it equals where all chances are equal: the probability of
    all outcomes that are not likelier than the one observed, with the same tolerance for ties.
    """
    pmf = guessing(chances)
    return min(1.0, float(pmf[pmf <= pmf[right] * (1 + 1e-7)].sum()))


def tells_from_guessing(chances: ArrayLike) -> bool:
    """Whether so many questions tell a model half-way between guessing and perfect from guessing.

    That is: whether `chance_test` finds it at `ALPHA` with power `POWER`. With 10 questions of two
    choices it does not, and 8 right answers of them are no sign of guessing.

    Args:
        chances: (n,) probability to guess each question right.
    """
    guess = np.asarray(chances, dtype=float)
    pmf, half = guessing(guess), guessing((1 + guess) / 2)
    found = [
        right > guess.sum() and pmf[pmf <= pmf[right] * (1 + 1e-7)].sum() <= ALPHA
        for right in range(len(pmf))
    ]
    return bool(half[found].sum() >= POWER)


def sign_test(net: Sequence[ArrayLike], n: Sequence[int]) -> float:
    """Two-sided p-value of the mean over tasks of the net change: signs of clusters, by chance.

    Under the null hypothesis what changed in a cluster of questions was as likely to have changed
    the other way round; clusters are independent. With one question in each cluster and one task it
    is McNemar's exact test, with several tasks McNemar's test stratified. Changes that are no whole
    numbers make it Fisher's randomization test of paired differences. The distribution of the mean
    is exact where all tasks have the same `n` and count questions, and of numbers where at most
    `_SIGNS` clusters changed; else it is drawn, `DRAWS` times, always the same draws.

    Args:
        net: of each task, (clusters,) questions gained less those lost; or the sums over a cluster
            of the changes of its questions' scores.
        n: of each task, its questions.
    """
    changed = [np.asarray(changes, dtype=float) for changes in net]
    changed = [changes[changes != 0] for changes in changed]
    if not all(
        (changes == np.rint(changes)).all() and (np.abs(changes) <= size).all()
        for changes, size in zip(changed, n, strict=True)
    ):
        return _by_signs(
            np.concatenate([changes / k for changes, k in zip(changed, n, strict=True)])
        )
    changed = [changes.astype(int) for changes in changed]
    kinds = [np.unique(np.abs(changes), return_counts=True) for changes in changed]
    sums = np.array([changes.sum() for changes in changed])
    if len(set(n)) == 1:
        pmf = np.ones(1)  # of the sum over clusters plus its largest, in steps of one
        for size, count in (pair for kind in kinds for pair in zip(*kind, strict=True)):
            steps = np.zeros(2 * size * count + 1)
            steps[:: 2 * size] = fair(int(count))
            pmf = np.convolve(pmf, steps)
        far = np.abs(np.arange(len(pmf)) - len(pmf) // 2)
        return min(1.0, float(pmf[far >= abs(sums.sum())].sum()))
    counts = tuple(tuple(zip(*(part.tolist() for part in kind), strict=True)) for kind in kinds)
    return _by_draws(counts, tuple(n), abs(float((sums / np.array(n)).sum())))


@lru_cache(maxsize=256)  # a report tests the same change in its table and among the claims
def _by_draws(
    counts: tuple[tuple[tuple[int, int], ...], ...], n: tuple[int, ...], far: float
) -> float:
    """Two-sided p-value of a mean over tasks that is `far` from 0, by drawn signs.

    Args:
        counts: of each task, (size, clusters whose change is of that size).
        n: of each task, its questions.
        far: the distance.
    """
    squares = sum(
        count * (k / size) ** 2
        for of_task, size in zip(counts, n, strict=True)
        for k, count in of_task
    )
    if squares and far**2 / (2 * squares) > _SURE:
        return 1 / (DRAWS + 1)
    rng, drawn = np.random.default_rng(0), np.zeros(DRAWS)
    for of_task, size in zip(counts, n, strict=True):
        for k, count in of_task:
            drawn += k * (2 * rng.binomial(count, 0.5, DRAWS) - count) / size
    # with a little slack: the sums are of floats
    reached = np.count_nonzero(np.abs(drawn) >= far - 1e-12)
    return float((reached + 1) / (DRAWS + 1))


def _by_signs(terms: np.ndarray) -> float:
    """Two-sided p-value of the sum of (clusters,) numbers whose signs are a matter of chance."""
    if np.isnan(terms).any():
        return np.nan
    k, total = len(terms), terms.sum()
    enough = abs(total) - 1e-9 * np.abs(terms).sum()  # the sums are of floats
    if k <= _SIGNS:
        every = np.arange(2**k)[:, None] >> np.arange(k) & 1
        return float((np.abs(total - 2 * (every @ terms)) >= enough).mean())
    rng, reached, left = np.random.default_rng(0), 0, DRAWS
    while left:  # in parts: of 10,000 questions all draws at once would take gigabytes
        some = min(left, max(1, 10_000_000 // k))
        octets = rng.integers(256, size=(some, -(-k // 8)), dtype=np.uint8)
        turned = np.unpackbits(octets, axis=1, count=k)
        reached += int(np.count_nonzero(np.abs(total - 2 * (turned @ terms)) >= enough))
        left -= some
    return (reached + 1) / (DRAWS + 1)


def design_effect(values: ArrayLike, clusters: ArrayLike) -> float:
    """How many questions that share sources tell as much as one that shares none; at least 1.

    The variance of the mean by clusters over that of independent questions (Kish 1965), times the
    squared ratio of the quantiles of Student's t that belong to each (Korn and Graubard 1998).
    Shares whose counts are divided by it have intervals that allow for clusters (Dean and Pagano
    2015, doi:10.1093/jssam/smv024). Of values that are all equal: the mean size of a cluster.

    Args:
        values: (n,) numbers, of a question each.
        clusters: (n,) labels.
    """
    values, labels = np.asarray(values, dtype=float), np.unique(clusters, return_inverse=True)[1]
    n, k = len(values), labels.max() + 1
    if k == n or k == 1:  # nothing shared, or nothing to compare
        return 1.0
    away = values - values.mean()
    alone = (away**2).sum() / (n - 1) / n
    if alone == 0:
        return float(n / k)
    together = k / (k - 1) * (np.bincount(labels, away) ** 2).sum() / n**2
    quantile = 1 - ALPHA / 2
    return max(
        1.0, float(together / alone * (stdtrit(k - 1, quantile) / stdtrit(n - 1, quantile)) ** 2)
    )


def standard_error(values: ArrayLike, clusters: ArrayLike) -> float:
    """Standard error of the mean of (n,) numbers that clusters of questions share.

    NaN where it is not known: of one cluster, and where nothing varies.
    """
    variance = _variance_of_mean(values, clusters)
    return float(np.sqrt(variance)) if variance > 0 else np.nan


def _variance_of_mean(values: ArrayLike, clusters: ArrayLike) -> float:
    """Of Liang and Zeger 1986, by the sums of clusters; NaN of one cluster."""
    numbers = np.asarray(values, dtype=float)
    labels = np.unique(clusters, return_inverse=True)[1]
    k = labels.max() + 1
    sums = np.bincount(labels, numbers - numbers.mean())
    return k / (k - 1) * (sums**2).sum() / len(numbers) ** 2 if k > 1 else np.nan


class Mean(NamedTuple):
    """A mean with its 95 % interval, and the p-value of its being 0."""

    value: float
    low: float
    high: float
    p_value: float


def mean_of(tasks: Sequence[tuple[ArrayLike, ArrayLike]]) -> Mean:
    """The mean over tasks of the mean of numbers that clusters of questions share, by Student's t.

    Its error is that of means of clusters (Liang and Zeger 1986), its degrees of freedom are
    Satterthwaite's (1946). NaN for interval and test where a task has less than two clusters.

    Args:
        tasks: of each, (n,) numbers and (n,) labels of clusters.
    """
    means, errors, freedom = [], [], []
    for values, clusters in tasks:
        means.append(np.asarray(values, dtype=float).mean())
        errors.append(_variance_of_mean(values, clusters))
        freedom.append(len(np.unique(clusters)) - 1)
    value, variance = float(np.mean(means)), np.array(errors)
    error = float(np.sqrt(variance.sum()) / len(means))
    if not error > 0:  # nothing varies, or it is not known whether anything does
        return Mean(value, value + error, value + error, error if error else float(value == 0))
    k = variance.sum() ** 2 / (variance**2 / freedom).sum()
    half = float(stdtrit(k, 1 - ALPHA / 2)) * error
    return Mean(value, value - half, value + half, float(2 * stdtr(k, -abs(value) / error)))


def paired_error(lost: ArrayLike, gained: ArrayLike, n: ArrayLike) -> Any:
    """Standard error of (gained - lost) / n, a difference of two shares of the same n questions.

    One question more is counted as lost, and one as gained, as in `paired_interval`: where none
    changed, the error is not 0.
    """
    down, up, sizes = (np.asarray(x, dtype=float) for x in (lost, gained, n))
    a, b = (down + 1) / (sizes + 2), (up + 1) / (sizes + 2)
    return np.sqrt((a + b - (a - b) ** 2) / (sizes + 2))


def detectable(errors: ArrayLike) -> float:
    """The smallest mean over tasks of paired differences that is found with power 0.8.

    By a two-sided test at `ALPHA` of the same questions, if they vary as here (for counts: Connor
    1987, whose variance under the alternative `paired_error` is).

    Args:
        errors: (tasks,) standard errors of each task's difference.
    """
    return float((ndtri(1 - ALPHA / 2) + ndtri(POWER)) * error_of_mean(errors))


def planned(sizes: ArrayLike, discordance: float) -> float:
    """The smallest drop of the mean over tasks that a run of so many questions will show.

    As `detectable`, before anything is computed (R. J. Connor 1987, doi:10.2307/2531961, without
    the term of the second order): a share `discordance` of the questions is assumed to change, or
    as many as the drop itself needs.

    Args:
        sizes: (tasks,) questions of each task, independent of each other.
        discordance: share of the questions whose answer changes, lost and gained.

    Returns:
        A share; 1 or more: no drop is found.
    """
    n = np.asarray(sizes, dtype=float)
    drop = detectable(np.sqrt(discordance / n))
    return drop if drop <= discordance else detectable(np.sqrt(1 / n)) ** 2


def error_of_mean(errors: ArrayLike) -> Any:
    """Standard error of the mean over tasks (the last axis), from those of each task."""
    each = np.asarray(errors, dtype=float)
    return np.sqrt((each**2).sum(-1)) / each.shape[-1]


def equivalence_test(difference: ArrayLike, error: ArrayLike, within: float) -> Any:
    """p-value of the claim that a difference is not beyond `within`.

    The larger of the two one-sided tests of Schuirmann 1987 (TOST), each of a normal distribution:
    that the difference is not above -within, and that it is not below within. Rejecting both is
    evidence of equivalence, which a difference that is not significant is not.

    Args:
        difference: (...) differences, as shares.
        error: (...) their standard errors.
        within: a share, above 0.

    Returns:
        (...) p-values; NaN where the error is.
    """
    return ndtr((np.abs(difference) - within) / np.asarray(error, dtype=float))


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


def spearman(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """Spearman's rank correlations of (..., n) and (..., n), (...,); NaN where one is constant.

    Not `scipy.stats.spearmanr`, which takes one pair of rows at a time and tests it.
    """
    a, b = (of - of.mean(-1, keepdims=True) for of in (ranks(of) for of in (x, y)))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.asarray(np.clip(correlation, -1, 1))


def auroc(values: ArrayLike, larger: ArrayLike) -> np.ndarray:
    """Areas under the ROC curve, (...,), from the rank sums of Mann and Whitney; ties count half.

    Args:
        values: (..., n) numbers.
        larger: (..., n) 1 for those that are claimed to be the larger ones, and 0 for the others.
    """
    larger = np.asarray(larger)
    upper, n = larger.sum(-1), larger.shape[-1]
    sums = (ranks(values) * larger).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((sums - upper * (upper + 1) / 2) / (upper * (n - upper)))


def rank_correlation(x: ArrayLike, y: ArrayLike) -> Mean:
    """Spearman's rank correlation with its 95 % interval, and the p-value of there being none.

    The interval is `rank_interval`; the p-value is exact, by permutation, of up to seven pairs,
    else drawn, always the same draws. NaN where all x or all y are equal, or of fewer than four
    pairs.

    Args:
        x: (n,) numbers.
        y: (n,) numbers.
    """
    first, second = (ranks(values) for values in (x, y))
    n = len(first)
    if n < 4 or len(set(first)) == 1 or len(set(second)) == 1:
        return Mean(*4 * (np.nan,))
    value = float(spearman(first, second))
    low, high = rank_interval(value, n)
    orders = _orders(n)
    away = (first - first.mean()) @ (second - second.mean())
    drawn = (first - first.mean())[orders] @ (second - second.mean())
    reached = np.count_nonzero(np.abs(drawn) >= abs(away) - 1e-9)
    counted = 0 if n <= _ALL else 1  # of draws, the one that was seen counts as well
    p_value = (reached + counted) / (len(orders) + counted)
    return Mean(value, float(low), float(high), float(p_value))


@lru_cache(maxsize=1)  # tens of megabytes; the conditions of a comparison have as many models
def _orders(n: int) -> np.ndarray:
    """Permutations of n numbers, a row for each: all of few, `DRAWS` of more."""
    if n <= _ALL:
        return np.array(list(permutations(range(n))))
    return np.random.default_rng(0).permuted(np.tile(np.arange(n), (DRAWS, 1)), axis=1)


def auc(smaller: ArrayLike, larger: ArrayLike) -> Mean:
    """Probability that a number of the one sample is below one of the other; ties count half.

    With its 95 % interval on the scale of log odds, from the variance of DeLong et al. 1988; the
    p-value is that of its being a half (Brunner and Munzel 2000, normal). NaN for both where either
    sample has but one number.

    Args:
        smaller: (n,) numbers that are claimed to be the smaller ones.
        larger: (m,) the others.
    """
    x, y = (np.asarray(values, dtype=float) for values in (smaller, larger))
    n, m = len(x), len(y)
    together, alone = ranks(np.concatenate([x, y])), (ranks(x), ranks(y))
    # of each number, the share of the other sample on its right side
    of_x = 1 - (together[:n] - alone[0]) / m
    of_y = (together[n:] - alone[1]) / n
    value = float(auroc(np.concatenate([x, y]), np.repeat([0, 1], [n, m])))
    if n < 2 or m < 2:
        return Mean(value, *3 * (np.nan,))
    # half a pair keeps apart from 0 and 1, where the variance is 0
    error = np.sqrt(of_x.var(ddof=1) / n + of_y.var(ddof=1) / m + 0.25 / (n * m) ** 2)
    kept = np.clip(value, 0.5 / (n * m), 1 - 0.5 / (n * m))
    half = ndtri(1 - ALPHA / 2) * error / (kept * (1 - kept))
    low, high = (expit(logit(kept) + sign * half) for sign in (-1, 1))
    p_value = float(2 * ndtr(-abs(value - 0.5) / error))
    return Mean(value, min(float(low), value), max(float(high), value), p_value)


def rank_interval(value: ArrayLike, n: int) -> tuple[Any, Any]:
    """95 % interval of Spearman's rank correlation of n pairs, 4 or more.

    Of Fisher's z with the variance of Bonett and Wright 2000 (doi:10.1007/BF02294183). Of a
    perfect correlation it is that alone.
    """
    bounded = np.clip(np.asarray(value, dtype=float), -1, 1)
    half = ndtri(1 - ALPHA / 2) * np.sqrt((1 + bounded**2 / 2) / (n - 3))
    with np.errstate(divide="ignore"):
        middle = np.arctanh(bounded)
    return np.tanh(middle - half), np.tanh(middle + half)


def paired_interval(lost: float, gained: float, n: float) -> tuple[float, float]:
    """95 % interval of the difference (gained - lost) / n of two shares of the same n questions.

    All three are divided by `design_effect` where questions share sources. Wald's interval after
    one more question is lost and one more gained: Bonett and Price 2012, recommended by Fagerland,
    Lydersen and Laake 2014 (doi:10.1002/sim.6148).
    """
    down, up = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = ndtri(1 - ALPHA / 2) * np.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, float(up - down - half)), min(1.0, float(up - down + half))


def mean_interval(values: ArrayLike, low: ArrayLike, high: ArrayLike) -> tuple[float, float]:
    """Interval of the mean of independent estimates, from their own intervals.

    The distances to the lower ends are added in squares, and so are those to the upper ends (the
    method of variance estimates recovery: Zou and Donner 2008). Of one estimate: its own interval.
    """
    values = np.asarray(values, dtype=float)
    down, up = (np.linalg.norm(values - end) / len(values) for end in (low, high))
    return float(values.mean() - down), float(values.mean() + up)
