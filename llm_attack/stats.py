"""Intervals and exact tests for shares of right answers. Numbers in, numbers out.

The module avoids `scipy.stats`, because its import takes longer than a small report computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache, reduce
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtrc, betaincinv, expit, logit, ndtr, ndtri, stdtr, stdtrit

ALPHA = 0.05  # level of the tests; intervals cover 1 - ALPHA
POWER = 0.8
DRAWS = 99_999
_ALL = 7  # with at most so many pairs, all permutations are tried
_SURE = 82  # exponent of Hoeffding's inequality (1963) above which no draw is so extreme
_SIGNS = 16  # with at most so many clusters, all signs are tried


def wilson(right: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of the share right / n (E. B. Wilson 1927, doi:10.2307/2276774).

    `scipy.stats.binomtest(...).proportion_ci` gives the same, but takes only whole numbers.

    Args:
        right: number of right answers, divided by `design_effect` if questions share sources.
        n: number of questions, divided by the same.
    """
    z, share = float(-ndtri(ALPHA / 2)), float(right / n)
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # Rounding must not exclude the share itself: 0 of n and n of n are ends of the interval.
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


def least_share(hits: ArrayLike, n: ArrayLike, level: float) -> np.ndarray:
    """Lower confidence bound of a share: Clopper and Pearson (1934), one-sided.

    The true share is below the bound with a probability of at most `level`.
    `scipy.stats.binomtest(..., alternative="greater").proportion_ci` gives the same.

    Args:
        hits: number of hits.
        n: number of independent draws.
        level: the probability of an error, above 0 and below 1.
    """
    hits, n = np.asarray(hits, dtype=float), np.asarray(n, dtype=float)
    bound = betaincinv(np.maximum(hits, 1), n - hits + 1, level)
    return np.asarray(np.where(hits > 0, bound, 0.0))


