"""Whether an accuracy rises or falls over the epochs, of networks that differ in their seed."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm, t

from llm_attack.stats import ALPHA


def trend(curves: ArrayLike) -> tuple[float, float, float]:
    """Kendall's rank correlation (tau-a) of epoch and value, mean over seeds; its 95 % interval.

    The share of pairs of epochs between which the value rises, less the share between which it
    falls. The interval is the wider one of two: Student's t of the seeds, and that of a mean of as
    many correlations of values in random order (Kendall 1938), which holds where seeds agree.

    Args:
        curves: (seeds, epochs) values.

    Returns:
        The mean and the ends, in [-1, 1]; NaN of fewer than two epochs. Of one seed, the interval
        is that of random order.
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
    """The mean, and the ends of its 95 % interval by Student's t; NaN where there are too few.

    Args:
        values: (n,), taken as independent.
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
