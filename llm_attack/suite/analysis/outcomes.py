"""What a question came to, per row of `samples.parquet`. Imports neither torch nor lm-eval."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

# What a task's score of a question is. Only a choice can be guessed.
CHOICE, BINARY, SHARE, NUMBER = "right or wrong", "0 or 1", "share, 0 to 1", "number"
HIGHER, LOWER = "higher", "lower"  # which is better
ACC = "acc"


def with_scores(samples: pd.DataFrame) -> pd.DataFrame:
    """The samples with `score`, `kind` and `better`, which runs of earlier versions lack.

    There the score is `acc`, and its kind is what the values of the task show.
    """
    missing = {"score": ACC, "better": HIGHER}
    samples = samples.assign(**{k: v for k, v in missing.items() if k not in samples})
    if "kind" not in samples:
        values = samples["acc"].groupby(samples["task"], sort=False)
        samples["kind"] = samples["task"].map({task: kind_of(of) for task, of in values})
    return samples


def kind_of(values: Iterable[float], least: str = CHOICE) -> str:
    """The kind of a score: `least`, or what these values of it need beyond that."""
    found = np.array([value for value in values if not np.isnan(value)], dtype=float)
    if least in (CHOICE, BINARY) and np.isin(found, (0, 1)).all():
        return least
    within = ((found >= 0) & (found <= 1)).all()
    return SHARE if within and least != NUMBER else NUMBER


def counted(rows: pd.DataFrame) -> bool:
    """Whether the score of one task's questions is 0 or 1, so that it can be counted."""
    return bool(rows["kind"].isin([CHOICE, BINARY]).all())


def goodness(samples: pd.DataFrame, column: str = "acc") -> pd.Series:
    """The score per row, with its sign turned where lower is better."""
    return samples[column].where(with_scores(samples)["better"] != LOWER, -samples[column])


def right(samples: pd.DataFrame) -> pd.Series:
    """Whether the answer is right, per row.

    By the score where that says so, else by the choice that is likeliest.
    """
    counts = with_scores(samples)["kind"].isin([CHOICE, BINARY])
    if counts.all():
        return samples["acc"] > 0
    pairs = zip(samples["prediction"], samples["gold"], strict=True)
    chosen = pd.Series([p in set(gold) for p, gold in pairs], samples.index)
    return (samples["acc"] > 0).where(counts, chosen).astype(bool)


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
    """The probability that a guess is right, per row: number of gold choices / of choices.

    NaN where the score is not of a choice.
    """
    guessed = samples["gold"].map(len) / samples["n_choices"]
    return guessed.where(with_scores(samples)["kind"] == CHOICE)


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
