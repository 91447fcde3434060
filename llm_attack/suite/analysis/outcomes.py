"""Outcomes of questions, per row of `samples.parquet`. Imports neither torch nor lm-eval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd

# The kinds of scores. Guessing has a known accuracy only for choices.
CHOICE, BINARY, SHARE, NUMBER = "right or wrong", "0 or 1", "share, 0 to 1", "number"
HIGHER, LOWER = "higher", "lower"  # which direction is better
ACC = "acc"
BROKEN_BY = "broken_by"  # a column of runs with a battery; see `rows.samples_of`

Columns = Mapping[str, np.ndarray]


def groups(frame: pd.DataFrame, by: str | list[str]) -> Iterator[tuple[Any, Columns]]:
    """Yields each group's key and its rows as arrays by column, in order of appearance.

    Args:
        frame: the frame to divide.
        by: the columns whose values name a group.
    """
    number = frame.groupby(by, sort=False).ngroup().to_numpy()
    order = np.argsort(number, kind="stable")
    columns = {str(name): frame[name].to_numpy()[order] for name in frame}
    ends = np.cumsum(np.bincount(number))
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        group = {name: column[begin:end] for name, column in columns.items()}
        yield group[by][0] if isinstance(by, str) else tuple(group[key][0] for key in by), group


def with_scores(samples: pd.DataFrame) -> pd.DataFrame:
    """The samples with `score`, `kind` and `better`, which older runs lack.

    If they lack, the score is `acc`, and the values of a task show its kind.
    """
    missing = {"score": ACC, "better": HIGHER}
    samples = samples.assign(**{k: v for k, v in missing.items() if k not in samples})
    if "kind" not in samples:
        values = samples["acc"].groupby(samples["task"], sort=False)
        samples["kind"] = samples["task"].map({task: kind_of(scores) for task, scores in values})
    return samples


def kind_of(values: Iterable[float], least: str = CHOICE) -> str:
    """The kind of a score: `least`, or the kind that these values need if that is wider."""
    scores = np.fromiter(values, dtype=float)
    scores = scores[~np.isnan(scores)]
    if least in (CHOICE, BINARY) and np.isin(scores, (0, 1)).all():
        return least
    within = ((scores >= 0) & (scores <= 1)).all()
    return SHARE if within and least != NUMBER else NUMBER


def counted(rows: Columns) -> bool:
    """Whether the score of one task's questions is 0 or 1, so it can be counted."""
    return rows["kind"][0] in (CHOICE, BINARY)


def goodness(samples: pd.DataFrame, column: str = "acc") -> pd.Series:
    """The score per row, negated if lower is better."""
    return samples[column].where(with_scores(samples)["better"] != LOWER, -samples[column])


def right(samples: pd.DataFrame) -> pd.Series:
    """Whether the answer is right, per row.

    The score decides if it is 0 or 1. Otherwise the likeliest choice decides.
    """
    counts = with_scores(samples)["kind"].isin([CHOICE, BINARY])
    if counts.all():
        return samples["acc"] > 0
    pairs = zip(samples["prediction"], samples["gold"], strict=True)
    chosen = pd.Series([p in set(gold) for p, gold in pairs], samples.index)
    return (samples["acc"] > 0).where(counts, chosen).astype(bool)


def measured(samples: pd.DataFrame) -> dict[str, pd.Series]:
    """Outcomes from log-likelihoods, by name and per row.

    They are `gold_probability`, `log_likelihood` (mean of the choices, in nats) and `margin`
    (`gold_margin`). Columns that `with_worst` computed are returned unchanged.
    """
    missing = {name: measure for name, measure in _MEASURES.items() if name not in samples}
    made = _per_row(samples, list(missing.values())) if missing else []
    computed = dict(zip(missing, made, strict=True))
    return {name: computed[name] if name in computed else samples[name] for name in _MEASURES}


def chances(samples: pd.DataFrame) -> pd.Series:
    """The probability that a guess is right, per row: number of gold choices / number of choices.

    NaN if the score does not judge a choice.
    """
    guessed = samples["gold"].map(len) / samples["n_choices"]
    return guessed.where(with_scores(samples)["kind"] == CHOICE)


