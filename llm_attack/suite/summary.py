"""A run's samples summarised: accuracies with intervals and tests, and pairs of two runs.

Pure functions over pandas frames: `summarise` makes the frame of `table.csv`, `paired` compares two
runs. Imports neither torch nor lm-eval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from llm_attack.errors import UsageError
from llm_attack.suite.inference import (
    ALPHA,
    chance_test,
    detectable,
    holm,
    mcnemar_test,
    mean_interval,
    paired_interval,
    stratified_test,
    wilson,
)

ABOVE, BELOW = "above guessing", "below guessing"
INDISTINGUISHABLE = "indistinguishable from guessing"
MEAN = "mean"  # stands in the column `task` of rows with the mean over tasks

# columns of the frame of `table.csv`, in order
_TABLE = [
    *("task", "condition", "attack", "hookpoint", "epsilon", "snr_db"),
    *("n", "n_choices_min", "n_choices_max"),
    *("acc", "acc_low", "acc_high", "acc_norm", "acc_norm_low", "acc_norm_high", "baseline"),
    *("p_chance", "p_chance_holm", "verdict", "p_mcnemar", "p_mcnemar_holm"),
    *("drop", "drop_low", "drop_high", "detectable", "lost", "gained"),
    *("log_likelihood_change", "margin_change"),
]
_KEYS = ["task", "condition"]
_OF_CONDITION = ("attack", "hookpoint", "epsilon")
_CHANGING = ["acc", "log_likelihood", "margin"]  # of a question, from `none` to another condition
_COUNTS = ["n", "n_choices_min", "n_choices_max", "lost", "gained", "left_out"]


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


def summarise(
    samples: pd.DataFrame, attacks: Mapping[str, Mapping[str, Any]] | None = None
) -> pd.DataFrame:
    """The frame of `table.csv`: a row per task and condition, then the means over tasks.

    Args:
        samples: a row per question and condition, as in `samples.parquet`.
        attacks: what `run.json` says of each condition; of it `snr_db` is taken.

    Returns:
        Rows in the order of the run, then for every condition one whose `task` is "mean": the
        unweighted mean over tasks, with the total of the counts. Columns:

        - `task`, `condition`, `attack`, `hookpoint`, `epsilon` in the units of the point,
          `snr_db`: signal to noise of the condition over all tasks, `n` questions,
          `n_choices_min`, `n_choices_max`
        - `acc`, `acc_low`, `acc_high`: accuracy and Wilson's 95 % interval (of a mean:
          `mean_interval`); `acc_norm...`: the same, where every question has it
        - `baseline`: accuracy of random guesses; `p_chance`: exact test against it, and
          `p_chance_holm`: adjusted over the tasks of a condition; `verdict`: in words, at 0.05
        - `p_mcnemar`: exact test against `none`, `p_mcnemar_holm`: adjusted over tasks; `drop`:
          accuracy under `none` minus accuracy here, in points of a percent, `drop_low`,
          `drop_high`: its paired 95 % interval (`paired_interval`; of a mean: `mean_interval`);
          `detectable`: the smallest drop that so many questions show with power 0.8; `lost`:
          questions right under `none` and wrong here; `gained`: the reverse. Of a mean,
          `p_mcnemar` is `stratified_test`, of one hypothesis, which Holm leaves as it is
        - `log_likelihood_change`, `margin_change`: of a choice, and of the gold against the best
          other choice, from `none` to here, mean over questions in nats. These, like the tests
          against `none`, are null for `none` itself, and everywhere when it was not run.

    Raises:
        UsageError: there are no samples.
    """
    if samples.empty:
        raise UsageError("samples: must hold at least one question")
    samples = samples.reset_index(drop=True)
    samples = samples.assign(
        hookpoint=samples.get("hookpoint", "embed"),
        chance=chances(samples),
        log_likelihood=samples["log_likelihoods"].map(np.mean),
        margin=gold_margin(samples),
    )
    place, is_none = ["task", "doc_id"], samples["condition"] == "none"
    of_none = samples.loc[is_none, [*place, *_CHANGING]]
    clean = samples[place].merge(of_none, how="left", validate="many_to_one")[_CHANGING]
    clean = clean.mask(is_none).add_prefix("clean_")
    groups = samples.join(clean).groupby(_KEYS, sort=False)
    table = pd.DataFrame([{**dict(zip(_KEYS, k, strict=True)), **_row(g)} for k, g in groups])
    table["p_chance_holm"] = _holm_over_tasks(table, "p_chance")
    table["p_mcnemar_holm"] = _holm_over_tasks(table, "p_mcnemar")
    differs = table["p_chance_holm"] <= ALPHA
    side = np.where(table["acc"] > table["baseline"], ABOVE, BELOW)
    table["verdict"] = np.where(differs, side, INDISTINGUISHABLE)
    ratio = {name: of.get("snr_db") for name, of in (attacks or {}).items()}
    table["snr_db"] = table["condition"].map(ratio).astype(float)
    plain = ("baseline", "snr_db", "log_likelihood_change", "margin_change")
    return _with_pooled(_with_means(table, _TABLE, ("acc", "acc_norm", "drop"), plain))


def _with_pooled(table: pd.DataFrame) -> pd.DataFrame:
    """Fills in, for the means over tasks, what is not a mean: their test and what it can detect."""
    tasks = table[table["task"] != MEAN]
    for condition, rows in tasks.groupby("condition", sort=False):
        if rows["lost"].isna().any():
            continue
        counts = [rows[key].to_numpy(int) for key in ("lost", "gained", "n")]
        mean = (table["task"] == MEAN) & (table["condition"] == condition)
        table.loc[mean, ["p_mcnemar", "p_mcnemar_holm"]] = stratified_test(*counts)
        table.loc[mean, "detectable"] = 100 * detectable(*counts)
    return table


def _row(group: pd.DataFrame) -> dict[str, Any]:
    """Summarises one task's questions under one condition, without Holm's adjustment."""
    n_choices = group["n_choices"]
    row = {
        "attack": group["attack"].iloc[0],
        "hookpoint": group["hookpoint"].iloc[0],
        "epsilon": group["epsilon"].iloc[0],
        "n": len(group),
        "n_choices_min": n_choices.min(),
        "n_choices_max": n_choices.max(),
        "baseline": group["chance"].mean(),
        "p_chance": chance_test(int(group["acc"].sum()), group["chance"]),
        **_accuracy(group, "acc"),
        **_accuracy(group, "acc_norm"),
    }
    for name in ("log_likelihood", "margin"):
        row[f"{name}_change"] = (group[name] - group[f"clean_{name}"]).mean()
    pairs = group[group["clean_acc"].notna()]
    if pairs.empty:
        return {
            **row,
            **dict.fromkeys(("p_mcnemar", "drop", "drop_low", "drop_high", "detectable"), np.nan),
            **dict.fromkeys(("lost", "gained"), pd.NA),
        }
    lost, gained = _changes(pairs["clean_acc"], pairs["acc"])
    n = len(pairs)
    low, high = paired_interval(lost, gained, n)
    return {
        **row,
        "p_mcnemar": mcnemar_test(lost, gained),
        "drop": 100 * (lost - gained) / n,
        "drop_low": -100 * high,
        "drop_high": -100 * low,
        "detectable": 100 * detectable([lost], [gained], [n]),
        "lost": lost,
        "gained": gained,
    }


def _accuracy(group: pd.DataFrame, metric: str) -> dict[str, float]:
    values = pd.to_numeric(group[metric])
    low = high = np.nan
    if values.notna().all():
        low, high = wilson(int(values.sum()), len(values))
    return {metric: values.mean(skipna=False), f"{metric}_low": low, f"{metric}_high": high}


def _changes(before: pd.Series, after: pd.Series) -> tuple[int, int]:
    """How many questions were right before alone, and after alone."""
    return int((before > after).sum()), int((before < after).sum())


def _holm_over_tasks(table: pd.DataFrame, column: str) -> pd.Series:
    return table.groupby("condition", sort=False)[column].transform(holm)


def _with_means(
    table: pd.DataFrame, columns: list[str], measured: Iterable[str], plain: Iterable[str]
) -> pd.DataFrame:
    """Appends the mean over tasks of every condition, and puts `columns` in order.

    Args:
        table: a row per task and condition.
        columns: of the result; those without a mean or a total are null in its rows.
        measured: columns that have an interval in `..._low` and `..._high`.
        plain: other columns whose mean is taken.
    """
    means = []
    for condition, group in table.groupby("condition", sort=False):
        mean: dict[str, Any] = {"task": MEAN, "condition": condition}
        mean |= {key: group[key].iloc[0] for key in _OF_CONDITION if key in columns}
        mean |= {key: group[key].mean(skipna=False) for key in (*measured, *plain)}
        for key in measured:
            ends = mean_interval(group[key], group[f"{key}_low"], group[f"{key}_high"])
            mean[f"{key}_low"], mean[f"{key}_high"] = ends
        for key in (key for key in _COUNTS if key in columns):
            total = {"n_choices_min": "min", "n_choices_max": "max"}.get(key, "sum")
            mean[key] = group[key].agg(total) if group[key].notna().all() else pd.NA
        means.append(mean)
    both = [*table.to_dict("records"), *means]
    types = {key: "Int64" for key in _COUNTS if key in columns}
    return pd.DataFrame(both, columns=columns).astype(types)


def paired(
    samples_a: pd.DataFrame,
    questions_a: pd.DataFrame,
    samples_b: pd.DataFrame,
    questions_b: pd.DataFrame,
) -> pd.DataFrame:
    """Compares run b with run a on the questions that both asked in the same words.

    Args:
        samples_a: a row per question and condition, as in `samples.parquet`.
        questions_a: a row per question, as in `questions.parquet`. Questions are paired where
            `task`, `doc_id` and `doc_hash` agree.
        samples_b: of the other run.
        questions_b: of the other run.

    Returns:
        A row per task and condition that both runs have, in the order of run a, then for every
        condition the mean over tasks. Columns: `task`, `condition`, `n` questions paired,
        `left_out`: questions of either run that found no partner, `acc_a`, `acc_b`, `difference`:
        accuracy in b minus accuracy in a, in points of a percent, `difference_low`,
        `difference_high`: its 95 % interval (`paired_interval`; of a mean: `mean_interval`),
        `lost`: questions right in a and wrong in b, `gained`: the reverse, `p_mcnemar`: exact
        test, `p_mcnemar_holm`: adjusted over the tasks of a condition.

    Raises:
        UsageError: the runs share no task, no condition or no question.
    """
    for key in _KEYS:
        ours, theirs = samples_a[key].unique(), samples_b[key].unique()
        if not set(ours) & set(theirs):
            raise UsageError(
                f"compare: the runs share no {key}: {', '.join(ours)} against {', '.join(theirs)}"
            )
    question, place = ["task", "doc_id", "doc_hash"], ["task", "doc_id"]
    same = questions_a[question].merge(questions_b[question])[place]
    if same.empty:
        raise UsageError("compare: the runs share no question: their prompts differ")
    asked = pd.concat([questions_a[place], questions_b[place]]).drop_duplicates()["task"]
    asked_of_task = asked.value_counts()
    columns = [*place, "condition", "acc"]
    pairs = samples_a[columns].merge(
        samples_b[columns], on=columns[:-1], suffixes=("_a", "_b"), validate="one_to_one"
    )
    pairs = pairs.merge(same, on=place)
    rows = []
    for (task, condition), group in pairs.groupby(_KEYS, sort=False):
        n, left_out = len(group), asked_of_task[task] - len(group)
        lost, gained = _changes(group["acc_a"], group["acc_b"])
        low, high = paired_interval(lost, gained, n)
        rows.append(
            {
                "task": task,
                "condition": condition,
                "n": n,
                "left_out": left_out,
                "acc_a": group["acc_a"].mean(),
                "acc_b": group["acc_b"].mean(),
                "difference": 100 * (gained - lost) / n,
                "difference_low": 100 * low,
                "difference_high": 100 * high,
                "lost": lost,
                "gained": gained,
                "p_mcnemar": mcnemar_test(lost, gained),
            }
        )
    frame = pd.DataFrame(rows)
    frame["p_mcnemar_holm"] = _holm_over_tasks(frame, "p_mcnemar")
    return _with_means(frame, list(frame), ("difference",), ("acc_a", "acc_b"))


def unshared(
    samples_a: pd.DataFrame,
    questions_a: pd.DataFrame,
    samples_b: pd.DataFrame,
    questions_b: pd.DataFrame,
) -> list[str]:
    """Sentences on what `paired` leaves out besides single questions, one for each kind."""
    sentences = []
    for key in _KEYS:
        for run, ours, theirs in (("a", samples_a, samples_b), ("b", samples_b, samples_a)):
            alone = [x for x in ours[key].unique() if x not in set(theirs[key])]
            if alone:
                sentences.append(f"{key}s of run {run} alone: {', '.join(alone)}")
    same = set(questions_a.merge(questions_b, on=["task", "doc_id", "doc_hash"])["task"])
    both = set(questions_b["task"])
    foreign = [x for x in questions_a["task"].unique() if x in both and x not in same]
    if foreign:
        sentences.append(f"no question is the same in both runs: {', '.join(foreign)}")
    return sentences
