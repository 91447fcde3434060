"""Do larger models have larger critical epsilons? A power law over several runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from llm_attack.base.errors import UsageError
from llm_attack.suite.analysis import critical
from llm_attack.suite.analysis.scaling import RESAMPLES, below, distances, laws, of_models
from llm_attack.suite.report.layout import print_style
from llm_attack.suite.report.tables import Cells
from llm_attack.suite.results import Result
from llm_attack.suite.studies.models import rms_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS, LAWS = "critical epsilons by size", "power laws of the critical epsilon"
_SIZES = 3  # numbers of parameters, of which one is left out in turn


def scaling(
    runs: Mapping[str, Result], ceiling: float = np.inf, resamples: int = RESAMPLES
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The power law of the critical epsilon over several runs, in RMS of their embeddings.

    Args:
        runs: finished runs with critical epsilons, by folder.
        ceiling: critical epsilons above it count as censored, in RMS.
        resamples: number of bootstrap samples of the questions.

    Returns:
        The results of `of_models`, with the column `condition`, and of `laws`.

    Raises:
        UsageError: a run has no critical epsilons or no number of parameters, the runs asked
            different questions, or there are too few sizes.
    """
    frames, conditions, asked = [], [], dict[str, frozenset[Any]]()
    for folder, result in runs.items():
        condition, frame = _of_run(folder, result)
        frames.append(frame.assign(model=folder))
        conditions += [condition] * (not frame.empty)
        hashes = result.questions[["task", "doc_id", "doc_hash"]]
        asked[folder] = frozenset(hashes.itertuples(index=False, name=None))
    first = next(iter(asked))
    other = next((folder for folder in asked if asked[folder] != asked[first]), None)
    if other is not None:
        raise UsageError(
            f"scaling: {first} and {other} asked different questions; must be the same"
        )
    whole = below(pd.concat(frames, ignore_index=True), ceiling)
    models = of_models(whole).assign(condition=conditions)
    known = models[np.isfinite(models["median"])]
    if known["parameters"].nunique() < _SIZES or len(known) <= _SIZES:
        raise UsageError(
            f"scaling: {known['parameters'].nunique()} numbers of parameters in {len(known)} runs"
            f" with a known median; must be at least {_SIZES} in {_SIZES + 1} runs"
        )
    return models, laws(whole, resamples)


def _of_run(folder: str, result: Result) -> tuple[str, pd.DataFrame]:
    parameters = (result.run.get("of_model") or {}).get("parameters")
    if not parameters:
        raise UsageError(f"{folder}: does not know its model's number of parameters; run it again")
    score = critical.score_of(result.run)
    samples = critical.of_score(critical.judged(result.samples, score), result.questions, score)
    found = critical.looked_for(samples)
    if not found:
        raise UsageError(
            f"{folder}: has no critical epsilons; must be a run with the attack critical or fmn"
        )
    place = samples.loc[samples["condition"] == found[0], "hookpoint"].iloc[0]
    unit = rms_of(result.run["attacks"], place)
    return found[0], distances(samples, found[0], int(parameters), unit)


def cells(models: pd.DataFrame, fitted: pd.DataFrame) -> dict[str, Cells]:
    """Both tables as text, by title.

    Args:
        models: the first result of `scaling`.
        fitted: its second result.
    """
    of_each = [
        [
            row["model"], f"{row['parameters']:,}", f"{row['right']} of {row['asked']}",
            f"{row['accuracy']:.3f}", str(row["censored"]), f"{row['median']:.3g}",
        ]
        for row in models.to_dict("records")
    ]  # fmt: skip
    heading = ["model", "parameters", "right", "clean", "beyond", "median"]
    notes = [
        f"median: Kaplan-Meier, of the questions that are right at first, in RMS;"
        f" {', '.join(dict.fromkeys(models['condition']))}",
        "beyond: questions that stay right at every epsilon up to the largest one, or the ceiling",
    ]
    of_laws = [
        [
            row["method"], "yes" if row["covariate"] else "no",
            f"{row['exponent']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})",
            f"{row['lowest']:+.3f} to {row['highest']:+.3f}",
            "" if np.isnan(row["slope"]) else f"{row['slope']:+.2f}",
            f"{row['sigma']:.2f}",
        ]
        for row in fitted.to_dict("records")
    ]  # fmt: skip
    more = [
        "exponent of the number of parameters (95 % bootstrap interval over questions)",
        "without one: lowest and highest exponent if one number of parameters is left out",
        "slope: change of the log of the critical epsilon from accuracy 0 to 1",
        "sigma: standard deviation about the law, of models (medians) or questions (Tobit)",
    ]
    columns = ["method", "clean accuracy", "exponent", "without one", "slope", "sigma"]
    return {MODELS: Cells(heading, of_each, notes), LAWS: Cells(columns, of_laws, more)}


def figure(models: pd.DataFrame) -> Figure:
    """The median critical epsilon against the number of parameters; colours show the accuracy."""
    from matplotlib.figure import Figure

    known = models[np.isfinite(models["median"])]
    with print_style():
        drawn = Figure(figsize=(3.4, 2.6), layout="constrained")
        axes = drawn.subplots()
        points = axes.scatter(
            known["parameters"], known["median"], c=known["accuracy"], s=14, cmap="viridis"
        )
        axes.set(xscale="log", yscale="log", xlabel="parameters")
        axes.set_ylabel("median critical epsilon, RMS")
        drawn.colorbar(points, label="clean accuracy")
    return drawn
