"""A run's table in sentences, for a reader who does not know its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llm_attack.lm.units import ABSOLUTE
from llm_attack.stats import ALPHA
from llm_attack.suite.analysis.conditions import Condition, Conditions, by_name, steps_told
from llm_attack.suite.analysis.outcomes import LOWER, NUMBER
from llm_attack.suite.analysis.summary import ABOVE, MEAN, TOO_FEW
from llm_attack.suite.analysis.worst import WORST
from llm_attack.suite.report.tables import score_of

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# Names of attacks that are no abbreviations.
ATTACK_NAMES = {
    "random": "Random noise",
    "uniform": "Uniform noise",
    "gaussian": "Gaussian noise",
    "mifgsm": "MI-FGSM",
    "apgdt": "APGD towards every other choice",
    "blocks": "The search over blocks",
    "critical": "The search for the critical epsilon",
    "reversed": "FGSM with the sign reversed",
    "fixed": "The fixed perturbation",
    "fixed-shuffled": "The fixed perturbation with shuffled signs",
    "fixed-random": "The fixed perturbation with random signs",
    "worst": "The worst of the attacks",
}


# Units as text after the number of an amplitude.
_UNITS: dict[str | None, str] = {
    "rms": " RMS",
    "token_norm": " token norms",
    "neftune": " of NEFTune",
}


class Headline(NamedTuple):
    """A number that readers see first.

    Attributes:
        number: the number as text.
        meaning: its meaning.
        interval: its 95 % interval; empty if it has none.
    """

    number: str
    meaning: str
    interval: str = ""


def strongest(table: pd.DataFrame) -> str | None:
    """The condition that costs most; of equal ones, the one with the smallest epsilon.

    Worst cases do not count, because they are several attacks. None without an attack.

    Args:
        table: see `in_words`.
    """
    tasks = table[(table["task"] != MEAN) & ~table["attack"].isin(["none", WORST])]
    if tasks.empty:
        return None
    cost = tasks["drop"].astype(float)
    if cost.isna().all():
        lower = tasks["better"] == LOWER if "better" in tasks else False
        cost = tasks["acc"].astype(float) * np.where(lower, 1, -1)
    costs = tasks.assign(cost=cost).groupby("condition", sort=False)[["cost", "epsilon"]].mean()
    order = costs.assign(cost=-costs["cost"].round(9)).sort_values(
        ["cost", "epsilon"], kind="stable"
    )
    return str(order.index[0])


def headlines(table: pd.DataFrame, known: Conditions | None = None) -> list[Headline]:
    """Mean accuracy without an attack, under the strongest attack, and of guesses, if they exist.

    Args:
        table: see `in_words`.
        known: see `in_words`.
    """
    known = by_name(table) if known is None else known
    mean = table[(table["task"] == MEAN) & table["acc"].notna()]
    meanings = {"none": "without an attack"}
    worst = strongest(table)
    if worst is not None and worst in set(mean["condition"]):
        meanings[worst] = f"under the strongest attack, {_named(mean, worst, known)}"
    lines = []
    for condition, meaning in meanings.items():
        for row in mean[mean["condition"] == condition].to_dict("records"):
            lines.append(Headline(_shown(mean, row["acc"]), meaning, _ends(mean, row)))
    guess = mean["baseline"].dropna()
    return [
        *lines,
        *(Headline(_shown(mean, accuracy), "by guessing") for accuracy in guess.iloc[:1]),
    ]


def in_words(table: pd.DataFrame, known: Conditions | None = None) -> list[str]:
    """A sentence or two on the clean model, then on each attack, in the table's order.

    "Nothing is left" at an amplitude means: at this and all larger amplitudes, the mean accuracy is
    no higher than that of guesses, and the test finds no task above guessing.

    Args:
        table: a row per task and condition, and a row per condition with the task "mean"; columns
            `task, condition, attack, epsilon, n, acc, acc_low, acc_high, baseline, drop, drop_low,
            drop_high, detectable, p_mcnemar_holm, verdict`. Accuracies are shares of one, and
            `drop` is in percentage points. Without the condition `none`, `drop` and
            `p_mcnemar_holm` are null.
        known: the conditions of the run; by default, those that the names show.
    """
    known = by_name(table) if known is None else known
    mean, tasks = table[table["task"] == MEAN], table[table["task"] != MEAN]
    if mean["acc"].isna().all():
        return [
            "The tasks have scores of different kinds, so there is no mean. The table shows each"
            " task."
        ]
    names = tasks["task"].unique()
    n = tasks.loc[tasks["condition"] == tasks["condition"].iloc[0], "n"].sum()
    scope = names[0] if len(names) == 1 else f"mean over {number(len(names))} tasks"
    scope = f"{scope}, {n:,} questions"
    clean = mean[mean["attack"] == "none"]
    if clean.empty:
        start = f"The run has no condition without an attack to compare with ({scope})."
    else:
        row = clean.iloc[0].to_dict()
        what = f"{_shown(mean, row['acc'])} right"
        if "score" in table:
            what = f"a score of {_shown(mean, row['acc'])}, {score_of(clean)}"
        ends = _ends(mean, row)
        start = f"No attack: {what} ({f'{ends}; ' if ends else ''}{scope})."
    guess = mean["baseline"].iloc[0]
    if pd.notna(guess):
        start += f" Guessing gives {_shown(mean, guess)}."
    verdict = tasks["verdict"].where(tasks["attack"] == "none")
    few = tasks.loc[verdict == TOO_FEW, "task"]
    if len(few):
        start += f" Too few questions to tell from guessing: {_listed(few.tolist())}."
    at_guess = tasks.loc[(tasks["attack"] == "none") & ~verdict.isin([ABOVE, TOO_FEW]), "task"]
    if len(at_guess) and pd.notna(guess):
        start += f" Not above guessing even without an attack: {_listed(at_guess.tolist())}."
    attacks = mean[mean["attack"] != "none"].groupby("attack", sort=False)
    return [start, *(_attack(rows, tasks[tasks["attack"] == a], known) for a, rows in attacks)]


def of_fixed(run: Mapping[str, Any]) -> list[str]:
    """A sentence on where a fixed perturbation is from and one on its unit; none without one.

    Args:
        run: the content of `run.json`.
    """
    about = run.get("perturbation")
    info = next(
        (i for i in (run.get("attacks") or {}).values() if i.get("attack") == "fixed"), None
    )
    if not about or info is None:
        return []
    origin = f"was found for each question under {about['model']} by {about.get('condition')}"
    if "share" in about:
        n, by = about["fitted_to"], f"{about['attack']}@{about['amplitude']}"
        of = f"is universal ({about['share']})"
        origin = f"{of}. It was fitted to {n} questions under {about['model']} by {by}"
    size = about["epsilon_absolute"]
    rms = info.get("hookpoint_rms") or info.get("embedding_rms")
    own = f", or {size / rms:.3g} RMS of this model" if rms and about["norm"] == "linf" else ""
    return [
        f"The fixed perturbation {origin}.",
        f"Its amplitude is in absolute units: {size:.3g} in the norm {about['norm']}{own}.",
    ]


def percent(share: float) -> str:
    """Formats 0.9661 as "96.6 %"."""
    return f"{100 * share:.1f} %"


def number(n: int) -> str:
    """A count in the form that a sentence has."""
    return _NUMBERS[n] if n < len(_NUMBERS) else f"{n:,}"


def _attack(mean: pd.DataFrame, tasks: pd.DataFrame, known: Conditions) -> str:
    """The sentences on one attack: the cost of its largest amplitude, and when nothing is left."""
    # if there are several numbers of steps, the largest
    mean = mean.drop_duplicates("epsilon", keep="last")
    rows = mean.sort_values("epsilon", kind="stable").to_dict("records")
    last = rows[-1]
    name = _with_steps(_name(last["attack"]), last["condition"], known)
    sizes = [_amplitude(known[row["condition"]], row["epsilon"]) for row in rows]
    changed = [_changed(row, tasks) for row in rows]
    left, ends = _shown(mean, last["acc"]), _ends(mean, last)
    if pd.isna(last["drop"]):
        return f"{name} at {sizes[-1]}: {left} left{f' ({ends})' if ends else ''}." + _left(
            rows, sizes, tasks
        )
    if not any(changed) and _shows_nothing(last):
        verb = "lost" if last["drop"] > 0 else "gained"
        size = _points(last, ends=False)
        said = f"{number(last['n'])} questions cannot show a change ({size} {verb})."
        return f"{name} at {sizes[-1]}: {said}"
    if not any(changed):
        at = f" at {sizes[0]}" if len(rows) == 1 else f" at {sizes[0]} to {sizes[-1]}"
        low, high = (_shown(mean, end(row["acc"] for row in rows)) for end in (min, max))
        acc = left if low == high else f"{low.removesuffix(' %')} to {high}"
        least = max(row["detectable"] for row in rows)
        could = f"; with {last['n']:,} questions we could detect {_size(last, least)}"
        said = f"no detectable change ({acc}{'' if pd.isna(least) else could})."
        return f"{name}{at}: {said}" + _equivalent(last)
    if changed[-1]:
        verb = "costs" if last["drop"] > 0 else "gains"
        said = f"{verb} {_points(last)}, {left} {'left' if last['drop'] > 0 else 'right'}."
        if last.get("kind") == NUMBER:  # for such a score, nothing is left or right
            side = "worse" if last["drop"] > 0 else "better"
            said = f"the score is {side} by {_points(last)}, {left}."
        first = changed.index(True)
        if first > 0:
            said += f" Below {sizes[first]} no detectable change."
    else:
        where = [size for size, one in zip(sizes, changed, strict=True) if one]
        said = f"no detectable change ({left}), but at {_listed(where)} there is one."
    return f"{name} at {sizes[-1]}: {said}" + _left(rows, sizes, tasks) + _equivalent(last)


def _name(attack: str) -> str:
    return ATTACK_NAMES.get(attack, attack.upper())


def _with_steps(name: str, condition: str, known: Conditions) -> str:
    """An attack, with its steps if the run has it with several numbers of steps."""
    steps = steps_told(known).get(condition)
    return name if steps is None else f"{name} with {steps} step{'s' * (steps != 1)}"


def _named(mean: pd.DataFrame, condition: str, known: Conditions) -> str:
    """An attack and its amplitude inside a sentence."""
    row = mean[mean["condition"] == condition].iloc[0]
    name = _name(row["attack"])
    name = name if name.isupper() or "FGSM" in name else name[0].lower() + name[1:]
    size = _amplitude(known[condition], row["epsilon"])
    return f"{_with_steps(name, condition, known)} at {size}"


def _shown(table: pd.DataFrame, value: float) -> str:
    return f"{value:.3f}" if "score" in table else percent(value)


def _ends(table: pd.DataFrame, row: dict[Any, Any]) -> str:
    low, high = row["acc_low"], row["acc_high"]
    if pd.isna(low):
        return ""
    return f"{_shown(table, low).removesuffix(' %')} to {_shown(table, high)}"


def _points(row: dict[Any, Any], ends: bool = True) -> str:
    """A drop, or a gain without its sign, with its interval."""
    drop, low, high = (row[f"drop{end}"] for end in ("", "_low", "_high"))
    if drop <= 0:
        drop, low, high = -drop, -high, -low
    if not ends or pd.isna(low):
        return _size(row, drop)
    number_form, factor = (".3f", 0.01) if row.get("kind") == NUMBER else (".1f", 1)
    return f"{_size(row, drop)} ({factor * low:{number_form}} to {factor * high:{number_form}})"


def _size(row: dict[Any, Any], points: float) -> str:
    """A size in percentage points; for a score that is no share, in its own unit."""
    return f"{points / 100:.3f}" if row.get("kind") == NUMBER else f"{points:.1f} points"


def _amplitude(condition: Condition, epsilon: float) -> str:
    """The amplitude as in the condition's name, with the unit in words."""
    amplitude = condition.amplitude
    if amplitude is None:
        return f"{epsilon:g}"
    unit = amplitude.epsilon.unit
    own = "" if unit in (ABSOLUTE, None) else f" {unit}"
    return amplitude.shown(_UNITS.get(unit, own))


