"""The checks that a run failed, which no table of its numbers leaves out.

Only runs of a standard have checks. The tables of others have no column for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

CHECKS, FAILED = "checks", "failed_checks"

REPEATS, GRADIENT = "answers do not vary from call to call", "answers with a gradient are the same"
ZEROS, SEARCH = "the gradient is not zero", "a search without gradients does not win"


def checks_of(battery: bool) -> list[str]:
    """The names of the checks of a standard, in order; some of them only a battery has."""
    return [REPEATS, GRADIENT, ZEROS, *([SEARCH] if battery else [])]


def failed(run: Mapping[str, Any]) -> list[str]:
    """The names of the checks that a run, or a card, failed."""
    return [str(check["name"]) for check in run.get(CHECKS) or [] if not check["passed"]]


def in_words(run: Mapping[str, Any]) -> str:
    """The names of the failed checks as one text; empty if none failed."""
    return "; ".join(failed(run))


def flagged(frame: pd.DataFrame, runs: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """The frame with a column of failed checks for each run, if one of them has checks.

    Args:
        frame: any table of the runs' numbers.
        runs: the data of `run.json`, by the end of the column's name after `failed_checks`.
    """
    if not any(CHECKS in run for run in runs.values()):
        return frame
    return frame.assign(**{f"{FAILED}{end}": in_words(run) for end, run in runs.items()})


def notes(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each run that failed a check.

    Args:
        runs: the data of `run.json`, by the runs' names.
    """
    return [
        f"failed checks of {name}: {in_words(run)}" for name, run in runs.items() if failed(run)
    ]
