"""Certificates by randomised smoothing: from votes to radii, and the certified accuracy.

The procedure is CERTIFY of Cohen, Rosenfeld and Kolter 2019 (arXiv 1902.02918). The certified
classifier is the *vote*: the choice that the model prefers most often under Gaussian noise. All
functions are pure functions over the frame of `certificates.parquet`, which `certified` makes.

A radius is a lower bound for the vote. A critical epsilon is an upper bound for the network without
noise. They are about different classifiers, so neither bounds the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import ndtri

from llm_attack.stats import design_effect, least_share, mean_interval, wilson
from llm_attack.suite.analysis.conditions import Condition
from llm_attack.suite.analysis.outcomes import right, sources
from llm_attack.suite.analysis.summary import MEAN

SMOOTHING = "smoothing"  # the key in run.json
STEP = 0.5  # distance of the radii in `accuracies`, in sigma
_PLACE = ["task", "doc_id"]


def radius(share: ArrayLike, sigma: ArrayLike) -> np.ndarray:
    """The certified radius in L2: sigma Φ⁻¹(share), or 0 if the share is not above one half.

    Args:
        share: lower bound of the probability that the model prefers the choice under noise.
        sigma: standard deviation of the noise in each coordinate.
    """
    share = np.asarray(share, dtype=float)
    return np.where(share > 0.5, np.asarray(sigma) * ndtri(np.maximum(share, 0.5)), 0.0)


def largest_radius(sigma: float, draws: int, level: float) -> float:
    """The radius if all draws agree. No radius of this many draws is larger."""
    return float(radius(least_share(draws, draws, level), sigma))


def certified(counts: pd.DataFrame, level: float) -> pd.DataFrame:
    """Makes certificates of votes.

    Args:
        counts: a row per question and sigma, with the columns `task`, `doc_id`, `cluster`,
            `smoothing` (the name of sigma), `sigma`, `n_choices`, `gold`, `selection_votes` and
            `votes` (counts of each choice in the two parts of the draws).
        level: largest probability with which a certificate may be wrong.

    Returns:
        The frame with more columns:

        - `vote`: the choice with the most `selection_votes`, the first of equal ones
        - `hits`: the `votes` for it
        - `p_lower`: lower bound of the probability of this choice under noise (Clopper-Pearson,
          one-sided, wrong with a probability of at most `level`)
        - `radius`: `radius(p_lower, sigma)`, in the units of the point
        - `abstained`: whether `p_lower` is at most one half, so nothing is certified
        - `right`: whether the vote did not abstain and is a right choice
    """
    vote = [int(np.argmax(votes)) for votes in counts["selection_votes"]]
    hits = [int(votes[i]) for votes, i in zip(counts["votes"], vote, strict=True)]
    drawn = [int(np.sum(votes)) for votes in counts["votes"]]
    lower = least_share(hits, drawn, level)
    is_gold = [i in set(gold) for i, gold in zip(vote, counts["gold"], strict=True)]
    return counts.assign(
        vote=vote,
        hits=hits,
        p_lower=lower,
        radius=radius(lower, counts["sigma"]),
        abstained=lower <= 0.5,
        right=np.array(is_gold, dtype=bool) & (lower > 0.5),
    )


def accuracies(frame: pd.DataFrame, largest: Mapping[str, float]) -> pd.DataFrame:
    """The frame of `certified.csv`: the certified accuracy at radii from 0 on.

    It is the share of questions whose vote is right with a radius above this one, so no
    perturbation of this length changes the vote. At 0 it is the accuracy of the vote, where
    abstaining counts as wrong.

    Args:
        frame: the result of `certified`.
        largest: the largest possible radius of each smoothing (`largest_radius`).

    Returns:
        A row per task, smoothing and radius; then the mean over tasks. Columns: `task`,
            `smoothing`, `sigma`, `radius` in the units of the point, `radius_in_sigma`, `n`,
            `certified`, `low`, `high` (95 % interval over questions: Wilson's, which allows for
            shared sources; of a mean: `mean_interval`).
    """
    rows = []
    for name, of_sigma in frame.groupby("smoothing", sort=False):
        sigma = float(of_sigma["sigma"].iloc[0])
        for steps in np.arange(0, largest[str(name)] / sigma, STEP):
            tasks = [
                _share(task, group, steps * sigma)
                for task, group in of_sigma.groupby("task", sort=False)
            ]
            of_radius = {"smoothing": name, "sigma": sigma, "radius": steps * sigma}
            of_radius["radius_in_sigma"] = steps
            rows += [of_radius | row for row in (*tasks, *_mean(tasks))]
    order = [*dict.fromkeys(frame["task"]), MEAN]
    table = pd.DataFrame(rows)
    table = table.sort_values("task", key=lambda tasks: tasks.map(order.index), kind="stable")
    first = ["task", "smoothing"]
    return table[first + [name for name in table if name not in first]].reset_index(drop=True)


def _share(task: Any, group: pd.DataFrame, at: float) -> dict[str, Any]:
    kept = (group["right"] & (group["radius"] > at)).to_numpy(float)
    effect = design_effect(kept, sources(group))
    low, high = wilson(kept.sum() / effect, len(kept) / effect)
    return {"task": task, "n": len(kept), "certified": kept.mean(), "low": low, "high": high}


def _mean(tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean over tasks as a list of one row; no row for one task."""
    if len(tasks) < 2:
        return []
    values, low, high = ([row[name] for row in tasks] for name in ("certified", "low", "high"))
    ends = mean_interval(values, low, high)
    row: dict[str, Any] = {"task": MEAN, "n": sum(row["n"] for row in tasks)}
    return [row | {"certified": float(np.mean(values)), "low": ends[0], "high": ends[1]}]


