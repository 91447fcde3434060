"""Figures of a run: accuracies as bars and against epsilon, gold margins, cosines of gradients.

Each function takes a frame of a run and returns a matplotlib figure of the size that it has in
print. That is one column of a paper (3.5 inches) if possible, and at most the width of a page.
Attacks differ in colour, lightness, hatch and marker, so they stay distinct in grey print and for
colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from llm_attack.attacks import ATTACKS
from llm_attack.attacks.settings import OF_TOKENS, ROUNDINGS
from llm_attack.base.drawing import COLOURS, draw
from llm_attack.base.failures import Attempts
from llm_attack.suite.analysis.conditions import by_name
from llm_attack.suite.analysis.outcomes import gold_margin, right
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.analysis.worst import WORST
from llm_attack.suite.report.layout import (
    OF_POINT,
    Unit,
    above,
    epsilon_axis,
    handles,
    legend,
    panels,
    print_style,
    rows_of_tasks,
    scaled,
    shade_options,
    upright,
)
from llm_attack.suite.report.tables import named_by_score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


TITLES = {
    "figure": "Accuracy under each condition",
    "epsilon": "Accuracy against epsilon",
    "margin": "Gold margin before and after",
    "cosine": "Cosine similarity of embeddings and gradient",
}


class _Look(NamedTuple):
    colour: str
    hatch: str
    marker: str
    line: Any


_LOOKS = {
    "none": _Look("#BBBBBB", "", "o", "-"),
    "random": _Look(COLOURS[5], "\\\\\\\\", "s", ":"),
    "fgsm": _Look(COLOURS[3], "////", "^", "-"),
    "bim": _Look(COLOURS[0], "xxxx", "D", "--"),
    "pgd": _Look(COLOURS[4], "++++", "v", "-."),
    "ost": _Look(COLOURS[2], "----", "<", (0, (4, 1, 1, 1, 1, 1))),
    "illc": _Look(COLOURS[1], "||||", ">", (0, (6, 2))),
    "reversed": _Look("#999933", "oo", "X", (0, (3, 1))),
    "uniform": _Look("#88CCEE", "\\\\", "1", (0, (1, 2))),
    "gaussian": _Look("#44AA99", "..", "2", (0, (1, 3))),
    "mifgsm": _Look("#882255", "xx", "d", (0, (5, 1))),
    "apgd": _Look("#332288", "++", "P", (0, (4, 1, 1, 1))),
    "apgdt": _Look("#AA4499", "**", "*", (0, (2, 1))),
    "blocks": _Look("#117733", "--", "p", (0, (3, 1, 1, 1))),
    "critical": _Look("#000000", "", "h", "-"),
    "fmn": _Look("#DDAA33", "||", "H", "--"),
    "rounding": _Look("#DDDDDD", "", "8", "-"),
    "random_rounding": _Look("#88CCEE", "\\\\\\\\", "s", ":"),
    "fgsm_rounding": _Look("#CC6677", "////", "^", "-"),
    "worst_rounding": _Look("#661100", "++", "P", (0, (4, 1, 1, 1))),
    "tied_rounding": _Look("#6699CC", "xx", "d", (0, (5, 1))),
    "tied_random_rounding": _Look("#88CCEE", "..", "2", (0, (1, 3))),
    "fixed": _Look("#CC6677", "", "o", "-"),
    "fixed-shuffled": _Look("#88CCEE", "//", "s", "--"),
    "fixed-random": _Look("#44AA99", "\\\\", "^", ":"),
    "worst": _Look("#000000", "///", "o", (0, (1, 1))),
}

_EDGE = "#333333"  # of bars; contrast 3:1 and more on every background, however pale a bar is
_GREY = "#8C8C8C"  # of areas without an edge; contrast 3:1 on white
_FAR = 1e300  # nats; differences of larger margins overflow


def bars(table: pd.DataFrame) -> Figure:
    """Accuracy per task and condition, as in Fig. 3 of arXiv 2205.01493.

    Error bars are 95 % intervals. Dashed lines are the accuracies of random guesses. The background
    is darker if a question has more options. Values are written on the bars. Many bars are divided
    into several rows of tasks.

    Args:
        table: the result of `summarise`.
    """
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch
    from matplotlib.patheffects import withStroke

    table = named_by_score(table[table["task"] != MEAN])
    conditions = _conditions(table)
    scored = "score" in table
    bottom, top = (0.0, 1.0) if not scored else _range(table)
    with print_style():
        inches_of_row = scaled(0.11) * len(conditions) + 0.1
        figure, parts, inches = rows_of_tasks(
            list(table["task"].unique()), inches_of_row, height=1.75
        )
        step = min(0.86 / len(conditions), 0.3 / inches)
        for axes, tasks in parts:
            of_tasks = table.drop_duplicates("task").set_index("task").loc[tasks]
            greys = shade_options(axes, of_tasks, inches)
            for i, (condition, face) in enumerate(conditions.items()):
                rows = table[table["condition"] == condition].set_index("task").loc[tasks]
                x = np.arange(len(tasks)) + step * (i - (len(conditions) - 1) / 2)
                acc, low, high = (rows[k].to_numpy(float) for k in ("acc", "acc_low", "acc_high"))
                bars = axes.bar(x, acc, 0.92 * step, label=condition, ec="white", lw=0, **face)
                corners = [bar.get_corners() for bar in bars]
                axes.add_collection(PolyCollection(corners, fc="none", ec=_EDGE, lw=0.5))
                ends = [acc - low, high - acc]
                _, caps, lines = axes.errorbar(
                    x, acc, ends, fmt="none", ecolor="k", lw=0.6, capsize=1.3
                )
                for part in (*caps, *lines):  # visible on dark bars, too
                    part.set_path_effects([withStroke(linewidth=1.4, foreground="white")])
                ends = np.fmax(high, acc)  # NaN if there is no interval
                for at, end, value, grey in zip(x, ends, acc, greys, strict=True):
                    upright(axes, at, end + 0.025 * (top - bottom), f"{value:.3f}", grey)
            left = np.arange(len(tasks)) - 0.5
            guess = axes.hlines(of_tasks["baseline"], left, left + 1, "k", "--", lw=0.9, zorder=3)
            axes.set(ylim=(bottom, bottom + (1 + scaled(0.27)) * (top - bottom)))
            axes.spines["left"].set_bounds(bottom, top)  # the room above is for the values
            axes.set_ylabel("score" if scored else "accuracy")
            if (bottom, top) == (0, 1):
                axes.set_yticks(np.arange(0, 1.01, 0.2))
            axes.grid(False, axis="x")
        columns: dict[str, list[tuple[Any, str]]] = {"none": []}
        edge = Patch(fc="none", ec=_EDGE, lw=0.5)
        for attack, bar in zip(_attacks(table), axes.containers[::2], strict=True):
            columns.setdefault(attack, []).append(((bar, edge), str(bar.get_label())))
        if table["baseline"].notna().any():
            columns["none"].append((guess, "random guess"))
        legend(figure, list(columns.values()))
    return figure


def curves(table: pd.DataFrame, unit: Unit = OF_POINT) -> Figure | None:
    """Accuracy against epsilon, a panel per task and one for their mean; None without such a curve.

    A curve starts at the accuracy without an attack. Bands are 95 % intervals, and dashed lines are
    the accuracies of random guesses. `worst` starts at the first amplitude that has two attacks.
    Searches for the smallest epsilon have an accuracy at only one epsilon, so they are left out,
    and so are attacks in rounding cells, which have no epsilon, and attacks that choose tokens.
    `survival.figure` has their curves. Each of several norms has panels of its own.

    Args:
        table: the result of `summarise`.
        unit: the unit of the epsilon axis.
    """
    without = [*ROUNDINGS, *OF_TOKENS, *(name for name, kind in ATTACKS.items() if kind.minimal)]
    table = _with_norms(table[~table["attack"].isin(without)], unit)
    # if an attack has several numbers of steps, the largest
    table = table.drop_duplicates(["task", "attack", "norm", "epsilon"], keep="last")
    of_attacks = table[table["attack"] != "none"]
    if not of_attacks.groupby(["attack", "norm"])["epsilon"].nunique().max() > 1:
        return None
    epsilons = of_attacks.loc[of_attacks["epsilon"] > 0, "epsilon"]
    table = named_by_score(table[table["acc"].notna()])
    scored = "score" in table
    bottom, top = (0.0, 1.0) if not scored else _range(table)
    norms = list(of_attacks["norm"].unique())
    places = {
        (task, norm): str(task) if len(norms) == 1 else f"{task} {norm}"
        for norm in norms
        for task in table["task"].unique()
    }
    with print_style():
        figure, grid = panels(list(places.values()))
        for (task, norm), name in places.items():
            axes = grid[name]
            rows = table[(table["task"] == task) & table["norm"].isin(["", norm])]
            _draw_curves(axes, rows, epsilons.min())
            axes.axhline(rows["baseline"].iloc[0], color="k", ls="--", lw=0.9, label="random guess")
            epsilon_axis(axes, epsilons, epsilons.min(), 0.5)
            axes.set(ylim=(bottom, bottom + 1.03 * (top - bottom)))
            if (bottom, top) == (0, 1):
                axes.set_yticks(np.arange(0, 1.01, 0.25))
        figure.supxlabel(f"epsilon{unit.name}")
        figure.supylabel("score" if scored else "accuracy")
        legend(figure, handles(axes))
    return figure


def _with_norms(table: pd.DataFrame, unit: Unit) -> pd.DataFrame:
    """The table with the norm of each condition, empty for `none`, and epsilons in `unit`.

    If the conditions have several norms and one unit, an epsilon is the number that the user gave,
    because the size of that unit differs between norms.
    """
    sizes = {name: c.amplitude for name, c in by_name(table).items() if c.amplitude is not None}
    norms = {name: size.norm for name, size in sizes.items()}
    epsilon = table["epsilon"] / unit.size
    if len({*norms.values()}) > 1 and len({size.epsilon.unit for size in sizes.values()}) == 1:
        given = table["condition"].map({name: size.epsilon.number for name, size in sizes.items()})
        epsilon = given.fillna(epsilon)
    return table.assign(epsilon=epsilon, norm=[norms.get(c, "") for c in table["condition"]])


def _draw_curves(axes: Axes, rows: pd.DataFrame, least: float) -> None:
    """The curve of each attack; `least` is the smallest epsilon above 0 of the figure."""
    for attack, curve in rows[rows["attack"] != "none"].groupby("attack", sort=False):
        first = curve["epsilon"].min()
        if first > 0 and not (attack == WORST and least < first):
            curve = pd.concat([rows[rows["attack"] == "none"], curve])
        curve = curve.sort_values("epsilon")
        like = look(str(attack))
        line: Any = {"color": like.colour, "marker": like.marker, "ls": like.line}
        axes.plot(curve["epsilon"], curve["acc"], ms=3, lw=1, label=attack, **line)
        ends = curve["acc_low"].to_numpy(float), curve["acc_high"].to_numpy(float)
        axes.fill_between(curve["epsilon"], *ends, color=like.colour, alpha=0.2, lw=0)


def margins(samples: pd.DataFrame) -> Figure | None:
    """Histogram of the gold margin before (grey) and after each attack, a panel per condition.

    The margin is the log-likelihood of the gold minus the best of the other choices. Above 0 the
    answer is right. Every task has the same weight. The outermost bins include all values beyond.
    None if no question has a margin.

    Args:
        samples: as in `samples.parquet`.
    """
    frame = samples[["task", "condition", "attack"]].assign(margin=gold_margin(samples)).dropna()
    frame["margin"] = frame["margin"].clip(-_FAR, _FAR)
    if frame.empty:
        return None
    frame["weight"] = 1 / frame.groupby(["condition", "task"])["margin"].transform("size")
    frame["weight"] /= frame.groupby("condition")["weight"].transform("sum")
    ends = frame.groupby("condition")["margin"].quantile([0.01, 0.99])
    low, high = ends.min(), ends.max()
    width = (high - low) / 40 or 1.0
    width = max(width, 1e-9 * abs(low), 1e-9 * abs(high))  # so edges differ
    edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1.5)
    inside = frame["margin"].clip(edges[0], (edges[-2] + edges[-1]) / 2)
    shares = {
        condition: np.histogram(inside[rows.index], edges, weights=rows["weight"])[0]
        for condition, rows in frame.groupby("condition", sort=False)
    }
    attacked = [condition for condition in shares if condition != "none"]
    with print_style():
        figure, grid = panels(attacked or ["none"])
        for condition, axes in grid.items():
            if "none" in shares:
                axes.stairs(shares["none"], edges, fill=True, color=_GREY, label="none")
            if condition != "none":
                axes.stairs(shares[condition], edges, color=COLOURS[0], lw=1, label="under attack")
            axes.axvline(0, color="k", ls="--", lw=0.9)
        figure.supxlabel("gold margin (nats)")
        figure.supylabel("share of questions")
        legend(figure, handles(axes))
    return figure


def cosines(samples: pd.DataFrame) -> Figure | None:
    """Cosine of embeddings and gradient, for questions answered right and wrong under `none`.

    For each task, boxes hold the middle half of the questions, whiskers the middle 90 %, and the
    line is the median. Their number is written above. None if no gradient was computed or `none`
    was not run.

    Args:
        samples: as in `samples.parquet`.
    """
    clean = samples[samples["condition"] == "none"].dropna(subset="cosine")
    if clean.empty:
        return None
    clean = clean.assign(right=right(clean))
    kinds = (("right", True, "white", ""), ("wrong", False, COLOURS[5], "////"))
    with print_style():
        figure, parts, _ = rows_of_tasks(list(clean["task"].unique()), 0.5, height=1.6)
        for axes, tasks in parts:
            for (kind, is_right, colour, hatch), shift in zip(kinds, (-0.2, 0.2), strict=True):
                rows = clean[clean["right"] == is_right]
                values = [rows.loc[rows["task"] == t, "cosine"].astype(float) for t in tasks]
                x = np.arange(len(tasks)) + shift
                # not `boxplot`: it imports pyplot, which chooses a screen for the whole program
                ends = [
                    np.quantile(v, (0.05, 0.25, 0.5, 0.75, 0.95)) if len(v) else 5 * [np.nan]
                    for v in values
                ]
                least, low, middle, high, most = np.transpose(ends)
                like: Any = {"fc": colour, "hatch": hatch, "ec": "k", "lw": 0.7, "label": kind}
                axes.bar(x, high - low, 0.32, low, **like)
                axes.hlines(middle, x - 0.16, x + 0.16, "k", lw=1.2)
                axes.vlines([*x, *x], [*least, *high], [*low, *most], "k", lw=0.7)
                axes.hlines([*least, *most], [*x - 0.08] * 2, [*x + 0.08] * 2, "k", lw=0.7)
                for at, part in zip(x, values, strict=True):
                    above(axes, at, f"{len(part)}")
            above(axes, -0.5, "n")
            axes.axhline(0, color="k", lw=0.5)
            axes.set_ylabel("cosine of\nembeddings and gradient")
            axes.grid(False, axis="x")
        legend(figure, handles(axes))
    return figure


def draw_all(
    samples: pd.DataFrame,
    table: pd.DataFrame,
    folder: Path,
    unit: Unit = OF_POINT,
    attempts: Attempts | None = None,
) -> list[str]:
    """Writes the figures that the data allow, each as .png and .svg; returns their names.

    `unit` is the unit of the epsilon axis. For `attempts`, see `drawing.draw`.
    """
    figures = {
        "figure": lambda: bars(table),
        "epsilon": lambda: curves(table, unit),
        "margin": lambda: margins(samples),
        "cosine": lambda: cosines(samples),
    }
    with print_style():
        drawn = figures.items()
        return [
            name for name, make in drawn if draw(folder, name, make, attempts, TITLES.get(name))
        ]


# Figures by name, from samples, table and unit; None if the data do not allow one.
FIGURES: dict[str, Callable[[pd.DataFrame, pd.DataFrame, Unit], Figure | None]] = {
    "bars": lambda samples, table, unit: bars(table),
    "curves": lambda samples, table, unit: curves(table, unit),
    "margins": lambda samples, table, unit: margins(samples),
    "cosines": lambda samples, table, unit: cosines(samples),
}


def look(attack: str) -> _Look:
    """Colour, hatch, marker and line of an attack."""
    return _LOOKS.get(attack, _Look("#000000", "..", "P", "-"))


def draw_amplitudes(axes: Axes, rows: pd.DataFrame, x: str, size: float = 3) -> None:
    """Draws accuracy against the column `x`: a line for each value of `attacked`, with its band.

    Smaller amplitudes of an attack are paler.
    """
    for attack, of_attack in rows.groupby("attack", sort=False):
        like = look(str(attack))
        labels = of_attack.sort_values("epsilon", kind="stable")["attacked"].unique()
        for i, label in enumerate(labels, 1):
            line = of_attack[of_attack["attacked"] == label].sort_values(x, kind="stable")
            form: Any = {"color": like.colour, "ls": like.line, "marker": like.marker}
            form |= {"label": label, "alpha": i / len(labels), "ms": size, "lw": 1}
            axes.plot(line[x], line["acc"], **form)
            ends = line["acc_low"].to_numpy(float), line["acc_high"].to_numpy(float)
            axes.fill_between(line[x], *ends, color=like.colour, alpha=0.2, lw=0)


def draw_levels(axes: Axes, rows: pd.DataFrame) -> None:
    """Draws dashed lines at the accuracies without an attack and of random guesses, if known."""
    for value, colour, label in (
        (rows.loc[rows["attack"] == "none", "acc"].mean(), "#888888", "none"),
        (rows["baseline"].iloc[0], "k", "random guess"),
    ):
        if np.isfinite(value):
            axes.axhline(value, color=colour, ls="--", lw=0.9, label=label)


def _range(table: pd.DataFrame) -> tuple[float, float]:
    """The range of an axis of scores: from 0 to 1, and more if scores are outside."""
    values = table[["acc", "acc_low", "acc_high"]].to_numpy(float)
    return min(0.0, float(np.nanmin(values))), max(1.0, float(np.nanmax(values)))


def _attacks(table: pd.DataFrame) -> list[str]:
    """The attack of each condition, in order."""
    return list(table.drop_duplicates("condition")["attack"])


def _conditions(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Colour and hatch of each condition's bars. Smaller epsilons of an attack are paler."""
    from matplotlib.colors import to_rgb

    rows = table.drop_duplicates("condition")
    attacks, faces = _attacks(table), {}
    ladders = rows.sort_values("epsilon", kind="stable").groupby("attack")["condition"]
    for condition, attack in zip(rows["condition"], attacks, strict=True):
        ladder = list(ladders.get_group(attack))
        strength = 1 - 0.6 * (len(ladder) - 1 - ladder.index(condition)) / len(ladder)
        like = look(attack)
        colour = tuple(1 - strength * (1 - part) for part in to_rgb(like.colour))
        faces[condition] = {"color": colour, "hatch": like.hatch}
    return faces
