"""`--fail_under` and `--fail_drop`: thresholds for a build, checked after all files are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pandas as pd

from llm_attack.base.declare import is_plain, listed
from llm_attack.base.errors import UsageError, hint, invalid
from llm_attack.base.failures import ThresholdMissed
from llm_attack.lm.settings import condition_names
from llm_attack.suite.analysis.outcomes import LOWER, NUMBER
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.plan import WORST, Plan

_POINT = ":point"


class Threshold(NamedTuple):
    """A number that a build must reach.

    Attributes:
        given: the threshold as the user typed it, with the name of the option.
        value: a share for `fail_under`, percentage points for `fail_drop`.
        point: whether the estimate is compared, instead of the worse end of its 95 % interval.
        condition: for `fail_under`, a condition, an attack (at every amplitude), or `worst` (every
            attack); empty for `fail_drop`.
    """

    given: str
    value: float
    point: bool
    condition: str = ""


class _Case(NamedTuple):
    """A row that is compared with a threshold. If `margin` is below 0, the row misses it."""

    name: str
    margin: float
    shown: str


def under(given: str | None, plan: Plan) -> list[Threshold]:
    """Reads `fail_under`, such as "worst=0.3,none=0.5:point".

    Args:
        given: the typed text; None: nothing is required.
        plan: the plan, whose conditions may be named.

    Raises:
        UsageError: the text cannot be read, or names a condition that the plan does not have.
    """
    if given is None:
        return []
    attacks = [settings.attack for settings in plan.conditions]
    names = condition_names(plan.conditions)
    known = list(dict.fromkeys([WORST, *attacks, *([] if plan.hookpoints else names)]))
    if set(attacks) == {"none"}:
        known.remove(WORST)
    found: list[Threshold] = []
    for part in listed(given):
        condition, _, text = part.rpartition("=")
        allowed = "CONDITION=SHARE, such as worst=0.3 or none=0.5:point, with a share from 0 to 1"
        value, point = _number("fail_under", part, text, allowed, 1.0)
        if condition not in known:
            raise UsageError(
                f"fail_under={part}: must name one of {', '.join(known)}{hint(condition, known)}"
            )
        if condition in (one.condition for one in found):
            raise UsageError(f"fail_under={given}: must name {condition} once")
        found.append(Threshold(f"fail_under {part}", value, point, condition))
    if not found:
        raise invalid("fail_under", given, "CONDITION=SHARE, such as worst=0.3")
    return found


def drop(given: str | None, plan: Plan | None = None) -> list[Threshold]:
    """Reads `fail_drop`, such as "2" or "2:point".

    Args:
        given: the typed text; None: nothing is required.
        plan: the plan of the run; None: two runs are compared.

    Raises:
        UsageError: the text cannot be read, or the plan lacks an attack or `none`.
    """
    if given is None:
        return []
    allowed = "points of a percent from 0 to 100, such as 2 or 2:point"
    value, point = _number("fail_drop", given, given, allowed, 100.0)
    if plan is not None:
        attacks = {settings.attack for settings in plan.conditions}
        if "none" not in attacks or attacks == {"none"}:
            raise UsageError(f"fail_drop={given}: must go with none and an attack in attacks")
    return [Threshold(f"fail_drop {given}", value, point)]


def _number(
    argument: str, part: str, text: str, allowed: str, largest: float
) -> tuple[float, bool]:
    point = text.endswith(_POINT)
    text = text.removesuffix(_POINT)
    try:
        value = float(text) if is_plain(text) else math.nan
    except ValueError:
        value = math.nan
    if not 0 <= value <= largest:
        raise invalid(argument, part, allowed)
    return value, point


def check_run(table: pd.DataFrame, thresholds: Sequence[Threshold]) -> list[str]:
    """A sentence for each threshold that the means over tasks of a run miss.

    Args:
        table: the result of `summarise`.
        thresholds: the results of `under` and `drop`.
    """
    mean = table[table["task"] == MEAN]
    missed = []
    for threshold in thresholds:
        attacked = mean["attack"] != "none"
        if threshold.condition not in ("", WORST):
            attacked = (mean["attack"] == threshold.condition) | (
                mean["condition"] == threshold.condition
            )
        rows = mean[attacked].to_dict("records")
        case = _accuracy if threshold.condition else _drop
        missed += _missed(threshold, [case(row, threshold) for row in rows])
    return missed


def check_pair(frame: pd.DataFrame, thresholds: Sequence[Threshold]) -> list[str]:
    """A sentence for each threshold that is missed because the second run is much worse.

    Args:
        frame: the result of `analysis.pairs.paired`.
        thresholds: the result of `drop`.
    """
    rows = frame[frame["task"] == MEAN].to_dict("records")
    missed = []
    for threshold in thresholds:
        cases = []
        for row in rows:
            value, low, high = (row[f"difference{end}"] for end in ("", "_low", "_high"))
            if row.get("better") != LOWER:
                value, low, high = -value, -high, -low
            worse = {"condition": f"under {row['condition']} the second run", "drop": value}
            cases.append(_drop(worse | {"drop_low": low, "drop_high": high}, threshold, "is worse"))
        missed += _missed(threshold, cases)
    return missed


def fail(missed: Iterable[str]) -> None:
    """Ends the command with exit code 3 and one line, if a threshold was missed.

    Raises:
        ThresholdMissed: a threshold was missed.
    """
    text = "; ".join(missed)
    if text:
        raise ThresholdMissed(text)


def _accuracy(row: dict[str, object], threshold: Threshold) -> _Case:
    name = str(row["condition"])
    value, low, high = (_float(row[f"acc{end}"]) for end in ("", "_low", "_high"))
    if row.get("better") == LOWER:
        return _Case(name, -math.inf, f"{name} has a score that is better when it is lower")
    counts = value if threshold.point or math.isnan(low) else low
    ends = "" if math.isnan(low) else f" ({low:.3f} to {high:.3f})"
    return _case(name, value, counts - threshold.value, f"{name} has {value:.3f}{ends}")


def _drop(row: dict[str, object], threshold: Threshold, verb: str = "drops") -> _Case:
    name = str(row["condition"])
    value, low, high = (_float(row[f"drop{end}"]) for end in ("", "_low", "_high"))
    counts = value if threshold.point or math.isnan(high) else high
    form, unit, size = (".3f", "", 100) if row.get("kind") == NUMBER else (".1f", " points", 1)
    ends = "" if math.isnan(high) else f" ({low / size:{form}} to {high / size:{form}})"
    shown = f"{name} {verb} by {value / size + 0.0:{form}}{unit}{ends}"
    return _case(name, value, threshold.value - counts, shown)


def _case(name: str, value: float, margin: float, shown: str) -> _Case:
    if math.isnan(value):  # a score that cannot be judged does not pass
        return _Case(name, -math.inf, f"{name} has no mean over tasks")
    return _Case(name, margin, shown)


def _float(value: object) -> float:
    return math.nan if value is None or value is pd.NA else float(value)  # type: ignore[arg-type]


def _missed(threshold: Threshold, cases: Sequence[_Case]) -> list[str]:
    """A sentence about the case that misses the threshold by most; empty if none does."""
    below = sorted((case for case in cases if case.margin < 0), key=lambda case: case.margin)
    if not below:
        return []
    more = f", and {len(below) - 1} more" if len(below) > 1 else ""
    return [f"{threshold.given}: {below[0].shown}{more}"]