def nearest_found(samples: pd.DataFrame, known: Mapping[str, Condition]) -> pd.Series | None:
    """The critical epsilon of each question in L2, by task and doc_id; None if none was searched.

    It is the smallest that an attack of the run found, so an upper bound for the network.

    Args:
        samples: as in `samples.parquet`.
        known: the conditions of the run. Only searches with norm `l2` count, which perturb the
            coordinates of a question together.
    """
    in_l2 = [name for name, condition in known.items() if condition.get("norm") == "l2"]
    found = samples[samples["condition"].isin(in_l2) & samples["critical_epsilon"].notna()]
    return None if found.empty else found.groupby(_PLACE, sort=False)["critical_epsilon"].min()


def beside(
    frame: pd.DataFrame, samples: pd.DataFrame, known: Mapping[str, Condition]
) -> pd.DataFrame:
    """A summary per task and smoothing, and over all questions, with critical epsilons beside.

    Args:
        frame: the result of `certified`.
        samples: as in `samples.parquet`.
        known: the conditions of the run.

    Returns:
        Columns:

        - `task` (of all questions together: `MEAN`), `smoothing`, `sigma`, `n`
        - `clean`: accuracy without noise (NaN without `none`)
        - `vote`: accuracy of the vote, where abstaining counts as wrong; both are means over tasks
          in the last row
        - `abstained`: number of questions
        - `median_radius`: median over the questions whose vote is right; NaN if there are none
        - `median_critical`: critical epsilon of the same questions, if it was searched in L2
        - `ratio`: median over these questions of critical epsilon / radius
        - `nearer`: the number of them whose critical epsilon is not above the radius
    """
    found = nearest_found(samples, known)
    with_found = frame.assign(
        critical=np.nan
        if found is None
        else frame[_PLACE]
        .merge(found.reset_index(), how="left", on=_PLACE)["critical_epsilon"]
        .to_numpy(float)
    )
    none = samples[samples["condition"] == "none"]
    clean = right(none).groupby(none["task"], sort=False).mean()
    rows = []
    for name, of_sigma in with_found.groupby("smoothing", sort=False):
        groups = list(of_sigma.groupby("task", sort=False))
        votes = {task: group["right"].mean() for task, group in groups}
        groups += [(MEAN, of_sigma)] * (len(groups) > 1)
        for task, group in groups:
            of_task = task != MEAN
            rows.append(
                {
                    **{"task": task, "smoothing": name, "sigma": group["sigma"].iloc[0]},
                    "n": len(group),
                    "clean": clean.get(task, np.nan) if of_task else clean.mean(),
                    "vote": votes[task] if of_task else np.mean([*votes.values()]),
                    "abstained": int(group["abstained"].sum()),
                    **_of_right(group[group["right"]]),
                }
            )
    return pd.DataFrame(rows)


def _of_right(group: pd.DataFrame) -> dict[str, Any]:
    """The medians of `beside` over the questions whose vote is right."""
    searched = group["critical"].notna().any()
    missing = np.nan
    ratio = group["critical"] / group["radius"]
    return {
        "median_radius": group["radius"].median() if len(group) else missing,
        "median_critical": group["critical"].median() if searched else missing,
        "ratio": ratio.median() if searched else missing,
        "nearer": int((ratio <= 1).sum()) if searched else missing,
    }
