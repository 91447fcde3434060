"""The distance of a question from its nearest wrong answer: robustness curve, and predictors of it.

The critical epsilon of a question is the smallest amplitude that was found to change the answer. It
is 0 if the clean answer is wrong. It is infinite (censored) if no wrong answer was found up to the
largest amplitude. The robustness curve is the share of questions whose critical epsilon is above
epsilon. All functions are pure functions over the frame of `samples.parquet`.

The answer is the first choice with the best score, as in lm-eval. The score is the run's
(`score=`): the log-likelihood (`acc`), or the log-likelihood per character (`acc_norm`). Numbers
that are compared with critical epsilons must be of the same score. `of_score` makes the frames for
this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llm_attack.stats import ALPHA, auroc, spearman
from llm_attack.suite.analysis.outcomes import gold_margin, right
from llm_attack.suite.analysis.summary import MEAN

ACC, ACC_NORM = "acc", "acc_norm"

# The columns with the answer by each score.
_PREDICTIONS = {ACC: "prediction", ACC_NORM: "prediction_norm"}

Numbers = NDArray[np.float64]

RESAMPLES = 1000
ALL = "all"  # the entry of the column `task` for the questions of all tasks together

# Possible predictors of when a question falls to an attack. Larger values predict a later fall.
_FORETELL: dict[str, Callable[[pd.DataFrame], Any]] = {
    "first_order": lambda clean: clean["first_order"],
    "margin": gold_margin,
    "cosine": lambda clean: -clean["cosine"].abs(),
}
_PROBE, _BASELINE = "first_order", "margin"
_PLACE = ["task", "doc_id"]


def score_of(run: Mapping[str, Any]) -> str:
    """The score that the critical epsilons of a run refer to; `run` is the data of `run.json`."""
    return ACC_NORM if run.get("settings", {}).get("score") == ACC_NORM else ACC


def judged(samples: pd.DataFrame, score: str) -> pd.DataFrame:
    """The samples with critical epsilons that agree with lm-eval's judgement of the answers.

    An attack judges by sums in float64 and lm-eval by sums in float32, so they can disagree. Then
    lm-eval's judgement counts. The critical epsilon is 0 if the clean answer is wrong. It is
    infinite if the answer at the point that the attack found is right. It is at most the largest
    epsilon if that answer is wrong.

    Args:
        samples: as in `samples.parquet`.
        score: the result of `score_of`.
    """
    if not looked_for(samples):
        return samples
    wrong = _right(samples, score) == 0
    clean = samples.loc[wrong & (samples["condition"] == "none"), _PLACE]
    at_first = pd.MultiIndex.from_frame(samples[_PLACE]).isin(pd.MultiIndex.from_frame(clean))
    critical = samples["critical_epsilon"].clip(upper=samples["epsilon"]).where(wrong, np.inf)
    critical = critical.mask(at_first, 0.0).where(samples["critical_epsilon"].notna())
    return samples.assign(critical_epsilon=critical)


def of_score(samples: pd.DataFrame, questions: pd.DataFrame, score: str) -> pd.DataFrame:
    """The samples with `acc` and `log_likelihoods` in terms of one score.

    Args:
        samples: as in `samples.parquet`.
        questions: as in `questions.parquet`.
        score: the result of `score_of`; `acc_norm` needs the lengths of all choices.
    """
    if not looked_for(samples):
        return samples
    samples = samples.assign(acc=_right(samples, score))
    if score == ACC:
        return samples
    lengths = samples[_PLACE].merge(questions[[*_PLACE, "lengths"]], how="left")["lengths"]
    pairs = zip(samples["log_likelihoods"], lengths, strict=True)
    return samples.assign(log_likelihoods=[np.divide(values, length) for values, length in pairs])


def _right(samples: pd.DataFrame, score: str) -> pd.Series:
    """1 if the answer is a right choice, else 0."""
    pairs = zip(samples[_PREDICTIONS[score]], samples["gold"], strict=True)
    return pd.Series([float(answer in gold) for answer, gold in pairs], samples.index, dtype=float)


def stalled(samples: pd.DataFrame) -> dict[str, str]:
    """A warning for each condition of `fmn` that found no wrong answer for some questions."""
    sentences = {}
    others = samples[(samples["attack"] == "critical") & np.isfinite(samples["critical_epsilon"])]
    for condition in looked_for(samples):
        rows = samples[samples["condition"] == condition]
        censored = rows[np.isinf(rows["critical_epsilon"])]
        if rows["attack"].iloc[0] != "fmn" or censored.empty:
            continue
        text = (
            f"fmn found no wrong answer for {len(censored)} of {len(rows)} questions. Wrong"
            " answers may still exist: the steps of fmn can stall before the decision boundary"
        )
        if "critical" in set(samples["attack"]):
            known = len(censored[_PLACE].merge(others[_PLACE].drop_duplicates()))
            text += f"; critical found one for {known} of them"
        sentences[condition] = text
    return sentences


def looked_for(samples: pd.DataFrame) -> list[str]:
    """The conditions that searched for critical epsilons."""
    if "critical_epsilon" not in samples:
        return []
    return list(samples.loc[samples["critical_epsilon"].notna(), "condition"].unique())


def curve(values: Sequence[Numbers], epsilons: Numbers) -> Numbers:
    """(epsilons,) mean over tasks of the share of critical epsilons above each epsilon."""
    shares = [1 - np.searchsorted(np.sort(task), epsilons, "right") / len(task) for task in values]
    return np.asarray(np.mean(shares, axis=0))


def half_life(values: Sequence[Numbers]) -> float:
    """The epsilon at which half of the clean accuracy is left. Every task has the same weight.

    For one task, this is the median critical epsilon of the questions that are right without an
    attack. It is infinite if less than half of them fell, and NaN if none was right.
    """
    all_values = np.concatenate(values)
    weights = np.concatenate([np.full(len(task), 1 / len(task)) for task in values])
    right = all_values > 0
    order = np.argsort(all_values[right])
    fallen = weights[right][order].cumsum()
    if not len(fallen):
        return np.nan
    # half of the weight, except for rounding
    at = np.searchsorted(fallen, fallen[-1] / 2 * (1 - 1e-12))
    return float(all_values[right][order][at])


def area(values: Sequence[Numbers], largest: float) -> float:
    """Area under the curve from 0 to `largest`, divided by `largest`: the mean accuracy."""
    if largest == 0:
        return float(curve(values, np.zeros(1))[0])
    return float(np.mean([np.minimum(task, largest).mean() / largest for task in values]))


def robustness(samples: pd.DataFrame) -> pd.DataFrame:
    """The frame of `critical.csv`: a row per task and condition with critical epsilons.

    Returns:
        The last row of a condition is the mean over tasks. Columns:

        - `task`, `condition`, `epsilon_max`
        - `n`: number of questions
        - `acc`: clean accuracy
        - `censored`: number of questions without a known wrong answer
        - `median`: the epsilon at which half of the clean accuracy is left
        - `area`: mean accuracy over all epsilons up to the largest
        - `median_low`, `median_high`, `area_low`, `area_high`: 95 % bootstrap intervals
          (percentiles of `RESAMPLES` resamples of the questions of each task)
    """
    rows: list[dict[str, Any]] = []
    for condition in looked_for(samples):
        of_condition = samples[samples["condition"] == condition]
        largest = float(of_condition["epsilon"].iloc[0])
        tasks = of_tasks(of_condition)
        groups = {**{task: [values] for task, values in tasks.items()}, MEAN: list(tasks.values())}
        for task, values in groups.items():
            drawn = list(_redrawn(values))
            row = {
                "task": task,
                "condition": condition,
                "epsilon_max": largest,
                "n": sum(map(len, values)),
                "acc": float(curve(values, np.zeros(1))[0]),
                "censored": int(sum(np.isinf(task).sum() for task in values)),
            }
            statistics: dict[str, Callable[[Sequence[Numbers]], float]] = {
                "median": half_life,
                "area": partial(area, largest=largest),
            }
            for name, statistic in statistics.items():
                low, high = _interval([statistic(again) for again in drawn])
                row |= {name: statistic(values), f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def against_fixed(samples: pd.DataFrame) -> pd.DataFrame:
    """Compares the curves with the run's attacks at one epsilon; a row for each pair.

    Returns:
        Columns: `condition` that searched for critical epsilons, `fixed`: the condition compared
            with it, `attack` and `epsilon` of the latter, `curve`: the curve's accuracy at this
            epsilon, `acc`: the attack's accuracy. Both accuracies are means over tasks.
    """
    rows = []
    fixed = samples[samples["critical_epsilon"].isna() & (samples["epsilon"] > 0)]
    for condition in looked_for(samples):
        values = list(of_tasks(samples[samples["condition"] == condition]).values())
        for name, group in fixed.groupby("condition", sort=False):
            attack, epsilon = group["attack"].iloc[0], float(group["epsilon"].iloc[0])
            row = {"condition": condition, "fixed": name, "attack": attack, "epsilon": epsilon}
            row["curve"] = float(curve(values, np.array([epsilon]))[0])
            row["acc"] = float(right(group).groupby(group["task"]).mean().mean())
            rows.append(row)
    return pd.DataFrame(rows)


def foretold(samples: pd.DataFrame) -> pd.DataFrame:
    """The frame of `foretold.csv`: how well clean quantities predict the results of attacks.

    It covers the questions that are right without an attack. The predictors are `first_order`, the
    estimate of the critical epsilon from one gradient; `margin`, the gold's log-likelihood minus
    the best of the others; and `cosine`, minus the absolute cosine of embeddings and gradient
    (arXiv 2603.19562).

    Returns:
        A row per task and predictor; the task `ALL` comes last. Columns:

        - `task`, and `condition` whose results are predicted
        - `measure`: `spearman` is the rank correlation with critical epsilons. Censored ones are
          equal and the largest. `auroc` is the probability that a question that falls has a smaller
          value than one that does not
        - `predictor`. "first_order - margin" is the difference of the two on the same questions
        - `n`: number of questions
        - `value`, `low`, `high`: the measure and its 95 % bootstrap interval (percentiles of
          `RESAMPLES` resamples of the questions of each task)
    """
    clean = samples[samples["condition"] == "none"]
    if clean.empty or not looked_for(samples) or clean["first_order"].isna().all():
        return pd.DataFrame()
    known = pd.DataFrame({name: predictor(clean) for name, predictor in _FORETELL.items()})
    known = pd.concat([clean[_PLACE], known], axis=1)[right(clean)].dropna()
    rows = []
    for condition, group in samples.groupby("condition", sort=False):
        searched = group["critical_epsilon"].notna().all()
        if condition == "none" or (not searched and group["attack"].iloc[0] != "fgsm"):
            continue
        measure = "spearman" if searched else "auroc"
        outcome = group["critical_epsilon"] if searched else right(group).astype(float)
        pairs = known.merge(group[_PLACE].assign(outcome=outcome), on=_PLACE)
        if pairs.empty:
            continue
        for task, of_task in [*pairs.groupby("task", sort=False), (ALL, pairs)]:
            place = {"task": task, "condition": condition, "measure": measure}
            rows += [{**place, **row} for row in _measured(of_task, measure)]
    return pd.DataFrame(rows)


def _measured(pairs: pd.DataFrame, measure: str) -> Iterator[dict[str, Any]]:
    measured = _MEASURES[measure]
    outcome = pairs["outcome"].to_numpy(float)
    groups = [index for _, index in sorted(pairs.groupby("task", sort=False).indices.items())]
    again = np.array([np.concatenate(draw) for draw in _redrawn(groups)])
    values, drawn = {}, {}
    for name in _FORETELL:
        known = pairs[name].to_numpy(float)
        values[name] = measured(known[None], outcome[None])[0]
        drawn[name] = measured(known[again], outcome[again])
    name = f"{_PROBE} - {_BASELINE}"
    for of_all in (values, drawn):
        of_all[name] = of_all[_PROBE] - of_all[_BASELINE]
    for name, value in values.items():
        low, high = _interval(drawn[name])
        yield {"predictor": name, "n": len(pairs), "value": value, "low": low, "high": high}


_MEASURES: dict[str, Callable[[Numbers, Numbers], Numbers]] = {
    "spearman": spearman,
    "auroc": auroc,
}


def of_tasks(rows: pd.DataFrame) -> dict[str, Numbers]:
    """The critical epsilons of each task's questions."""
    groups = rows.groupby("task", sort=False)["critical_epsilon"]
    return {str(task): values.to_numpy(float) for task, values in groups}


def _redrawn(values: Sequence[NDArray[Any]]) -> Iterator[list[NDArray[Any]]]:
    """Resamples each task's values with replacement, `RESAMPLES` times; the draws are fixed."""
    generator = np.random.default_rng(0)
    for _ in range(RESAMPLES):
        yield [task[generator.integers(len(task), size=len(task))] for task in values]


def _interval(values: Sequence[float] | Numbers) -> tuple[float, float]:
    """The percentile interval of resampled values, infinite ones included and NaN left out."""
    defined = np.asarray(values)[~np.isnan(values)]
    if not len(defined):
        return np.nan, np.nan
    ends = [100 * ALPHA / 2, 100 * (1 - ALPHA / 2)]
    low, high = np.percentile(defined, ends, method="inverted_cdf")
    return float(low), float(high)
