"""Is one model more robust than another? The paired difference of their drops.

A drop is how much worse a score is under an attack than under `none`. The drops of two runs are
compared question by question, so questions on which both models lose cancel.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from llm_attack.base.errors import UsageError
from llm_attack.stats import Mean, mean_of, sign_test
from llm_attack.suite.analysis.conditions import Conditions
from llm_attack.suite.analysis.outcomes import LOWER, sources, with_scores
from llm_attack.suite.analysis.pairs import aligned_samples
from llm_attack.suite.analysis.summary import MEAN, holm_over_tasks

_PLACE = ["task", "doc_id"]
_COLUMNS = [
    *("task", "condition", "n", "drop_a", "drop_b", "difference"),
    *("difference_low", "difference_high", "p", "p_holm"),
]


def differences(
    samples_a: pd.DataFrame,
    questions_a: pd.DataFrame,
    samples_b: pd.DataFrame,
    questions_b: pd.DataFrame,
    conditions: tuple[Conditions, Conditions] | None = None,
) -> pd.DataFrame:
    """Drops of run b minus those of run a, on the questions that both asked in the same words.

    Args:
        samples_a: a row per question and condition of run a, as in `samples.parquet`.
        questions_a: a row per question of run a, as in `questions.parquet`.
        samples_b: the same for run b.
        questions_b: the same for run b.
        conditions: the conditions of both runs. Conditions with the same name and other settings
            are not compared. None: conditions with the same name are the same.

    Returns:
        A row per task and condition that both runs have in addition to `none`, then for every
            condition the mean over tasks. Empty if there is no such condition, or no `none`.
            Columns:

        - `task`, `condition`
        - `n`: number of questions
        - `drop_a`, `drop_b`, `difference` = b - a in percentage points. The difference is above 0
          if a is more robust
        - `difference_low`, `difference_high`: paired 95 % interval, by clusters of questions
          (`stats.mean_of`)
        - `p`: test of no difference (`stats.sign_test`). That of the mean is stratified by task
        - `p_holm`: the same, adjusted over tasks
    """
    known = set(samples_a["condition"]) & set(samples_b["condition"])
    if conditions is not None:
        a_of, b_of = conditions
        samples_a, samples_b, _ = aligned_samples(samples_a, samples_b, conditions)
        same = {
            name
            for name, condition in a_of.items()
            if any(condition == there for there in b_of.values())
        }
        known = set(samples_a["condition"]) & set(samples_b["condition"]) & same
    attacks = [name for name in samples_a["condition"].unique() if name in known - {"none"}]
    if "none" not in known or not attacks:
        return pd.DataFrame(columns=_COLUMNS)
    question = [*_PLACE, "doc_hash"]
    asked = questions_a[question].merge(questions_b[question])[_PLACE]
    a = with_scores(samples_a).assign(source=sources(samples_a))
    sides = [
        asked.merge(run.pivot(index=_PLACE, columns="condition", values="acc"), on=_PLACE)
        for run in (a, samples_b)
    ]
    of_question = a.drop_duplicates(_PLACE)[[*_PLACE, "source", "better"]]
    about = asked.merge(of_question, on=_PLACE, how="left")
    if len(about) != len(sides[0]) or len(about) != len(sides[1]):
        raise UsageError("compare: a run has questions without answers")
    sign = np.where(about["better"] == LOWER, -1.0, 1.0)
    rows = []
    for condition in attacks:
        drops = [sign * (side["none"] - side[condition]).to_numpy(float) for side in sides]
        frame = about.assign(a=drops[0], b=drops[1], step=drops[1] - drops[0])
        of_tasks = frame.dropna(subset="step").groupby("task", sort=False)
        tasks = {str(task): frame for task, frame in of_tasks}
        each = [_row(task, condition, [frame]) for task, frame in tasks.items()]
        rows += each
        if tasks:
            rows.append(_row(MEAN, condition, list(tasks.values())))
    table = pd.DataFrame(rows, columns=_COLUMNS)
    means = table["task"] == MEAN
    table["p_holm"] = table["p"]
    table.loc[~means, "p_holm"] = holm_over_tasks(table[~means], "p")
    return pd.concat([table[~means], table[means]], ignore_index=True)


def _row(task: str, condition: str, tasks: list[pd.DataFrame]) -> dict[str, object]:
    """The row of one task, or of the mean over several."""
    steps = [(task["step"].to_numpy(float), task["source"].to_numpy()) for task in tasks]
    mean: Mean = mean_of(steps)
    net = [np.bincount(np.unique(source, return_inverse=True)[1], step) for step, source in steps]
    low, high = (mean.low, mean.high) if mean.high > mean.low else (np.nan, np.nan)
    drop_a, drop_b = (float(np.mean([task[run].mean() for task in tasks])) for run in "ab")
    return {
        **{"task": task, "condition": condition, "n": sum(map(len, tasks))},
        **{"drop_a": 100 * drop_a, "drop_b": 100 * drop_b, "difference": 100 * mean.value},
        **{"difference_low": 100 * low, "difference_high": 100 * high},
        "p": sign_test(net, list(map(len, tasks))),
    }
