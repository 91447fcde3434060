"""The loss over the steps of each attack: has it converged?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from llm_attack.attacks.settings import kind_of
from llm_attack.suite.analysis.conditions import Conditions
from llm_attack.suite.report.figures import look
from llm_attack.suite.report.layout import handles, legend, panels, print_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def mean_loss(trace: pd.DataFrame) -> pd.DataFrame:
    """The mean loss over questions, a row for each condition, attack and step.

    An attack that returns its best point so far has the loss of that point: the largest so far.

    Args:
        trace: the result of `Result.trace`.

    Returns:
        Columns `condition`, `attack`, `step`, `n` questions and `loss`.
    """
    place = ["condition", "attack", "task", "doc_id"]
    best = trace.groupby(place, sort=False)["loss"].cummax()
    kept = {str(name): _keeps_best(str(name)) for name in trace["attack"].unique()}
    loss = trace["loss"].where(~trace["attack"].map(kept).astype(bool), best)
    steps = trace.assign(loss=loss).groupby(["condition", "attack", "step"], sort=False)["loss"]
    return steps.agg(n="size", loss="mean").reset_index()


def _keeps_best(attack: str) -> bool:
    kind = kind_of(attack)
    return kind is not None and (kind.adaptive or kind.search) and not kind.minimal


def figure(trace: pd.DataFrame, known: Conditions) -> Figure | None:
    """Mean loss over steps, a panel for each attack; None if no attack makes several steps.

    Each condition has a line. Smaller amplitudes are paler. Norms after the first are dashed.

    Args:
        trace: the result of `Result.trace`.
        known: the conditions of the run.
    """
    means = mean_loss(trace)
    several = means.groupby("attack", sort=False)["step"].nunique() > 1
    attacks = [str(name) for name in several.index[several]]
    if not attacks:
        return None
    sizes = {n: c.amplitude for n, c in known.items() if c.amplitude is not None}
    norms = list(dict.fromkeys(size.norm for size in sizes.values()))
    ladder = sorted({size.epsilon.number for size in sizes.values()})
    with print_style():
        drawn, grid = panels(attacks)
        for attack, axes in grid.items():
            of_attack = means[means["attack"] == attack]
            for condition, rows in of_attack.groupby("condition", sort=False):
                size = sizes.get(str(condition))
                form: Any = {"color": look(attack).colour, "lw": 1, "label": str(size)}
                if size is not None:
                    form["alpha"] = (ladder.index(size.epsilon.number) + 1) / len(ladder)
                    form["ls"] = "-" if size.norm == norms[0] else "--"
                axes.plot(rows["step"], rows["loss"], **form)
        drawn.supxlabel("step")
        drawn.supylabel("mean loss")
        legend(drawn, handles(next(iter(grid.values()))))
    return drawn
