"""The worst case over a run's attacks, and whether a search without gradients finds more."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
from scipy.stats import binomtest

from llm_attack.inference import ALPHA
from llm_attack.suite.outcomes import goodness, right

WORST = "worst"

# What is no attack of one amplitude: the clean answers, the control, noise that may be larger, the
# searches for the smallest.
_LEFT_OUT = ("none", WORST, "reversed", "gaussian", "fmn", "critical")
_NOISE = ("random", "uniform")
SEARCH = "blocks"
_PLACE = ["task", "doc_id"]


def with_worst(samples: pd.DataFrame) -> pd.DataFrame:
    """The samples of a run and, for each amplitude, what is left after all of its attacks.

    A question counts as right under `worst@E` if it does under every attack of the run whose
    epsilon is E or smaller (of the same norm and at the same hookpoint: what they did is in the
    ball of E). A score that is not 0 or 1 is the worst of these. `acc_norm` likewise. The other
    columns are those of the attack that made it wrong, the smallest first; of the largest where
    none did. Only for amplitudes at which the run has an attack, and at or below which it has two;
    without the controls and the searches for the smallest amplitude.

    Args:
        samples: a row per question and condition, as in `samples.parquet`.
    """
    samples = samples if WORST not in set(samples["attack"]) else _without(samples)
    parts = [samples]
    for label, epsilon, rows in balls(samples):
        tried = rows[rows["epsilon"] <= epsilon]
        if tried["condition"].nunique() < 2:
            continue
        order = tried.assign(_wrong=~right(tried), _far=tried["epsilon"])
        order["_far"] = order["_far"].where(order["_wrong"], -order["_far"])
        order = order.sort_values(["_wrong", "_far"], ascending=[False, True], kind="stable")
        first = tried[_PLACE].drop_duplicates().merge(order.drop_duplicates(_PLACE), on=_PLACE)
        good = tried.assign(acc=goodness(tried))  # the worst of scores that are better when lower
        least = good.groupby(_PLACE)[["acc", "acc_norm"]].agg(lambda of: of.min(skipna=False))
        first = first.drop(columns=["acc", "acc_norm"]).join(least, on=_PLACE)
        first = first.assign(acc=goodness(first))
        named = first.assign(condition=f"{WORST}@{label}", attack=WORST, epsilon=epsilon)
        parts.append(named[list(samples.columns)])
    return samples if len(parts) == 1 else pd.concat(parts, ignore_index=True)


def _without(samples: pd.DataFrame) -> pd.DataFrame:
    return samples[samples["attack"] != WORST].reset_index(drop=True)


def hidden_gradients(samples: pd.DataFrame) -> list[str]:
    """A sentence for each amplitude at which `blocks` is stronger than every attack by gradient.

    It takes no gradient, so that a model where it finds more hides its own. Compared are the
    questions that one of the two made wrong and the other did not (McNemar's exact test, one-sided:
    that it loses by chance is no news), with the strongest of the attacks that follow it.
    """
    found = []
    for label, epsilon, rows in balls(samples):
        here = rows[rows["epsilon"] == epsilon]
        answers = here.assign(right=right(here).astype(float))
        kept = answers.pivot_table(index=_PLACE, columns="attack", values="right", sort=False)
        others = [name for name in kept if name not in (SEARCH, *_NOISE)]
        if SEARCH not in kept or not others:
            continue
        best = min(others, key=lambda name: kept[name].mean())
        searched, followed = kept[SEARCH] <= 0, kept[best] <= 0
        more, less = int((searched & ~followed).sum()), int((followed & ~searched).sum())
        if more > less and binomtest(more, more + less, alternative="greater").pvalue <= ALPHA:
            found.append(
                f"{SEARCH}@{label} takes no gradient and made {more} questions wrong that {best}"
                f" did not, {less} the other way round: the model hides its gradient, and attacks"
                " that follow it are too weak"
            )
    return found


def balls(samples: pd.DataFrame) -> Iterator[tuple[str, float, pd.DataFrame]]:
    """Each amplitude of a norm at a hookpoint: its label, epsilon, and all attacks of that kind."""
    attacks = samples[~samples["attack"].isin(_LEFT_OUT) & (samples["epsilon"] > 0)]
    labels = attacks["condition"].str.split("@", n=1).str[1]
    # 0.7rms-l2@model.layers.3: what stands before the norm is the amplitude, which can be compared
    # whatever its unit, but in that of NEFTune
    kinds = labels.str.replace(r"^[^@]*?(?=neftune|-l2|@|$)", "", regex=True)
    for _, rows in attacks.groupby(kinds, sort=False):
        seen = rows.assign(label=labels[rows.index]).drop_duplicates("epsilon")
        for label, epsilon in zip(seen["label"], seen["epsilon"], strict=True):
            yield str(label), float(epsilon), rows
