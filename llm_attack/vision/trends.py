"""Whether an accuracy rises or falls over the epochs, for networks with different seeds."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm, t

from llm_attack.stats import ALPHA


def trend(curves: ArrayLike) -> tuple[float, float, float]:
    """Kendall's rank correlation (tau-a) of epoch and value, mean over seeds, with a 95 % interval.

    It is the share of pairs of epochs between which the value rises, minus the share between which
    it falls. The interval is the wider one of two. One is Student's t over the seeds. The other is
    for a mean of as many correlations of values in random order (Kendall 1938), which also holds if
    seeds agree.

    Args:
        curves: (seeds, epochs) values.

    Returns:
        The mean and the ends of the interval, in [-1, 1]; NaN for fewer than two epochs. One seed
            has only the interval of random order.
    """
    values = np.asarray(curves, dtype=float)
    seeds, n = values.shape
    if n < 2:
        return math.nan, math.nan, math.nan
    before, after = np.triu_indices(n, 1)
    of_seeds = np.sign(values[:, after] - values[:, before]).mean(1)
    half = norm.ppf(1 - ALPHA / 2) * math.sqrt((4 * n + 10) / (9 * n * (n - 1)) / seeds)
    if seeds > 1:
        error = of_seeds.std(ddof=1) / math.sqrt(seeds)
        half = max(half, float(t.ppf(1 - ALPHA / 2, seeds - 1)) * error)
    value = float(of_seeds.mean())
    return value, max(-1.0, value - half), min(1.0, value + half)


def t_interval(values: ArrayLike) -> tuple[float, float, float]:
    """The mean, and the ends of its 95 % interval by Student's t; NaN if there are too few values.

    Args:
        values: (n,) numbers, taken as independent.
    """
    x = np.asarray(values, dtype=float)
    mean = float(x.mean()) if len(x) else math.nan
    if len(x) < 2:
        return mean, math.nan, math.nan
    half = float(t.ppf(1 - ALPHA / 2, len(x) - 1) * x.std(ddof=1)) / math.sqrt(len(x))
    return mean, mean - half, mean + half


def verdict(low: float, high: float) -> str:
    """The verdict of an interval of `trend`."""
    return "falls" if high < 0 else "rises" if low > 0 else "cannot be told"
