"""A checklist for a run: did the attacks work, or does the model hide its gradient?

The checks follow Carlini et al. 2019 (arXiv 1902.06705, section 5) and Pintor et al. 2022 (arXiv
2106.09947). They look for signs of a weak evaluation, which a robust model would not show. They
need only the samples of a run. `doctor` adds checks that need more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llm_attack.attacks.settings import ATTACKS, BOUNDED_NOISE, kind_of
from llm_attack.stats import ALPHA, Mean, mean_of, wilson
from llm_attack.suite.analysis.conditions import Condition, Conditions, of_run
from llm_attack.suite.analysis.outcomes import measured, right, sources
from llm_attack.suite.analysis.worst import (
    SEARCH,
    attacks_at,
    comparable_attacks,
    hidden_gradients,
    knows_gold,
)
from llm_attack.suite.report.tables import Cells

PASSES, FAILS, NOT_APPLICABLE = "passes", "fails", "not applicable"
TITLE = "sanity checks"

# A gradient is hidden if a larger share of its coordinates is zero.
_ZEROS = 0.1
# Largest accuracy at amplitudes as large as the signal, if the loss knows the gold.
_FLOOR = 0.1
LARGE = 0.5  # of the RMS; at such amplitudes nothing should be left
_FEW = 10  # with fewer questions, no test shows anything

_STEPWISE = tuple(name for name, kind in ATTACKS.items() if kind.stepwise)


class Check(NamedTuple):
    """A check, its verdict, and the number behind it.

    Attributes:
        name: what should be true.
        verdict: PASSES, FAILS or NOT_APPLICABLE.
        figure: the number behind the verdict, or the reason why there is none.
    """

    name: str
    verdict: str
    figure: str


def checks(samples: pd.DataFrame, run: Mapping[str, Any]) -> list[Check]:
    """All checks. A check that the samples of the run do not allow is not applicable.

    Args:
        samples: a row per question and condition, as in `samples.parquet`.
        run: the content of `run.json`, for the conditions in `attacks` and the loss in `settings`.
    """
    knows, known = knows_gold(run), of_run(run, samples)
    some = samples.assign(outcome=outcome(samples, knows), source=sources(samples))
    some = some.drop(columns="log_likelihoods")  # the rest is selected from many times
    by = {str(name): rows for name, rows in some.groupby("condition", sort=False)}
    noise, steps, larger = (
        [(label, by[before], by[after]) for label, before, after in pairs(some, known)]
        for pairs in (_noise_and_gradient, _one_and_many, _small_and_large)
    )
    return [
        _compared("random is weaker than the gradient", noise, strictly=True),
        _compared("steps are not weaker than one", steps),
        _compared("a larger epsilon does not help the model", larger),
        _floor(some, run.get("attacks", {}), knows),
        _zeros(run.get("attacks", {}), known),
        _search(some, known),
    ]


def outcome(samples: pd.DataFrame, knows: bool) -> pd.Series:
    """The value that attacks lower: the gold's margin, or the mean log-likelihood, in nats."""
    return measured(samples)["margin" if knows else "log_likelihood"]


def cells(checked: Iterable[Check]) -> Cells:
    """The checks as a table."""
    notes = [
        "after Carlini et al. 2019 and Pintor et al. 2022. A failed check means that the attacks"
        " were too weak or that the model hides its gradient, and not that the model is robust",
        "nats: fall of the margin of the right choice if the loss knows the label, and else of"
        " the choices' log-likelihood; paired over questions, 95 % interval",
    ]
    return Cells(["check", "verdict", "figure"], [list(check) for check in checked], notes)


def not_applicable(name: str, why: str) -> Check:
    """A check that shows nothing, with the reason."""
    return Check(name, NOT_APPLICABLE, why)


def _difference(before: pd.DataFrame, after: pd.DataFrame) -> Mean | None:
    """The fall of the outcome from one condition to another, over questions of all tasks."""
    place = ["task", "doc_id"]
    pairs = before[[*place, "outcome", "source"]].merge(after[[*place, "outcome"]], on=place)
    step = pairs["outcome_x"] - pairs["outcome_y"]
    kept = np.isfinite(step)
    if kept.sum() < _FEW:
        return None
    return mean_of([(step[kept], pairs["source"][kept])])


_Names = tuple[str, str, str]  # a label, and the conditions before and after
_Pair = tuple[str, pd.DataFrame, pd.DataFrame]


def _compared(name: str, pairs: Iterable[_Pair], strictly: bool = False) -> Check:
    """Whether outcomes fall in each pair (`strictly`), or at least do not rise significantly."""
    differences: list[tuple[str, Mean]] = []
    for label, before, after in pairs:
        difference = _difference(before, after)
        if difference is not None:
            differences.append((label, difference))
    if not differences:
        return not_applicable(name, "the run lacks such a pair of conditions, or has few questions")
    sign: Callable[[Mean], bool] = (
        (lambda fall: fall.value > 0 and fall.p_value <= ALPHA)
        if strictly
        else (lambda fall: fall.value >= 0 or fall.p_value > ALPHA)
    )
    wrong = [pair for pair in differences if not sign(pair[1])]
    # the worst of those that fail, or the least clear of those that pass
    label, worst = min(wrong or differences, key=lambda pair: pair[1].value)
    figure = f"{label}: {worst.value:+.3g} nats ({worst.low:+.3g} to {worst.high:+.3g})"
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return Check(name, FAILS if wrong else PASSES, figure + more)