def _changed(mean: dict[Any, Any], tasks: pd.DataFrame) -> bool:
    """Whether the answers of all tasks together differ. If there is no such test, of any task."""
    p = mean["p_mcnemar_holm"]
    if pd.isna(p):
        p = tasks.loc[tasks["condition"] == mean["condition"], "p_mcnemar_holm"].min()
    return bool(p <= ALPHA)


def _shows_nothing(mean: dict[Any, Any]) -> bool:
    """Whether the sign test would find no change even if every question were lost."""
    return bool(2 * 0.5 ** int(mean["n"]) > ALPHA)


def _left(rows: list[dict[Any, Any]], sizes: list[str], tasks: pd.DataFrame) -> str:
    """The amplitude from which nothing is left, or the number of tasks not above guessing."""
    of_conditions = [tasks[tasks["condition"] == row["condition"]] for row in rows]
    none_left = [
        bool(row["acc"] <= row["baseline"] and not some["verdict"].isin([ABOVE, TOO_FEW]).any())
        for row, some in zip(rows, of_conditions, strict=True)
    ]
    if none_left[-1]:
        first = max((i + 1 for i, one in enumerate(none_left) if not one), default=0)
        last = first == len(rows) - 1
        return (
            f" {'Nothing' if last else f'From {sizes[first]} on nothing'} is left above guessing."
        )
    if (of_conditions[-1]["verdict"] == TOO_FEW).any():
        return ""
    tested = of_conditions[-1][of_conditions[-1]["verdict"].notna()]
    above = int((tested["verdict"] == ABOVE).sum())
    if tested.empty or (above == len(tested) and len(tested) < len(of_conditions[-1])):
        return ""
    if len(of_conditions[-1]) == 1:
        return f" It {'stays' if above else 'is not'} above guessing."
    if above in (0, len(tested)):
        return f" {'Every task stays' if above else 'No task is'} above guessing."
    part = number(len(tested) - above).capitalize()
    verb = "is" if len(tested) - above == 1 else "are"
    return f" {part} of the {number(len(of_conditions[-1]))} tasks {verb} not above guessing."


def _equivalent(mean: dict[Any, Any]) -> str:
    """Whether the answers of all tasks together are equivalent, if the user asked."""
    if "within" not in mean or pd.isna(mean["within"]):
        return ""
    shown = "Equivalent" if mean["p_equivalence_holm"] <= ALPHA else "Not shown to be equivalent"
    return f" {shown} to no attack within {mean['within']:g} points."


def _listed(parts: Sequence[str]) -> str:
    """Joins parts of a sentence with commas and a last "and"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
