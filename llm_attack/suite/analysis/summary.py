"""Summary of a run's samples: accuracies with intervals and tests.

All functions are pure functions over pandas frames; `summarise` makes the frame of `table.csv`. The
module imports neither torch nor lm-eval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from llm_attack.base.errors import UsageError
from llm_attack.stats import (
    ALPHA,
    chance_test,
    design_effect,
    holm,
    mean_interval,
    mean_of,
    tells_from_guessing,
    wilson,
)
from llm_attack.suite.analysis.changes import DROPS, as_drops, compared, pooled
from llm_attack.suite.analysis.outcomes import (
    ACC,
    CHOICE,
    HIGHER,
    NUMBER,
    SHARE,
    Columns,
    chances,
    counted,
    groups,
    measured,
    sources,
    with_scores,
)

ABOVE, BELOW = "above guessing", "below guessing"
INDISTINGUISHABLE = "indistinguishable from guessing"
TOO_FEW = "too few questions to tell from guessing"
_ENOUGH = 200  # this many questions suffice with any number of choices, so more are not checked
MEAN = "mean"  # the entry of the column `task` in rows with the mean over tasks

# columns of the frame of `table.csv`, in order
_TABLE = [
    *("task", "condition", "attack", "hookpoint", "epsilon", "snr_db"),
    *("n", "clusters", "n_choices_min", "n_choices_max"),
    *("score", "kind", "better"),
    *("acc", "acc_low", "acc_high", "acc_norm", "acc_norm_low", "acc_norm_high", "baseline"),
    *("p_chance", "p_chance_holm", "verdict", "p_mcnemar", "p_mcnemar_holm"),
    *("drop", "drop_low", "drop_high", "detectable", "design_effect", "lost", "gained"),
    *("gold_probability", "gold_probability_drop", "gold_probability_drop_low"),
    *("gold_probability_drop_high", "p_gold_probability"),
    *("log_likelihood_change", "margin_change"),
]
KEYS = ["task", "condition"]
SCORE = ["score", "kind", "better"]
SEVERAL = "several"  # the entry of these columns if tasks have different scores
OF_TASK = "task_"  # prefix of the columns with scores over a whole task
_OF_CONDITION = ("attack", "hookpoint", "epsilon")
# columns that are compared with `none`, question by question
_CHANGING = ["acc", "gold_probability", "log_likelihood", "margin"]
_SUMMARISED = [
    *KEYS,
    *_OF_CONDITION,
    *SCORE,
    "n_choices",
    "source",
    "chance",
    "acc_norm",
    *_CHANGING,
]
_COUNTS = ["n", "clusters", "n_choices_min", "n_choices_max", "lost", "gained", "left_out"]


def summarise(
    samples: pd.DataFrame,
    attacks: Mapping[str, Mapping[str, Any]] | None = None,
    of_tasks: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
) -> pd.DataFrame:
    """The frame of `table.csv`: a row per task and condition, then the means over tasks.

    Args:
        samples: a row per question and condition, as in `samples.parquet`.
        attacks: the entry `attacks` of `run.json`, for `snr_db`.
        of_tasks: for each condition and task, lm-eval's scores that are computed over the whole
            task and have no value for one question, such as `mcc`.

    Returns:
        Rows in the order of the run, then for every condition one row whose `task` is "mean": the
            unweighted mean over tasks, with the total of the counts. Columns:

        - `task`, `condition`, `attack`, `hookpoint`
        - `epsilon`: amplitude in the units of the point
        - `snr_db`: signal-to-noise ratio of the condition over all tasks
        - `n`: number of questions
        - `clusters`: number of sources of questions, which is `n` if no questions share a source.
          All intervals, and the tests against `none`, allow for shared sources
        - `n_choices_min`, `n_choices_max`: smallest and largest number of choices
        - `acc`, `acc_low`, `acc_high`: accuracy with Wilson's 95 % interval (of a mean:
          `mean_interval`)
        - `acc_norm...`: the same, if every question has it
        - `score`, `kind`, `better`: name of the score that `acc` averages, its kind, and whether
          higher or lower is better. The columns exist only if some task has another score than
          `acc` with the values 0 and 1
        - `task_mcc`, ...: the scores of `of_tasks`
        - `baseline`: accuracy of random guesses
        - `p_chance`: exact test against guessing; `p_chance_holm`: adjusted over the tasks of a
          condition
        - `verdict`: the result of this test in words, at level 0.05
        - `p_mcnemar`: exact test against `none` (`sign_test`), which is McNemar's if no questions
          share a source; `p_mcnemar_holm`: adjusted over tasks. In a row of a mean it is one
          hypothesis, which needs no adjustment
        - `drop`: how much worse the score is than under `none`, in percentage points
        - `drop_low`, `drop_high`: paired 95 % interval (`paired_interval`; of a mean:
          `mean_interval`)
        - `detectable`: smallest drop that this number of questions shows with power 0.8
        - `design_effect`: effect of shared sources on the variance of the drop
        - `lost`: questions right under `none` and wrong here, or worse if lower is better;
          `gained`: the reverse
        - `gold_probability`, `gold_probability_drop...`: the same for the second outcome
          (`gold_probability`, `mean_of`), as a share and in percentage points;
          `p_gold_probability`: t-test
        - `log_likelihood_change`, `margin_change`: change from `none`, mean over questions in nats,
          of a choice's log-likelihood and of the gold's margin over the best other choice

        Comparisons with `none` are null for `none` itself, and everywhere if it was not run.

        A score other than 0 or 1 has intervals of means (`mean_of`), no baseline, no test against
            guessing, no `lost` and no `gained`. Its `p_mcnemar` is Fisher's randomization test
            (`sign_test`). Scores of different kinds or directions have no mean over tasks.

    Raises:
        UsageError: there are no samples.
    """
    if samples.empty:
        raise UsageError("samples: must hold at least one question")
    samples = with_scores(samples.reset_index(drop=True))
    samples = samples.assign(
        hookpoint=samples.get("hookpoint", "embed"),
        source=sources(samples),
        chance=chances(samples),
        **{name: pd.to_numeric(samples[name]).astype(float) for name in ("acc", "acc_norm")},
        **measured(samples),
    )
    place, is_none = ["task", "doc_id"], samples["condition"] == "none"
    of_none = samples.loc[is_none, [*place, *_CHANGING]]
    clean = samples[place].merge(of_none, how="left", validate="many_to_one")[_CHANGING]
    clean = clean.mask(is_none).add_prefix("clean_")
    of_places = groups(samples[_SUMMARISED].join(clean), KEYS)
    table = pd.DataFrame([_row(group) for _, group in of_places])
    table["p_chance_holm"] = holm_over_tasks(table, "p_chance")
    table["p_mcnemar_holm"] = holm_over_tasks(table, "p_mcnemar")
    differs = table["p_chance_holm"] <= ALPHA
    side = np.where(table["acc"] > table["baseline"], ABOVE, BELOW)
    verdict = np.where(differs, side, np.where(table["_tells"], INDISTINGUISHABLE, TOO_FEW))
    table["verdict"] = pd.Series(verdict, dtype=object).where(table["p_chance"].notna())
    ratio = {name: info.get("snr_db") for name, info in (attacks or {}).items()}
    table["snr_db"] = table["condition"].map(ratio).astype(float)
    plain = ("baseline", "snr_db", "gold_probability", "log_likelihood_change", "margin_change")
    table, columns = _with_scores_of_tasks(table, of_tasks or {})
    return with_means(table, columns, ("acc", "acc_norm", "drop"), plain)


def _with_scores_of_tasks(
    table: pd.DataFrame, of_tasks: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> tuple[pd.DataFrame, list[str]]:
    """Adds a column for each score of a whole task. Returns the table and its final columns."""
    places = zip(table["condition"], table["task"], strict=True)
    scores = [of_tasks.get(condition, {}).get(task, {}) for condition, task in places]
    names = list(dict.fromkeys(name for of_place in scores for name in of_place))
    more = {
        f"{OF_TASK}{name}": [of_place.get(name, np.nan) for of_place in scores] for name in names
    }
    columns = [*_TABLE, *more]
    plain = (table[SCORE] == [ACC, CHOICE, HIGHER]).all(axis=None)
    if plain and not more:
        columns = [name for name in columns if name not in SCORE]
    return table.assign(**more), columns


_CLEAN = {"acc": "clean_acc", "gold_probability": "clean_gold_probability"}
_HERE = {"acc": "acc", "gold_probability": "gold_probability"}
_COMPARED = ("detectable", "design_effect", "p_mcnemar", "p_gold_probability")


def _row(group: Columns) -> dict[str, Any]:
    """Summarises one task's questions under one condition, without Holm's adjustment."""
    chance, n = group["chance"], len(group["chance"])
    row = {
        **{key: group[key][0] for key in (*KEYS, *_OF_CONDITION, *SCORE)},
        "n": n,
        "clusters": len(np.unique(group["source"])),
        "n_choices_min": group["n_choices"].min(),
        "n_choices_max": group["n_choices"].max(),
        "baseline": mean_known(chance),
        "p_chance": np.nan,
        "_tells": np.isnan(chance).any()  # such a score is not tested against guessing
        or n > _ENOUGH
        or tells_from_guessing(chance),
        "gold_probability": mean_known(group["gold_probability"]),
        **_accuracy(group, "acc"),
        **_accuracy(group, "acc_norm"),
    }
    if row["kind"] == CHOICE:
        row["p_chance"] = chance_test(int(group["acc"].sum()), chance)
    for name in ("log_likelihood", "margin"):
        row[f"{name}_change"] = mean_known(group[name] - group[f"clean_{name}"])
    paired = ~np.isnan(group["clean_acc"])
    if not paired.any():
        drops = [f"{name}{end}" for name in DROPS.values() for end in ("", "_low", "_high")]
        missing = {**dict.fromkeys((*drops, *_COMPARED), np.nan), "_change": None}
        return {**row, **missing, **dict.fromkeys(("lost", "gained"), pd.NA)}
    pairs = group if paired.all() else {name: column[paired] for name, column in group.items()}
    return row | as_drops(compared(pairs, _CLEAN, _HERE), row["better"])


def mean_known(values: np.ndarray) -> float:
    """The mean without NaN; NaN if there are no other numbers."""
    known = ~np.isnan(values)
    return float(np.where(known, values, 0).sum() / known.sum()) if known.any() else np.nan


def _accuracy(group: Columns, metric: str) -> dict[str, float]:
    values = group[metric]
    low = high = np.nan
    if not np.isnan(values).any():
        if metric != "acc" or counted(group):
            effect = design_effect(values, group["source"])
            low, high = wilson(values.sum() / effect, len(values) / effect)
        elif np.ptp(values) > 0:
            _, low, high, _ = mean_of([(values, group["source"])])
            ends = (0, 1) if group["kind"][0] == SHARE else (-np.inf, np.inf)
            low, high = (float(np.clip(end, *ends)) for end in (low, high))
    return {metric: values.mean(), f"{metric}_low": low, f"{metric}_high": high}


def holm_over_tasks(table: pd.DataFrame, column: str) -> pd.Series:
    """The p-values of a column, adjusted over the tasks of each condition."""
    return table.groupby("condition", sort=False)[column].transform(holm)


def averaged(tasks: Columns) -> bool:
    """Whether tasks have a mean: one score, or scores from 0 to 1 with the same direction."""
    if all(len({*tasks[key]}) == 1 for key in SCORE):
        return True
    return len({*tasks["better"]}) == 1 and NUMBER not in {*tasks["kind"]}


def with_means(
    table: pd.DataFrame, columns: list[str], measured: Iterable[str], plain: Iterable[str]
) -> pd.DataFrame:
    """Appends the mean over tasks of every condition, and puts `columns` in order.

    Args:
        table: a row per task and condition, with the `_change` of `compared`.
        columns: the columns of the result. In rows of means, those without a mean or total are
            null.
        measured: columns that have an interval in `..._low` and `..._high`.
        plain: other columns to average.
    """
    means = []
    for condition, group in groups(table, "condition"):
        mean: dict[str, Any] = {"task": MEAN, "condition": condition}
        mean |= {key: group[key][0] for key in _OF_CONDITION if key in columns}
        if not averaged(group):
            means.append(mean | {"n": group["n"].sum(), "score": SEVERAL})
            continue
        mean |= {key: group[key].mean() for key in (*measured, *plain)}
        for key in measured:
            ends = mean_interval(group[key], group[f"{key}_low"], group[f"{key}_high"])
            mean[f"{key}_low"], mean[f"{key}_high"] = ends
        for key in (key for key in SCORE if key in columns):
            mean[key] = group[key][0] if len({*group[key]}) == 1 else SEVERAL
        for key in (key for key in _COUNTS if key in columns):
            total = {"n_choices_min": min, "n_choices_max": max}.get(key, sum)
            mean[key] = pd.NA if pd.isna(group[key]).any() else total(group[key])
        means.append(mean | pooled(group))
    both = [*table.to_dict("records"), *means]
    types = {key: "Int64" for key in _COUNTS if key in columns}
    return pd.DataFrame(both, columns=columns).astype(types)