def gold_margin(samples: pd.DataFrame) -> pd.Series:
    """Best log-likelihood of a gold choice minus the best of the others, per row, in nats.

    NaN if a question has no other choice, or if the difference is not finite.
    """
    return _per_row(samples, [_margin])[0]


def gold_probability(samples: pd.DataFrame) -> pd.Series:
    """Share of the right choices in the total probability of a question's choices, per row.

    It uses the log-likelihoods that `acc` compares, without normalisation. Unlike `acc` it shows
    how sure an answer is, so its mean varies less. NaN if no number is finite.
    """
    return _per_row(samples, [_share])[0]


def log_likelihood(samples: pd.DataFrame) -> pd.Series:
    """Mean log-likelihood of a question's choices, per row, in nats."""
    return _per_row(samples, [_mean])[0]


def confidence(samples: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """The confidence in a question's answer, and the Brier score of all its choices, per row.

    The confidence is the probability of the likeliest choice, if the probabilities of a question's
    choices sum to 1. The Brier score is the sum over the choices of the squared distance to 1 for
    the gold and 0 for the others (Brier 1950). 0 is best, 2 is worst. It is NaN unless there is
    exactly one gold. Both are NaN if a log-likelihood is.
    """
    first, second = _per_row(samples, [_likeliest, _brier])
    return first, second


def _margin(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    known = ~np.isnan(scores)
    best = [np.where(choices & known, scores, -np.inf).max(1) for choices in (gold, ~gold)]
    with np.errstate(invalid="ignore"):
        margin = best[0] - best[1]
    return np.where(np.isfinite(margin), margin, np.nan)


def _share(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    best = scores.max(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - best)
        share = np.where(gold, weights, 0.0).sum(1) / weights.sum(1)
    known = np.isfinite(best[:, 0]) & gold.any(1)  # generated texts have no gold
    return np.where(known, share, np.nan)


def _probabilities(scores: np.ndarray) -> np.ndarray:
    """(rows, choices) probabilities; NaN in rows without a finite number."""
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(1, keepdims=True))
        return np.asarray(weights / weights.sum(1, keepdims=True))


def _likeliest(scores: np.ndarray, _: np.ndarray) -> np.ndarray:
    return np.asarray(_probabilities(scores).max(1))


def _brier(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    distance = ((_probabilities(scores) - gold) ** 2).sum(1)
    return np.where(gold.sum(1) == 1, distance, np.nan)


def _mean(scores: np.ndarray, _: np.ndarray) -> np.ndarray:
    return np.asarray(scores.mean(1))


_Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]
_MEASURES: dict[str, _Measure] = {
    "gold_probability": _share,
    "log_likelihood": _mean,
    "margin": _margin,
}


def _per_row(samples: pd.DataFrame, measures: Sequence[_Measure]) -> list[pd.Series]:
    """Computes numbers per row, for all questions with the same number of choices at once.

    Args:
        samples: a frame with `log_likelihoods` and `gold`.
        measures: functions from (rows, choices) log-likelihoods and (rows, choices) booleans (is it
            gold?) to (rows,) numbers.
    """
    lists, golds = samples["log_likelihoods"].to_numpy(), samples["gold"].to_numpy()
    lengths = np.fromiter(map(len, lists), int, len(lists))
    columns = np.full((len(measures), len(lists)), np.nan)
    for length in np.unique(lengths[lengths > 0]):  # generated texts have no log-likelihoods
        (rows,) = np.nonzero(lengths == length)
        scores = np.concatenate(lists[rows]).astype(float).reshape(len(rows), length)
        of_rows = golds[rows]
        owner = np.repeat(np.arange(len(rows)), np.fromiter(map(len, of_rows), int, len(rows)))
        gold = np.zeros((len(rows), length), dtype=bool)
        gold[owner, np.fromiter(chain.from_iterable(of_rows), int, len(owner))] = True
        columns[:, rows] = [measure(scores, gold) for measure in measures]
    return [pd.Series(column, samples.index, dtype=float) for column in columns]


def sources(samples: pd.DataFrame) -> pd.Series:
    """The source of each question, per row: its `cluster`; without one, a number of its own."""
    places = samples.groupby(["task", "doc_id"], sort=False).ngroup()
    clusters = samples.get("cluster")
    if clusters is None or clusters.isna().all():
        return places
    return clusters.astype(float).fillna(-1.0 - places)
