"""What a question came to, per row of `samples.parquet`. Imports neither torch nor lm-eval."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd


def measured(samples: pd.DataFrame) -> dict[str, pd.Series]:
    """What log-likelihoods come to, per row and by name: `gold_probability`, `log_likelihood` (mean
    of the choices, in nats) and `margin` (`gold_margin`); those of `with_worst` as they stand.
    """
    found = {
        "gold_probability": gold_probability,
        "log_likelihood": lambda of: of["log_likelihoods"].map(np.mean),
        "margin": gold_margin,
    }
    return {name: samples[name] if name in samples else of(samples) for name, of in found.items()}


def chances(samples: pd.DataFrame) -> pd.Series:
    """The probability that a guess is right, per row: number of gold choices / of choices."""
    return samples["gold"].map(len) / samples["n_choices"]


def gold_margin(samples: pd.DataFrame) -> pd.Series:
    """Best log-likelihood of a gold choice minus the best of the others, per row, in nats.

    NaN where a question has no other choice, or where the difference is not a number.
    """
    pairs = zip(samples["log_likelihoods"], samples["gold"], strict=True)
    return pd.Series([_margin(*pair) for pair in pairs], samples.index, dtype=float)


def _margin(log_likelihoods: Iterable[float], gold: Iterable[int]) -> float:
    right = set(gold)
    best = {True: -np.inf, False: -np.inf}
    for i, value in enumerate(log_likelihoods):
        best[i in right] = max(best[i in right], value)
    margin = best[True] - best[False]
    return margin if np.isfinite(margin) else np.nan


def gold_probability(samples: pd.DataFrame) -> pd.Series:
    """Share of the right choices in the probability of all of a question's choices, per row.

    By the likelihoods of the choices as they are, which `acc` compares. Unlike `acc` it tells a
    narrow answer from a sure one, so that its mean varies less. NaN where no number is finite.
    """
    pairs = zip(samples["log_likelihoods"], samples["gold"], strict=True)
    return pd.Series([_share(*pair) for pair in pairs], samples.index, dtype=float)


def _share(log_likelihoods: Iterable[float], gold: Iterable[int]) -> float:
    scores = np.array(log_likelihoods, dtype=float)
    if not np.isfinite(scores.max()):
        return np.nan
    weights = np.exp(scores - scores.max())
    return float(weights[list(gold)].sum() / weights.sum())


def sources(samples: pd.DataFrame) -> pd.Series:
    """Which source a question is from, per row: its `cluster` where it has one, else its own."""
    places = samples.groupby(["task", "doc_id"], sort=False).ngroup()
    clusters = samples.get("cluster")
    if clusters is None or clusters.isna().all():
        return places
    return clusters.astype(float).fillna(-1.0 - places)