def _noise_and_gradient(samples: pd.DataFrame, known: Conditions) -> Iterator[_Names]:
    for _, epsilon, attacks in comparable_attacks(samples, known):
        by = attacks_at(attacks, epsilon)
        noise = next((name for name in BOUNDED_NOISE if name in by), None)
        for name in (name for attack in ("fgsm", *_STEPWISE) for name in by.get(attack, ())):
            if noise is not None:
                yield f"{name} below {noise}", by[noise][0], name


def _one_and_many(samples: pd.DataFrame, known: Conditions) -> Iterator[_Names]:
    for _, epsilon, attacks in comparable_attacks(samples, known):
        by = attacks_at(attacks, epsilon)
        for name in (name for attack in _STEPWISE for name in by.get(attack, ())):
            if "fgsm" in by:
                yield f"{name} below fgsm", by["fgsm"][0], name


def _small_and_large(samples: pd.DataFrame, known: Conditions) -> Iterator[_Names]:
    """Neighbouring epsilons of iterative attacks. An attack with one step may overshoot."""
    for _, epsilon, attacks in comparable_attacks(samples, known):
        steps = {name: known[name].get("steps") for name in attacks["condition"]}
        for (attack, _), rows in attacks.groupby(
            ["attack", attacks["condition"].map(steps)], sort=False, dropna=False
        ):
            of_attack = rows.set_index("epsilon")["condition"]
            smaller = of_attack.index[of_attack.index < epsilon]
            if attack in _STEPWISE and epsilon in of_attack and len(smaller):
                before, here = of_attack[smaller.max()], of_attack[epsilon]
                yield f"{here} below {before}", before, here


def _floor(samples: pd.DataFrame, attacks: Mapping[str, Any], knows: bool) -> Check:
    name = "nothing is left at a large epsilon"
    if not knows:
        return not_applicable(name, "the loss does not know the label, so guesses are left")
    best: list[tuple[float, int, str, float]] = []
    for condition, rows in samples.groupby("condition", sort=False):
        info = attacks.get(condition, {})
        rms = info.get("embedding_rms", info.get("hookpoint_rms"))
        absolute = info.get("epsilon_absolute")
        if rows["attack"].iloc[0] not in _STEPWISE or not rms or absolute is None:
            continue
        if absolute / rms >= LARGE:
            best.append((right(rows).mean(), len(rows), str(condition), absolute / rms))
    if not best:
        return not_applicable(name, f"the run has no attack in steps at {LARGE:g} RMS or more")
    accuracy, n, condition, ratio = min(best)
    low, _ = wilson(round(accuracy * n), n)
    verdict = PASSES if low <= _FLOOR else FAILS
    return Check(name, verdict, f"accuracy {accuracy:.3f} under {condition}, {ratio:.2g} RMS")


def _zeros(attacks: Mapping[str, Any], known: Conditions) -> Check:
    """Checks the share of coordinates of the gradient that are zero, in every condition.

    An attack that follows the scores of only some choices has no gradient at the tokens of the
    others. Then the share of gradients counts that are zero in every coordinate.
    """
    name = "the gradient is not zero"
    shares: list[tuple[float, str]] = []
    for condition, info in attacks.items():
        whole = _follows_some(known.get(condition))
        share = info.get("flat_gradient_fraction" if whole else "zero_gradient_fraction")
        if share is not None:
            of = "every coordinate of {:.2%} of gradients" if whole else "{:.2%} of coordinates"
            shares.append((share, f"zero in {of.format(share)} ({condition})"))
    if not shares:
        return not_applicable(
            name, "the run lacks an attack that follows a gradient, or the share of its zeros"
        )
    share, figure = max(shares, key=lambda pair: pair[0])
    return Check(name, PASSES if share <= _ZEROS else FAILS, figure)


def _follows_some(condition: Condition | None) -> bool:
    """Whether the loss of an attack depends on only two choices of a question."""
    if condition is None:
        return False
    kind = kind_of(condition.attack)
    targets = kind is not None and kind.adaptive and kind.targeted
    return targets or condition.attack == "fmn" or condition.get("loss") == "margin"


def _search(samples: pd.DataFrame, known: Conditions) -> Check:
    name = "a search without gradients finds no more"
    sentences = hidden_gradients(samples, known)
    if sentences:
        return Check(name, FAILS, sentences[0])
    for ball, epsilon, attacks in comparable_attacks(samples, known):
        by = attacks_at(attacks, epsilon)
        followed = [attack for attack in ("fgsm", *_STEPWISE) if attack in by]
        if SEARCH in by and followed:
            wrong = {  # if there are several numbers of steps, the strongest
                attack: max((~right(samples[samples["condition"] == n])).sum() for n in by[attack])
                for attack in (SEARCH, *followed)
            }
            counts = ", ".join(f"{attack} {n}" for attack, n in wrong.items())
            return Check(name, PASSES, f"wrong answers at {ball.amplitude}: {counts}")
    return not_applicable(
        name, f"the run does not have both {SEARCH} and an attack that follows the gradient"
    )
