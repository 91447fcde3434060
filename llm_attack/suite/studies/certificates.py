"""Certified accuracy by randomised smoothing, beside critical epsilons: a figure and tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from llm_attack.base.drawing import COLOURS
from llm_attack.base.record import write_text
from llm_attack.lm.units import ABSOLUTE
from llm_attack.suite.analysis import critical
from llm_attack.suite.analysis.certified import SMOOTHING, accuracies, beside, nearest_found
from llm_attack.suite.analysis.conditions import Condition
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.report.layout import handles, legend, panels, print_style
from llm_attack.suite.report.tables import Cells, csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BESIDE = "certified by randomised smoothing"
CURVE = "certified accuracy by radius"
FOUND = "network, attacked"
_BEYOND = 0.9  # share of the finite critical epsilons that the figure shows


class Certificates(NamedTuple):
    """The certificates of a run, and the data that tables and figures show with them.

    Attributes:
        frame: the result of `analysis.certified.certified`.
        samples: the samples of the run, with critical epsilons if they were searched.
        known: the conditions of the run.
        record: the entry of `run.json` about certificates.
    """

    frame: pd.DataFrame
    samples: pd.DataFrame
    known: Mapping[str, Condition]
    record: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        frame: pd.DataFrame | None,
        samples: pd.DataFrame,
        known: Mapping[str, Condition],
        run: Mapping[str, Any],
    ) -> Certificates | None:
        """The certificates of a run; None if it has none."""
        if frame is None:
            return None
        return cls(frame, samples, known, run[SMOOTHING])

    @property
    def unit(self) -> tuple[str, float]:
        """Name and size of the unit in which lengths are shown."""
        unit, size = str(self.record["unit"]), float(self.record["unit_l2"])
        return ("", 1.0) if unit == ABSOLUTE or not size > 0 else (unit, size)


def tables(shown: Certificates | None) -> dict[str, tuple[Cells, pd.DataFrame]]:
    """The tables by their titles, as text and as frames; empty without certificates."""
    if shown is None:
        return {}
    curve = accuracies(shown.frame, shown.record["largest_radii"])
    both = beside(shown.frame, shown.samples, shown.known)
    return {BESIDE: (_beside(both, shown), both), CURVE: (_curve(curve), curve)}


def save(written: Mapping[str, tuple[Cells, pd.DataFrame]], folder: Path) -> None:
    """Writes `certified.csv` and `certified.md`; nothing without certificates.

    Args:
        written: the result of `tables`.
        folder: the folder of the run.
    """
    if not written:
        return
    write_text(folder / "certified.csv", csv(written[CURVE][1]))
    parts = [f"{title.capitalize()}\n\n{cells.markdown()}" for title, (cells, _) in written.items()]
    write_text(folder / "certified.md", "\n".join(parts))


def _beside(both: pd.DataFrame, shown: Certificates) -> Cells:
    unit, size = shown.unit
    searched = bool(both["ratio"].notna().any())
    rows = []
    for row in both.to_dict("records"):
        cells = [str(row["task"]), str(row["smoothing"]), f"{row['n']}"]
        cells += [_number(row["clean"], ".3f"), f"{row['vote']:.3f}", f"{row['abstained']}"]
        cells.append(_number(row["median_radius"] / size, ".3g"))
        if searched:
            cells.append(_number(row["median_critical"] / size, ".3g"))
            cells += [_number(row["ratio"], ".3g"), _number(row["nearer"], ".0f")]
        rows.append(cells)
    heading = ["task", "sigma", "n", "clean", "vote", "abstained", "radius"]
    level, draws = shown.record["failure_probability"], shown.record["draws"]
    notes = [
        "vote: accuracy of the smoothed classifier, whose answer is the choice that the model"
        " prefers most often under Gaussian noise; if it abstains, it counts as wrong",
        "radius: no perturbation shorter than this changes the vote. Its length is the L2 norm over"
        " all perturbed coordinates of the question together; median over the right votes. It is a"
        f" lower bound for the vote, and wrong with a probability of at most {level:g} for each"
        f" question ({draws} draws)",
    ]
    if unit:
        notes.append(
            f"lengths are in {unit}: the length of a token with one {unit} in each coordinate;"
            " sigma is the standard deviation of one coordinate"
        )
    if searched:
        heading += ["critical epsilon", "critical / radius", "nearer"]
        notes += [
            "critical epsilon: smallest length in L2 for which an attack of this run found a wrong"
            " answer of the network without noise, median over the same questions. It is an upper"
            " bound for the network, and says nothing about the vote",
            "critical / radius: median over these questions; nearer: those whose critical epsilon"
            " is not above the radius, so the network fails within the radius of its vote",
        ]
    return Cells(heading, rows, notes)


def _curve(curve: pd.DataFrame) -> Cells:
    steps = [float(step) for step in curve["radius_in_sigma"].unique()]
    rows = []
    for (task, name), group in curve.groupby(["task", "smoothing"], sort=False):
        by_step = group.set_index("radius_in_sigma")
        cells = [
            "{certified:.3f} ({low:.3f}–{high:.3f})".format(**by_step.loc[step].to_dict())
            if step in by_step.index
            else "–"
            for step in steps
        ]
        rows.append([str(task), str(name), f"{group['n'].iloc[0]}", *cells])
    notes = [
        "share of questions whose vote is right, and stays so under every perturbation of this"
        " length in L2 (95 % interval over questions); 0: accuracy of the vote"
    ]
    return Cells(
        ["task", "sigma", "n", *(f"{s:g} sigma" if s else "0" for s in steps)], rows, notes
    )


def figure(shown: Certificates | None) -> Figure | None:
    """Certified accuracy against the radius, a panel per task and one for their mean.

    A line per sigma, with its interval at the radii of `accuracies`. If the run searched critical
    epsilons in L2, a dotted line shows the share of questions whose critical epsilon is larger.

    Args:
        shown: the certificates; None gives None.
    """
    if shown is None:
        return None
    frame, (unit, size) = shown.frame, shown.unit
    curve = accuracies(frame, shown.record["largest_radii"])
    found = nearest_found(shown.samples, shown.known)
    tasks = list(frame["task"].unique())
    with print_style():
        drawn, grid = panels([*tasks, MEAN] if len(tasks) > 1 else tasks)
        for task, axes in grid.items():
            of_task = frame if task == MEAN else frame[frame["task"] == task]
            for i, (name, rows) in enumerate(of_task.groupby("smoothing", sort=False)):
                form: Any = {"color": COLOURS[i % (len(COLOURS) - 1)]}
                label = f"vote, certified, sigma {name}"
                _step(axes, _kept(rows), size, lw=1, label=label, **form)
                band = curve[(curve["task"] == task) & (curve["smoothing"] == name)]
                ends = band["low"], band["high"]
                axes.fill_between(band["radius"] / size, *ends, alpha=0.2, lw=0, **form)
            if found is not None:
                values = found if task == MEAN else found[found.index.get_level_values(0) == task]
                of_network = [v.to_numpy(float) for _, v in values.groupby(level=0, sort=False)]
                _step(axes, of_network, size, lw=1, ls=":", color=COLOURS[-1], label=FOUND)
            axes.set(xlim=(0, _end(shown, found) / size), ylim=(0, 1.03))
            axes.set_yticks(np.arange(0, 1.01, 0.25))
            axes.locator_params(axis="x", nbins=3)
        drawn.supxlabel(f"length of the perturbation in L2{f' ({unit})' if unit else ''}")
        drawn.supylabel("share of questions still right")
        legend(drawn, handles(axes))
    return drawn


def _kept(rows: pd.DataFrame) -> list[np.ndarray]:
    """For each task the radii; 0 if the vote is wrong."""
    radii = rows["radius"].where(rows["right"], 0.0)
    return [values.to_numpy(float) for _, values in radii.groupby(rows["task"], sort=False)]


def _step(axes: Any, values: list[np.ndarray], size: float, **form: Any) -> None:
    """Draws the share of values that are larger, as a mean over tasks."""
    finite = np.concatenate(values)
    steps = np.unique([0.0, *finite[np.isfinite(finite)]])
    axes.step(steps / size, critical.curve(values, steps), where="post", **form)


def _end(shown: Certificates, found: pd.Series | None) -> float:
    """The right end of the axis."""
    ends = [*map(float, shown.record["largest_radii"].values())]
    finite = [] if found is None else found[np.isfinite(found)]
    far = [float(np.quantile(finite, _BEYOND))] if len(finite) else []
    return 1.05 * max([*ends, *far])


def _number(value: float, form: str) -> str:
    return "–" if pd.isna(value) else format(value, form).replace("inf", "∞")
