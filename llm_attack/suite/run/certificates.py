"""The certificates of a run, and their record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.requests import Instance
from llm_attack.lm.units import ABSOLUTE, size_of
from llm_attack.suite.analysis.certified import SMOOTHING, certified, largest_radius
from llm_attack.suite.plan import Plan
from llm_attack.suite.run.rows import grouped
from llm_attack.suite.run.work import Gathered


def certificates(
    plan: Plan,
    lm: AttackedHFLM,
    questions: pd.DataFrame,
    requests: Sequence[Instance],
    gathered: Gathered,
) -> pd.DataFrame | None:
    """The frame of `certificates.parquet` (`analysis.certified`); None if nothing is certified.

    Args:
        plan: the plan.
        lm: the model with the run's conditions.
        questions: the result of `rows.question_rows`.
        requests: all requests of the run.
        gathered: the result of `work.gather`.
    """
    sizes = _sizes(plan, lm)
    if not sizes:
        return None
    groups, rows = grouped(requests), []
    for question in questions.to_dict("records"):
        (number, *_) = groups[question["task"], question["doc_id"]]
        place = {key: question[key] for key in ("task", "doc_id", "cluster")}
        choices = {key: question[key] for key in ("n_choices", "gold")}
        of_sigmas = zip(sizes.items(), gathered.votes[number], strict=True)
        for (name, sigma), (selection, votes) in of_sigmas:
            noise = {"smoothing": name, "sigma": sigma}
            counts = {"selection_votes": selection, "votes": votes}
            rows.append({**place, **noise, **choices, **counts})
    frame = pd.DataFrame(rows).astype({"cluster": "Int64"})
    return certified(frame, plan.failure_probability)


def _sizes(plan: Plan, lm: AttackedHFLM) -> dict[str, float]:
    """Each sigma in the units of the point, by its name, such as 0.4rms."""
    given, resolved = plan.smoothing, lm.engine.smoothing
    if given is None or resolved is None:
        return {}
    names = [f"{s.number:g}{'' if s.unit == ABSOLUTE else s.unit}" for s in given.sigmas]
    return {n: s.number for n, s in zip(names, resolved.sigmas, strict=True)}


def record(plan: Plan, lm: AttackedHFLM) -> dict[str, Any]:
    """The entry of `run.json` about the certificates; empty if nothing is certified.

    `sigmas` and `largest_radii` are in the units of the point. `unit_l2` is the length in L2 of a
    token that is one unit large in each coordinate, if all sigmas have the same unit.
    """
    sizes, given = _sizes(plan, lm), plan.smoothing
    if given is None:
        return {}
    units = {sigma.unit or ABSOLUTE for sigma in given.sigmas}
    unit = units.pop() if len(units) == 1 else ABSOLUTE
    level = plan.failure_probability
    content = {
        "sigmas": sizes,
        "draws": given.draws,
        "selection_draws": given.selection_draws,
        "failure_probability": level,
        "largest_radii": {n: largest_radius(s, given.draws, level) for n, s in sizes.items()},
        "unit": unit,
        "unit_l2": size_of(unit, lm.signal, "l2"),
    }
    return {SMOOTHING: content}