def binomial(n: int, p: float) -> np.ndarray:
    """(n + 1,) probability of 0, 1, ..., n successes in n trials, each with probability p.

    The computation starts at the likeliest number, multiplies by ratios of neighbours in both
    directions, and divides by the sum. Every term is a product of positive numbers, so its relative
    error is only that of rounding.
    """
    if p in (0, 1):
        return np.asarray(np.eye(n + 1)[round(n * p)])
    k = np.arange(n)
    ratio = (n - k) / (k + 1) * (p / (1 - p))  # of k + 1 successes to k
    best = min(n, int((n + 1) * p))
    start = [1e280]  # so the smallest terms are rounded only once, at the end
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
    whole = 2**n
    half = [way / whole for way in ways]  # integers of any size
    return np.array(half + half[: (n + 1) // 2][::-1])


def more_often(more: int, less: int) -> float:
    """One-sided p-value of McNemar's exact test: `more` against `less` of pairs that differ."""
    return float(bdtrc(more - 1, more + less, 0.5))


def ranks(values: ArrayLike) -> np.ndarray:
    """Ranks along the last axis, from 1. Ties get their mean rank; rows with a NaN get NaN."""
    return np.asarray(np.apply_along_axis(_ranks, -1, np.asarray(values, dtype=float)))


def _ranks(row: np.ndarray) -> np.ndarray:
    if np.isnan(row).any():
        return np.full(len(row), np.nan)
    there = np.sort(row)
    below, to = (np.searchsorted(there, row, side) for side in ("left", "right"))
    return np.asarray((below + to + 1) / 2)


def guessing(chances: ArrayLike) -> np.ndarray:
    """Distribution of the number of right answers if every question is guessed.

    This is the Poisson binomial distribution. Benchmarks have few different numbers of choices. So
    it is a convolution of one binomial distribution for each. All terms are positive, so nothing
    cancels.

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
    """Exact two-sided p-value of the number of `right` answers against guessing.

    It is the probability of all outcomes that are not likelier than the observed one, as in
    `scipy.stats.binomtest` and with its tolerance for ties. If all chances are equal, both agree.
    """
    pmf = guessing(chances)
    return min(1.0, float(pmf[pmf <= pmf[right] * (1 + 1e-7)].sum()))


def tells_from_guessing(chances: ArrayLike) -> bool:
    """Whether these questions suffice to distinguish a half-good model from guessing.

    A half-good model is half-way between guessing and perfect. The questions suffice if
    `chance_test` finds it at `ALPHA` with power `POWER`. Ten questions with two choices do not, so
    8 right answers out of 10 are no sign of guessing.

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
    """Two-sided p-value of the net change (mean over tasks), by random signs of clusters.

    Null hypothesis: clusters of questions are independent, and each could as well have changed the
    other way round. With one question per cluster, this is McNemar's exact test for one task, and
    the stratified test of McNemar for several. If changes are not whole numbers, it is Fisher's
    randomization test of paired differences.

    For counts, the distribution of the mean is exact if all tasks have the same `n`. For other
    numbers, it is exact if at most `_SIGNS` clusters changed. Otherwise it is drawn `DRAWS` times,
    always with the same draws.

    Args:
        net: for each task, (clusters,) number of questions gained minus lost, or sum of the changes
            of a cluster's scores.
        n: for each task, its number of questions.
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
        pmf = np.ones(1)  # of the sum over clusters, from its smallest value, in steps of one
        for size, count in (pair for kind in kinds for pair in zip(*kind, strict=True)):
            steps = np.zeros(2 * size * count + 1)
            steps[:: 2 * size] = fair(int(count))
            pmf = np.convolve(pmf, steps)
        far = np.abs(np.arange(len(pmf)) - len(pmf) // 2)
        return min(1.0, float(pmf[far >= abs(sums.sum())].sum()))
    counts = tuple(tuple(zip(*(part.tolist() for part in kind), strict=True)) for kind in kinds)
    return _by_draws(counts, tuple(n), abs(float((sums / np.array(n)).sum())))


@lru_cache(maxsize=256)  # a report tests the same change for its table and for the claims
def _by_draws(
    counts: tuple[tuple[tuple[int, int], ...], ...], n: tuple[int, ...], far: float
) -> float:
    """Two-sided p-value, by drawn signs, of a mean over tasks at a distance from 0.

    Args:
        counts: for each task, (size of the change, number of clusters with this size).
        n: for each task, its number of questions.
        far: the distance from 0.
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
    # with a small tolerance, because the sums are floats
    reached = np.count_nonzero(np.abs(drawn) >= far - 1e-12)
    return float((reached + 1) / (DRAWS + 1))


def _by_signs(terms: np.ndarray) -> float:
    """Two-sided p-value of the sum of (clusters,) numbers whose signs are random."""
    if np.isnan(terms).any():
        return np.nan
    k, total = len(terms), terms.sum()
    enough = abs(total) - 1e-9 * np.abs(terms).sum()  # the sums are floats
    if k <= _SIGNS:
        every = np.arange(2**k)[:, None] >> np.arange(k) & 1
        return float((np.abs(total - 2 * (every @ terms)) >= enough).mean())
    rng, reached, left = np.random.default_rng(0), 0, DRAWS
    while left:  # in parts, because for 10,000 questions all draws at once would take gigabytes
        some = min(left, max(1, 10_000_000 // k))
        octets = rng.integers(256, size=(some, -(-k // 8)), dtype=np.uint8)
        turned = np.unpackbits(octets, axis=1, count=k)
        reached += int(np.count_nonzero(np.abs(total - 2 * (turned @ terms)) >= enough))
        left -= some
    return (reached + 1) / (DRAWS + 1)


def design_effect(values: ArrayLike, clusters: ArrayLike) -> float:
    """The number of questions with shared sources that one independent question is worth.

    It is the variance of the mean with clusters, divided by that of independent questions (Kish
    1965), times the squared ratio of the matching quantiles of Student's t (Korn and Graubard
    1998); at least 1. If counts are divided by it, intervals of shares allow for clusters (Dean and
    Pagano 2015, doi:10.1093/jssam/smv024). If all values are equal, it is the mean size of a
    cluster.

    Args:
        values: (n,) numbers, one per question.
        clusters: (n,) labels.
    """
    values, labels = np.asarray(values, dtype=float), np.unique(clusters, return_inverse=True)[1]
    n, k = len(values), labels.max() + 1
    if k == n or k == 1:  # nothing is shared, or there is nothing to compare
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
    """Standard error of the mean of (n,) numbers, if questions share clusters.

    NaN if it is not known, because there is one cluster or because nothing varies.
    """
    variance = _variance_of_mean(values, clusters)
    return float(np.sqrt(variance)) if variance > 0 else np.nan


def _variance_of_mean(values: ArrayLike, clusters: ArrayLike) -> float:
    """Variance of Liang and Zeger 1986, from the sums of clusters; NaN for one cluster."""
    numbers = np.asarray(values, dtype=float)
    labels = np.unique(clusters, return_inverse=True)[1]
    k = labels.max() + 1
    sums = np.bincount(labels, numbers - numbers.mean())
    return k / (k - 1) * (sums**2).sum() / len(numbers) ** 2 if k > 1 else np.nan


class Mean(NamedTuple):
    """A mean with its 95 % interval, and the p-value of the hypothesis that it is 0."""

    value: float
    low: float
    high: float
    p_value: float


def mean_of(tasks: Sequence[tuple[ArrayLike, ArrayLike]]) -> Mean:
    """The mean over tasks of means of clustered numbers, by Student's t.

    The error comes from means of clusters (Liang and Zeger 1986), with the degrees of freedom of
    Satterthwaite (1946). Interval and test are NaN if a task has fewer than two clusters.

    Args:
        tasks: for each task, (n,) numbers and (n,) labels of clusters.
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

    As in `paired_interval`, one lost and one gained question are added. So the error is not 0 if no
    question changed.
    """
    down, up, sizes = (np.asarray(x, dtype=float) for x in (lost, gained, n))
    a, b = (down + 1) / (sizes + 2), (up + 1) / (sizes + 2)
    return np.sqrt((a + b - (a - b) ** 2) / (sizes + 2))


def detectable(errors: ArrayLike) -> float:
    """The smallest mean over tasks of paired differences that a test finds with power 0.8.

    This is for a two-sided test at `ALPHA` of the same questions, if they vary as here. For counts
    see Connor 1987; his variance under the alternative is `paired_error`.

    Args:
        errors: (tasks,) standard error of each task's difference.
    """
    return float((ndtri(1 - ALPHA / 2) + ndtri(POWER)) * error_of_mean(errors))


def planned(sizes: ArrayLike, discordance: float) -> float:
    """The smallest drop (mean over tasks) that a run with these numbers of questions will show.

    Like `detectable`, but before anything is computed (R. J. Connor 1987, doi:10.2307/2531961,
    without the second-order term). It assumes that a share `discordance` of the questions changes,
    or as many as the drop itself needs.

    Args:
        sizes: (tasks,) number of independent questions of each task.
        discordance: share of the questions whose answer changes, lost and gained together.

    Returns:
        A share. If it is 1 or more, the run shows no drop.
    """
    n = np.asarray(sizes, dtype=float)
    drop = detectable(np.sqrt(discordance / n))
    return drop if drop <= discordance else detectable(np.sqrt(1 / n)) ** 2


def error_of_mean(errors: ArrayLike) -> Any:
    """Standard error of the mean over tasks (the last axis), from those of each task."""
    each = np.asarray(errors, dtype=float)
    return np.sqrt((each**2).sum(-1)) / each.shape[-1]


def equivalence_test(difference: ArrayLike, error: ArrayLike, within: float) -> Any:
    """p-value of equivalence; if it is small, the difference is shown to be within the margin.

    It is the larger of the two one-sided tests of Schuirmann 1987 (TOST), with normal
    distributions. Their null hypotheses are that the difference is at most -within, and that it is
    at least within. Rejecting both is evidence of equivalence. A difference that is not significant
    is no such evidence.

    Args:
        difference: (...) differences, as shares.
        error: (...) their standard errors.
        within: the margin, a share above 0.

    Returns:
        (...) p-values; NaN if the error is NaN.
    """
    return ndtr((np.abs(difference) - within) / np.asarray(error, dtype=float))


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's adjusted p-values. NaN stays NaN and does not count as a test.

    `statsmodels.stats.multitest.multipletests` gives the same. But it collects garbage at every
    call, which takes 0.3 s if models and data sets are loaded.
    """
    adjusted = np.array(p_values, dtype=float)
    order = np.argsort(adjusted)[: np.count_nonzero(~np.isnan(adjusted))]  # NaN is sorted last
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(adjusted[order] * factors))
    return adjusted


def spearman(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """Spearman's rank correlations (...,) of (..., n) and (..., n); NaN if one is constant.

    `scipy.stats.spearmanr` takes only one pair of rows at a time and also tests it.
    """
    a, b = (of - of.mean(-1, keepdims=True) for of in (ranks(of) for of in (x, y)))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.asarray(np.clip(correlation, -1, 1))


def auroc(values: ArrayLike, larger: ArrayLike) -> np.ndarray:
    """Areas (...,) under the ROC curve, from the rank sums of Mann and Whitney. Ties count half.

    Args:
        values: (..., n) numbers.
        larger: (..., n) 1 for numbers that should be larger, and 0 for the others.
    """
    larger = np.asarray(larger)
    upper, n = larger.sum(-1), larger.shape[-1]
    sums = (ranks(values) * larger).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((sums - upper * (upper + 1) / 2) / (upper * (n - upper)))


def rank_correlation(x: ArrayLike, y: ArrayLike) -> Mean:
    """Spearman's rank correlation with its 95 % interval, and the p-value of no correlation.

    The interval is `rank_interval`. The p-value is from permutations: all of them for up to seven
    pairs (exact), and otherwise drawn ones, always the same. NaN if all x or all y are equal, or if
    there are fewer than four pairs.

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
    counted = 0 if n <= _ALL else 1  # the observed order counts as one of the draws
    p_value = (reached + counted) / (len(orders) + counted)
    return Mean(value, float(low), float(high), float(p_value))


@lru_cache(maxsize=1)  # tens of megabytes; the conditions of a comparison share them
def _orders(n: int) -> np.ndarray:
    """Permutations of n numbers, one per row: all if n is small, and else `DRAWS` random ones."""
    if n <= _ALL:
        return np.array(list(permutations(range(n))))
    return np.random.default_rng(0).permuted(np.tile(np.arange(n), (DRAWS, 1)), axis=1)


def auc(smaller: ArrayLike, larger: ArrayLike) -> Mean:
    """Probability that a number of one sample is below a number of the other. Ties count half.

    The 95 % interval is on the scale of log odds, with the variance of DeLong et al. 1988. The
    p-value is for the hypothesis that the probability is a half (Brunner and Munzel 2000, normal).
    Both are NaN if a sample has only one number.

    Args:
        smaller: (n,) numbers that should be smaller.
        larger: (m,) the other numbers.
    """
    x, y = (np.asarray(values, dtype=float) for values in (smaller, larger))
    n, m = len(x), len(y)
    together, alone = ranks(np.concatenate([x, y])), (ranks(x), ranks(y))
    # for each number, the share of the other sample on its right side
    of_x = 1 - (together[:n] - alone[0]) / m
    of_y = (together[n:] - alone[1]) / n
    value = float(auroc(np.concatenate([x, y]), np.repeat([0, 1], [n, m])))
    if n < 2 or m < 2:
        return Mean(value, *3 * (np.nan,))
    # half a pair keeps the value away from 0 and 1, where the variance is 0
    error = np.sqrt(of_x.var(ddof=1) / n + of_y.var(ddof=1) / m + 0.25 / (n * m) ** 2)
    kept = np.clip(value, 0.5 / (n * m), 1 - 0.5 / (n * m))
    half = ndtri(1 - ALPHA / 2) * error / (kept * (1 - kept))
    low, high = (expit(logit(kept) + sign * half) for sign in (-1, 1))
    p_value = float(2 * ndtr(-abs(value - 0.5) / error))
    return Mean(value, min(float(low), value), max(float(high), value), p_value)


def rank_interval(value: ArrayLike, n: int) -> tuple[Any, Any]:
    """95 % interval of Spearman's rank correlation of n pairs; n must be 4 or more.

    It uses Fisher's z with the variance of Bonett and Wright 2000 (doi:10.1007/BF02294183). The
    interval of a perfect correlation is a single point.
    """
    bounded = np.clip(np.asarray(value, dtype=float), -1, 1)
    half = ndtri(1 - ALPHA / 2) * np.sqrt((1 + bounded**2 / 2) / (n - 3))
    with np.errstate(divide="ignore"):
        middle = np.arctanh(bounded)
    return np.tanh(middle - half), np.tanh(middle + half)


def paired_interval(lost: float, gained: float, n: float) -> tuple[float, float]:
    """95 % interval of the difference (gained - lost) / n of two shares of the same n questions.

    If questions share sources, divide all three arguments by `design_effect`. It is Wald's interval
    after adding one lost and one gained question (Bonett and Price 2012). Fagerland, Lydersen and
    Laake 2014 recommend it (doi:10.1002/sim.6148).
    """
    down, up = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = ndtri(1 - ALPHA / 2) * np.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, float(up - down - half)), min(1.0, float(up - down + half))


def mean_interval(values: ArrayLike, low: ArrayLike, high: ArrayLike) -> tuple[float, float]:
    """Interval of the mean of independent estimates, from their own intervals.

    Squared distances to the lower ends are added, and so are those to the upper ends (method of
    variance estimates recovery: Zou and Donner 2008). One estimate keeps its own interval.
    """
    values = np.asarray(values, dtype=float)
    down, up = (np.linalg.norm(values - end) / len(values) for end in (low, high))
    return float(values.mean() - down), float(values.mean() + up)
