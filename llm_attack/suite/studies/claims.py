"""The claims of arXiv 2205.01493 about language models, each tested on a run's samples.

A claim holds, does not hold, or is not shown. A test that finds nothing is no evidence. So "does
not hold" needs a test of its own, and so does "equals guessing".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd
from scipy.special import ndtr, ndtri

from llm_attack.attacks.settings import ATTACKS, BOUNDED_NOISE, FIXED, NOISE, OF_TOKENS, ROUNDINGS
from llm_attack.stats import ALPHA, Mean, auc, detectable, equivalence_test, mean_of
from llm_attack.suite.analysis.conditions import Conditions, by_name
from llm_attack.suite.analysis.outcomes import (
    LOWER,
    chances,
    measured,
    right,
    sources,
    with_scores,
)
from llm_attack.suite.analysis.pairs import OUTCOMES, in_pairs
from llm_attack.suite.analysis.summary import MEAN, SCORE
from llm_attack.suite.plan import WORST
from llm_attack.suite.report.tables import Cells

HOLDS, NOT, UNSHOWN = "holds", "does not hold", "not shown"
TITLE = "the paper's claims"
WITHIN = 2.0  # percentage points; smaller differences count as none

_TRAITS = {**ATTACKS, **FIXED}
_CONTROLS = (
    *(name for name, kind in _TRAITS.items() if kind.control),
    *ROUNDINGS,
    *OF_TOKENS,
    WORST,
)


class Claim(NamedTuple):
    """A claim of the paper and its verdict for one condition.

    Attributes:
        text: the claim.
        condition: name of the condition.
        verdict: HOLDS, NOT or UNSHOWN.
        figure: the number behind the verdict, with its 95 % interval.
    """

    text: str
    condition: str
    verdict: str
    figure: str


def claims(
    samples: pd.DataFrame, within: float = WITHIN, known: Conditions | None = None
) -> list[Claim]:
    """Every claim about every attack of a run, in the run's order.

    Args:
        samples: a row per question and condition, as in `samples.parquet`, at one hookpoint.
        within: percentage points; smaller differences count as none.
        known: the conditions of the run; by default, those that the names show.
    """
    known = by_name(samples) if known is None else known
    rows = with_scores(samples).assign(**measured(samples), chance=chances(samples))
    rows = rows.assign(source=sources(rows), right=right(rows))
    by = {str(name): group for name, group in rows.groupby("condition", sort=False)}
    if "none" not in by:
        return []
    made, costs = [], _costs(by, known, within)
    for name, after in by.items():
        made += [claim for claim in costs if claim.condition == name]
        if str(after["attack"].iloc[0]) not in _CONTROLS:
            made += [*_guesses(after, within), *_falls_first(by["none"], after)]
    return [*made, *_cosines(by["none"])]


def cells(claimed: list[Claim]) -> Cells:
    """The claims as a table."""
    notes = [
        f"{HOLDS}, {NOT}: shown, at {ALPHA:g}; {UNSHOWN}: the data show neither. Points are"
        f" percentage points of accuracy, mean over tasks. Differences within ±{WITHIN:g} count as"
        " none (equivalence: two one-sided tests)",
        "AUC: of two questions, the probability that the one that the claim names has the smaller"
        " value (by ranks within tasks)",
    ]
    return Cells(["claim", "condition", "verdict", "figure"], [list(c) for c in claimed], notes)


def _comparisons(
    by: Mapping[str, pd.DataFrame], known: Conditions
) -> Iterator[tuple[str, str, str]]:
    """Each claim about a cost in accuracy, with the conditions before and after."""
    named = {(condition.attack, condition.amplitude): name for name, condition in known.items()}
    for name, after in by.items():
        attack = str(after["attack"].iloc[0])
        if attack in NOISE:
            yield f"{attack} noise costs accuracy", "none", name
        if attack not in _CONTROLS:
            yield "the attack costs accuracy", "none", name
            controls = (named.get((noise, known[name].amplitude)) for noise in BOUNDED_NOISE)
            noise = next((control for control in controls if control in by), None)
            if noise is not None:
                yield "it costs more than noise of the same amplitude", noise, name


def _costs(by: Mapping[str, pd.DataFrame], known: Conditions, within: float) -> list[Claim]:
    """Whether accuracy falls from one condition to another, by the test of the mean over tasks."""
    place, compared = ["task", "doc_id"], list(_comparisons(by, known))
    pairs = [
        by[before][[*place, "source", *SCORE, *OUTCOMES]]
        .merge(by[after][[*place, *OUTCOMES]], on=place, suffixes=("_a", "_b"))
        .assign(condition=i)
        for i, (_, before, after) in enumerate(compared)
    ]
    if not pairs:
        return []
    frame = in_pairs(pd.concat(pairs, ignore_index=True), by["none"]["task"].value_counts())
    means = frame[frame["task"] == MEAN].to_dict("records")
    return [
        _falls(text, name, mean, within)
        for (text, _, name), mean in zip(compared, means, strict=True)
    ]


def _falls(text: str, name: str, mean: Mapping[Any, Any], within: float) -> Claim:
    """Whether accuracy falls, by the mean over tasks in a frame of `paired`."""
    if pd.isna(mean["difference"]):
        return Claim(text, name, UNSHOWN, "the scores of the tasks have no mean")
    error = mean["detectable"] / 100 / detectable([1])
    none = float(equivalence_test(mean["difference"] / 100, error, within / 100))
    drop, ends = -mean["difference"], (-mean["difference_high"], -mean["difference_low"])
    if mean.get("better") == LOWER:
        drop, ends = -drop, (-ends[1], -ends[0])
    verdict = UNSHOWN
    if mean["p_mcnemar"] <= ALPHA:
        verdict = HOLDS if drop > 0 else NOT
    elif none <= ALPHA:
        verdict = NOT
    return Claim(
        text,
        name,
        verdict,
        f"{drop:.1f} points ({ends[0]:.1f} to {ends[1]:.1f}), p ="
        f" {mean['p_mcnemar']:.2g}; equivalence p = {none:.2g}",
    )


def _guesses(after: pd.DataFrame, within: float) -> Iterator[Claim]:
    """Whether the mean accuracy equals that of guesses, by an equivalence test.

    Tasks whose score cannot be guessed do not count.
    """
    over = after.assign(over=100 * (after["acc"] - after["chance"]))
    over = over[over["chance"].notna()]
    if over.empty:
        return
    distance = mean_of(
        [(task["over"], task["source"]) for _, task in over.groupby("task", sort=False)]
    )
    error = (distance.high - distance.value) / ndtri(1 - ALPHA / 2)
    equal = float(ndtr((abs(distance.value) - within) / error)) if error > 0 else 1.0
    differs = float(ndtr((within - abs(distance.value)) / error)) if error > 0 else 1.0
    verdict = HOLDS if equal <= ALPHA else NOT if differs <= ALPHA else UNSHOWN
    yield Claim(
        "its accuracy equals guessing",
        str(after["condition"].iloc[0]),
        verdict,
        f"{distance.value:+.1f} points from guessing ({distance.low:+.1f} to {distance.high:+.1f});"
        f" equivalence p = {equal:.2g}",
    )


def _falls_first(clean: pd.DataFrame, after: pd.DataFrame) -> Iterator[Claim]:
    """Whether, of the questions right without an attack, those with a small margin fall first."""
    place = ["task", "doc_id"]
    first = clean[clean["right"] & clean["margin"].notna()]
    first = first.assign(margin=_ranks(first, "margin"))
    both = first[[*place, "margin"]].merge(after[[*place, "right"]], on=place)
    lost = ~both["right"]
    name = str(after["condition"].iloc[0])
    if lost.any() and not lost.all():
        order = auc(both.loc[lost, "margin"], both.loc[~lost, "margin"])
        yield _by_order("questions of small margin fall first", name, order)


def _cosines(clean: pd.DataFrame) -> Iterator[Claim]:
    """Whether right questions have the lower cosine: the paper's Fig. 6 for a language model."""
    known = clean[clean["cosine"].notna()]
    known = known.assign(cosine=_ranks(known, "cosine"))
    of_right, of_wrong = (known.loc[known["right"] == is_right, "cosine"] for is_right in (1, 0))
    if len(of_right) and len(of_wrong):
        text = "right answers have lower cosines of embeddings and gradient"
        yield _by_order(text, "none", auc(of_right, of_wrong))


def _ranks(rows: pd.DataFrame, column: str) -> pd.Series:
    """Ranks within tasks as shares. So differences between tasks do not matter."""
    return rows[column].astype(float).groupby(rows["task"]).rank(pct=True)


def _by_order(text: str, name: str, order: Mean) -> Claim:
    verdict = HOLDS if order.low > 0.5 else NOT if order.high < 0.5 else UNSHOWN
    figure = f"AUC {order.value:.2f} ({order.low:.2f} to {order.high:.2f})"
    return Claim(text, name, verdict, figure)
