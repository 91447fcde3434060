"""Two runs compared on the questions that both asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from llm_attack.base.errors import UsageError
from llm_attack.suite.analysis.changes import compared
from llm_attack.suite.analysis.conditions import Conditions, aligned
from llm_attack.suite.analysis.outcomes import (
    ACC,
    CHOICE,
    HIGHER,
    groups,
    kind_of,
    measured,
    sources,
    with_scores,
)
from llm_attack.suite.analysis.summary import KEYS, SCORE, holm_over_tasks, mean_known, with_means

OUTCOMES = ("acc", "gold_probability")


def paired(
    samples_a: pd.DataFrame,
    questions_a: pd.DataFrame,
    samples_b: pd.DataFrame,
    questions_b: pd.DataFrame,
    conditions: tuple[Conditions, Conditions] | None = None,
) -> pd.DataFrame:
    """Compares run b with run a on the questions that both asked in the same words.

    If two conditions have the same name and differ, the name shows the difference
    (`conditions.aligned`).

    Args:
        samples_a: a row per question and condition of run a, as in `samples.parquet`.
        questions_a: a row per question of run a, as in `questions.parquet`. Questions are paired if
            `task`, `doc_id` and `doc_hash` agree.
        samples_b: the same for run b.
        questions_b: the same for run b.
        conditions: the conditions of both runs. None: conditions with the same name are the same.

    Returns:
        A row per task and condition that both runs have, in the order of run a, then for every
            condition the mean over tasks. Columns:

        - `task`, `condition`
        - `n`: number of paired questions
        - `left_out`: questions of either run without a partner
        - `acc_a`, `acc_b`, `difference`: accuracies, and that of b minus that of a in percentage
          points
        - `difference_low`, `difference_high`: 95 % interval (`paired_interval`; of a mean:
          `mean_interval`)
        - `detectable`: smallest difference that this number of questions shows with power 0.8
        - `lost`, `gained`: questions right in a and wrong in b, and the reverse
        - `p_mcnemar`: exact test (`sign_test`); `p_mcnemar_holm`: adjusted over the tasks of a
          condition
        - `clusters`, `design_effect`, `gold_difference...`, `p_gold_probability`: as in `summarise`

    Raises:
        UsageError: the runs share no task, no condition or no question.
    """
    samples_a, samples_b, _ = aligned_samples(samples_a, samples_b, conditions)
    for key in KEYS:
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
    columns = [*place, "condition", *OUTCOMES]
    a, b = (
        with_scores(run).assign(**measured(run), source=sources(run))
        for run in (samples_a, samples_b)
    )
    _check_scores(a, b)
    pairs = a[[*columns, "source", *SCORE]].merge(
        b[columns], on=columns[:3], suffixes=("_a", "_b"), validate="one_to_one"
    )
    return in_pairs(pairs.merge(same, on=place), asked_of_task)


def in_pairs(pairs: pd.DataFrame, asked: Mapping[Any, int]) -> pd.DataFrame:
    """The frame of `paired`.

    Args:
        pairs: a row per question and condition: `task`, `condition`, `source`, `SCORE`, and each of
            `OUTCOMES` with the suffixes `_a` and `_b`.
        asked: the number of questions of either run, by task.
    """
    of_a, of_b = ({key: f"{key}_{run}" for key in OUTCOMES} for run in "ab")
    both = [f"acc_{run}" for run in "ab"]
    pairs[both] = pairs[both].astype(float)
    kinds = {  # the kind that the values of both runs need
        task: kind_of(np.concatenate([group[acc] for acc in both]), group["kind"][0])
        for task, group in groups(pairs[["task", "kind", *both]], "task")
    }
    rows = []
    for (task, condition), group in groups(pairs.assign(kind=pairs["task"].map(kinds)), KEYS):
        n, change = len(group["source"]), compared(group, of_a, of_b)
        rows.append(
            {
                **{"task": task, "condition": condition, "n": n},
                **{key: group[key][0] for key in SCORE},
                **{"left_out": asked[task] - n, "clusters": len(np.unique(group["source"]))},
                **{key: mean_known(group[key]) for key in both},
                **change,
            }
        )
    frame = pd.DataFrame(rows)
    frame["p_mcnemar_holm"] = holm_over_tasks(frame, "p_mcnemar")
    plain = (frame[SCORE] == [ACC, CHOICE, HIGHER]).all(axis=None)
    hidden = ["_change", *(SCORE if plain else [])]
    columns = [name for name in frame if name not in hidden]
    return with_means(frame, columns, ("difference",), both)


def _check_scores(a: pd.DataFrame, b: pd.DataFrame) -> None:
    """Raises `UsageError` if a task has different scores in the two runs."""
    of_a, of_b = (samples.drop_duplicates("task").set_index("task")["score"] for samples in (a, b))
    for task in of_a.index.intersection(of_b.index):
        if of_a[task] != of_b[task]:
            raise UsageError(
                f"compare: the score of {task} is {of_a[task]} in one run and {of_b[task]} in the"
                " other; must be the same"
            )


def unshared(
    samples_a: pd.DataFrame,
    questions_a: pd.DataFrame,
    samples_b: pd.DataFrame,
    questions_b: pd.DataFrame,
    conditions: tuple[Conditions, Conditions] | None = None,
) -> list[str]:
    """Sentences on conditions that differ, and on tasks and conditions that `paired` leaves out."""
    samples_a, samples_b, sentences = aligned_samples(samples_a, samples_b, conditions)
    for key in KEYS:
        for run, ours, theirs in (("a", samples_a, samples_b), ("b", samples_b, samples_a)):
            alone = [x for x in ours[key].unique() if x not in set(theirs[key])]
            if alone:
                sentences.append(f"{key}s only in run {run}: {', '.join(alone)}")
    same = set(questions_a.merge(questions_b, on=["task", "doc_id", "doc_hash"])["task"])
    both = set(questions_b["task"])
    foreign = [x for x in questions_a["task"].unique() if x in both and x not in same]
    if foreign:
        sentences.append(f"no question is the same in both runs: {', '.join(foreign)}")
    return sentences


def aligned_samples(
    samples_a: pd.DataFrame,
    samples_b: pd.DataFrame,
    conditions: tuple[Conditions, Conditions] | None,
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """The samples with names of conditions that mean the same in both runs; see `aligned`."""
    if conditions is None:
        return samples_a, samples_b, []
    *names, sentences = aligned(*conditions)
    a, b = (
        run.assign(condition=run["condition"].map(new_names))
        for run, new_names in zip((samples_a, samples_b), names, strict=True)
    )
    return a, b, sentences
