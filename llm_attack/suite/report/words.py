"""A run's table in sentences, for a reader who does not know its columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from llm_attack.lm.units import ABSOLUTE
from llm_attack.stats import ALPHA
from llm_attack.suite.analysis.conditions import Condition, Conditions, by_name
from llm_attack.suite.analysis.summary import ABOVE, BELOW, INDISTINGUISHABLE, MEAN
from llm_attack.suite.report.tables import score_of

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

_NAMES = {
    "random": "Random noise",
    "uniform": "Uniform noise",
    "gaussian": "Gaussian noise",
    "mifgsm": "MI-FGSM",
    "apgdt": "APGD towards every other choice",
    "blocks": "The search over blocks",
    "critical": "The search for the critical epsilon",
    "reversed": "FGSM with the sign reversed",
    "worst": "The worst of the attacks",
}


# Of an amplitude: what stands behind the number.
_UNITS: dict[str | None, str] = {
    "rms": " RMS",
    "token_norm": " token norms",
    "neftune": " of NEFTune",
}


def in_words(table: pd.DataFrame, known: Conditions | None = None) -> list[str]:
    """One paragraph for the clean model, then one for each attack, in the table's order.

    Args:
        table: a row per task and condition, and a row per condition with the task "mean"; columns
            `task, condition, attack, epsilon, n, acc, baseline, drop, p_mcnemar_holm, verdict`.
            Accuracies are shares of one, `drop` is in points of a percent (null, like
            `p_mcnemar_holm`, in a run without the condition `none`).
        known: the conditions of the run; as their names tell unless given.
    """
    known = by_name(table) if known is None else known
    mean, tasks = table[table["task"] == MEAN], table[table["task"] != MEAN]
    if mean["acc"].isna().all():
        return [
            "The tasks have scores of different kinds, which have no mean; the table has each by"
            " itself."
        ]
    names = tasks["task"].unique()
    n = tasks.loc[tasks["condition"] == tasks["condition"].iloc[0], "n"].sum()
    scope = names[0] if len(names) == 1 else f"mean over {number(len(names))} tasks"
    scope = f"({scope}, {n:,} questions)"
    scored = "score" in table
    shown = "{:.3f}".format if scored else percent
    guess = mean["baseline"].iloc[0]
    guessing = "" if pd.isna(guess) else f"; guessing would give {shown(guess)}"
    clean = mean[mean["attack"] == "none"]
    if clean.empty:
        start = f"The run has no condition without an attack to compare with {scope}"
    else:
        answers = f"answers {percent(clean['acc'].iloc[0])} of the questions rightly"
        if scored:
            answers = f"has a score of {shown(clean['acc'].iloc[0])}, {score_of(clean)}"
        start = f"Without an attack the model {answers} {scope}"
    verdicts = _verdicts(tasks[tasks["attack"] == "none"], "Even without an attack")
    attacks = mean[mean["attack"] != "none"].groupby("attack", sort=False)
    return [
        f"{start}{guessing}.{verdicts}",
        *(
            _attack(name, rows, tasks[tasks["attack"] == name], shown, known)
            for name, rows in attacks
        ),
    ]


def percent(share: float) -> str:
    """0.9661 as "96.6 %"."""
    return f"{100 * share:.1f} %"


def number(n: int) -> str:
    """A count as it is written in a sentence."""
    return _NUMBERS[n] if n < len(_NUMBERS) else f"{n:,}"


def _attack(
    attack: str,
    mean: pd.DataFrame,
    tasks: pd.DataFrame,
    shown: Callable[[float], str],
    known: Conditions,
) -> str:
    """One attack at all its amplitudes: what it costs, then where guessing is as good."""
    effects: list[str] = []
    verb_before = ""
    for row in mean.itertuples():
        at = f"at {'' if effects else 'amplitude '}{_amplitude(known[row.condition], row.epsilon)}"
        if pd.isna(row.drop):
            verb, effect = "leaves", f"{shown(row.acc)} {at}"
        else:
            verb = "costs" if round(row.drop, 1) >= 0 else "gains"
            found = _significance(tasks[tasks["condition"] == row.condition]) + _pooled(row)
            effect = f"{abs(row.drop):.1f} points {at} ({shown(row.acc)} left{found})"
        effects.append(effect if verb == verb_before else f"{verb} {effect}")
        verb_before = verb
    name = _NAMES.get(attack, attack.upper())
    verdicts = "".join(
        _verdicts(rows, f"Under {condition}")
        for condition, rows in tasks.groupby("condition", sort=False)
    )
    if not verdicts and (tasks["verdict"] == ABOVE).all():
        verdicts = f" {'Every task' if tasks['task'].nunique() > 1 else 'It'} stays above guessing."
    return f"{name} {_listed(effects)}.{verdicts}"


def _amplitude(condition: Condition, epsilon: float) -> str:
    """As the condition's name has it; in the units of the point beside it if those are others."""
    plain, amplitude = f"{epsilon:g}", condition.amplitude
    unit = "" if amplitude is None else amplitude.epsilon.unit or ABSOLUTE
    known = "" if unit == ABSOLUTE else _UNITS.get(unit, f" {unit}")
    label = plain if amplitude is None else amplitude.shown(known)
    return plain if label == plain else f"{label} ({epsilon:.3g})"


def _significance(tasks: pd.DataFrame) -> str:
    """On how many tasks the answers under a condition differ from the clean ones."""
    p = tasks["p_mcnemar_holm"].dropna()
    if p.empty:
        return ""
    found = int((p <= ALPHA).sum())
    if len(p) == 1:
        return "; significant" if found else "; not significant"
    return f"; significant on {_of(found, len(p))}"


def _pooled(mean: Any) -> str:
    """Whether the answers of all tasks together differ, and if not which drop would have."""
    p = mean.p_mcnemar_holm
    if pd.isna(p):
        return ""
    if p <= ALPHA:
        found = "; of all together significant"
    else:
        found = (
            f"; of all together not, where a drop of {mean.detectable:.1f} points would be found"
        )
    within = getattr(mean, "within", None)
    if within is None:
        return found
    shown = "" if mean.p_equivalence_holm <= ALPHA else "not shown to be "
    return f"{found}; {shown}equivalent to no attack within {within:g} points"


def _verdicts(tasks: pd.DataFrame, where: str) -> str:
    """The tasks of one condition that are not above guessing, as a sentence, or nothing."""
    parts = []
    for verdict in (INDISTINGUISHABLE, BELOW):
        names = tasks.loc[tasks["verdict"] == verdict, "task"].tolist()
        if not names:
            continue
        if len(tasks) == 1:
            parts.append(f"{names[0]} is {verdict}")
        else:
            who = "" if len(names) == len(tasks) else f" ({_listed(names)})"
            verb = "is" if len(names) == 1 else "are"
            parts.append(f"{_of(len(names), len(tasks))} {verb} {verdict}{who}")
    return f" {where} {_listed(parts)}." if parts else ""


def _of(part: int, whole: int) -> str:
    if part == whole:
        return f"all {number(whole)} tasks" if whole > 2 else "both tasks"
    return f"{number(part)} of the {number(whole)} tasks" if part else "no task"


def _listed(parts: Sequence[str]) -> str:
    """Parts of a sentence with commas and a last "and"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
