"""The worst case over a run's attacks, and whether a search without gradients finds more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from llm_attack.attacks.settings import (
    ATTACKS,
    BATTERIES,
    BOUNDED_NOISE,
    FIXED,
    condition_name,
)
from llm_attack.lm.losses import LOSSES
from llm_attack.stats import ALPHA, more_often
from llm_attack.suite.analysis.conditions import Condition, Conditions, of_run
from llm_attack.suite.analysis.outcomes import goodness, measured, right
from llm_attack.suite.plan import NO_PART
from llm_attack.suite.plan import WORST as WORST

KNOWS_GOLD = "knows_gold"  # the key in run.json

(SEARCH,) = (name for name, kind in ATTACKS.items() if kind.search)
_PLACE = ["task", "doc_id"]


def knows_gold(run: Mapping[str, Any]) -> bool:
    """Whether the loss of a run knows which choices are right."""
    loss = run.get("settings", {}).get("loss")
    if loss in LOSSES:
        return LOSSES[loss].gold
    return run.get(KNOWS_GOLD) is True  # a loss of the user that is not imported here


def wanted(run: Mapping[str, Any]) -> bool:
    """Whether a run has worst cases: its loss knows the gold, or its attacks name `worst`.

    If the adversary does not know the label, the worst case of several attacks is below guessing by
    construction. Each attack leaves chance accuracy, but on different questions.
    """
    return knows_gold(run) or WORST in (run.get("settings", {}).get("attacks") or ())


def with_worst(samples: pd.DataFrame, run: Mapping[str, Any]) -> pd.DataFrame:
    """The samples of a run and, for each amplitude, the worst case over its attacks.

    A row under `worst@E` covers every attack of the run with epsilon E or smaller, the same norm
    and the same hookpoint, because these stay within the ball of E. A question counts as right if
    it is right under all of them. `acc`, `acc_norm` and the outcomes of `measured` are each the
    worst over the attacks. The other columns have the values of the attack that left the smallest
    margin.

    An amplitude has a worst case if the run has an attack at it, and two attacks up to it. Controls
    and searches for the smallest amplitude do not count.

    Args:
        samples: a row per question and condition, as in `samples.parquet`.
        run: the content of `run.json`. If worst cases are not `wanted`, the samples are returned
            unchanged.
    """
    own = samples["attack"] != WORST
    if not own.all():
        samples = samples[own].reset_index(drop=True)
    if not wanted(run):
        return samples
    outcomes = measured(samples)
    lowest = ["acc", "acc_norm", *outcomes]
    with_outcomes = samples.assign(**outcomes, acc_norm=samples["acc_norm"].astype(float))
    questions = with_outcomes.groupby(_PLACE, sort=False).ngroup()
    parts = [with_outcomes]
    for condition, epsilon, names in _worst_cases(with_outcomes, of_run(run, samples)):
        tried = with_outcomes[with_outcomes["condition"].isin(names)]
        good = tried.assign(acc=goodness(tried))
        places = np.unique(questions[tried.index], return_inverse=True)[1]
        order = np.lexsort((good["margin"], good["acc"]))  # the worst first
        worst = order[np.unique(places[order], return_index=True)[1]]
        least = good.groupby(places)[lowest].min().set_index(good.index[worst])
        first = good.iloc[worst].assign(**least)
        appeared = np.argsort(np.unique(places, return_index=True)[1])
        first = first.assign(acc=goodness(first)).iloc[appeared]
        named = first.assign(condition=condition.name, attack=WORST, epsilon=epsilon)
        parts.append(named[list(with_outcomes.columns)])
    return samples if len(parts) == 1 else pd.concat(parts, ignore_index=True)


def conditions(samples: pd.DataFrame, run: Mapping[str, Any]) -> dict[str, Condition]:
    """The conditions of `with_worst`, by name. Worst cases list their attacks and settings."""
    known = of_run(run, samples)
    if wanted(run):
        known |= {case.name: case for case, _, _ in _worst_cases(samples, known)}
    return known


def _worst_cases(
    samples: pd.DataFrame, known: Conditions
) -> Iterator[tuple[Condition, float, list[str]]]:
    """Each worst case: its condition, its epsilon, and the conditions that it covers."""
    for largest, epsilon, attacks in comparable_attacks(samples, known):
        over = [known[name] for name in attacks.loc[attacks["epsilon"] <= epsilon, "condition"]]
        if len(over) < 2:
            continue
        amplitudes = {name: largest.get(name) for name in ("epsilon", "epsilon_unit")}
        settings = {name: value for c in over for name, value in c.values}
        listed = ", ".join(sorted(c.name for c in over))
        values = {**settings, **amplitudes, "attacks": listed}
        own = sorted({str(source) for c in over if (source := c.get("attack_source"))})
        values |= {"attack_source": " ".join(own)} if own else {}
        name = condition_name(WORST, str(largest.amplitude))
        worst = Condition(name, WORST, tuple(sorted(values.items())), largest.amplitude)
        yield worst, epsilon, [c.name for c in over]


def hidden_gradients(samples: pd.DataFrame, known: Conditions) -> list[str]:
    """A warning for each amplitude at which `blocks` is stronger than every attack with gradients.

    `blocks` takes no gradient. If it finds more, the model hides its gradient. It is compared with
    the strongest attack that follows the gradient, on the questions that only one of the two made
    wrong (McNemar's exact test, one-sided).

    Args:
        samples: a row per question and condition.
        known: the conditions of the run.
    """
    sentences = []
    for _, epsilon, attacks in comparable_attacks(samples, known):
        by = attacks_at(attacks, epsilon)
        search = next(iter(by.pop(SEARCH, [])), None)
        others = [name for attack in by if attack not in BOUNDED_NOISE for name in by[attack]]
        if search is None or not others:
            continue
        here = samples[samples["condition"].isin([search, *others])]
        answers = here.assign(right=right(here).astype(float))
        kept = answers.pivot_table(index=_PLACE, columns="condition", values="right", sort=False)
        best = min(others, key=lambda name: kept[name].mean())
        searched, followed = kept[search] <= 0, kept[best] <= 0
        more, less = int((searched & ~followed).sum()), int((followed & ~searched).sum())
        if more > less and more_often(more, less) <= ALPHA:
            sentences.append(
                f"{search} takes no gradient. It made {more} questions wrong that"
                f" {known[best].attack} left right; the reverse holds for {less}. So the model"
                " hides its gradient, and attacks that follow the gradient are too weak"
            )
    return sentences


def comparable_attacks(
    frame: pd.DataFrame, known: Conditions
) -> Iterator[tuple[Condition, float, pd.DataFrame]]:
    """Yields each amplitude of each ball (`Condition.ball`) with the attacks that may be compared.

    An item has the first condition at this amplitude, epsilon in the units of the point, and all
    attacks in the ball, a row for each condition.

    Args:
        frame: a frame with the columns `condition`, `attack` and `epsilon`.
        known: the conditions of the run.
    """
    attacks = frame[["condition", "attack", "epsilon"]].drop_duplicates()
    no_part = [WORST, *NO_PART, *BATTERIES, *FIXED]
    attacks = attacks[~attacks["attack"].isin(no_part) & (attacks["epsilon"] > 0)]
    balls = [str(known[name].ball) for name in attacks["condition"]]
    for _, rows in attacks.groupby(balls, sort=False):
        for row in rows.drop_duplicates("epsilon").itertuples():
            yield known[str(row.condition)], float(row.epsilon), rows


def attacks_at(attacks: pd.DataFrame, epsilon: float) -> dict[str, list[str]]:
    """The conditions of one amplitude of `comparable_attacks`, by attack."""
    here = attacks[attacks["epsilon"] == epsilon]
    return {
        str(attack): list(rows) for attack, rows in here.groupby("attack", sort=False)["condition"]
    }
