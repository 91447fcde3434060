"""Where things stand in the figures of a run: rows of tasks, small panels, labels, legends.

Sizes are those of print: letters of 6 points and more in a figure of a column's width.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from llm_attack.drawing import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMN, _PAGE, _AXIS = 3.5, 7.2, 0.5  # inches: widths in print, and what the y axis takes of them
_SMALL = 6  # points
_LETTER = 0.053  # inches, the mean width of a small letter
_FONT: Any = {
    "axes.axisbelow": True,
    "axes.titlesize": _SMALL,
    "font.size": 7,
    "hatch.linewidth": 0.5,
    "legend.fontsize": 6.5,
}


@contextmanager
def print_style() -> Iterator[None]:
    """The settings of these figures, to draw and to save them."""
    import matplotlib

    with style(), matplotlib.rc_context(_FONT):
        yield


def wrapped(name: str, letters: int) -> str:
    """A task's name in lines, broken behind underscores where possible; nothing is left out."""
    lines = textwrap.wrap(name.replace("_", "_ "), letters)
    return "\n".join(line.replace("_ ", "_") for line in lines)


def rows_of_tasks(
    tasks: list[str], inches: float, height: float
) -> tuple[Figure, list[tuple[Axes, list[str]]], float]:
    """A figure with rows of tasks.

    Args:
        tasks: all of them.
        inches: width that a task needs for its bars; more if its labels are wider.
        height: of a row without labels, in inches.

    Returns:
        The figure; axes and tasks of each row, which stand at x = 0, 1, ...; the width of a task.
    """
    from matplotlib.figure import Figure

    longest = max(len(word) for task in tasks for word in task.replace("_", "_ ").split())
    inches = max(inches, _LETTER * (np.clip(longest, len("options"), 14) + 0.5))
    rows = int(np.ceil(len(tasks) * inches / (_PAGE - _AXIS)))
    per_row = int(np.ceil(len(tasks) / rows))
    width = np.clip(inches * per_row + _AXIS, _COLUMN, _PAGE)
    inches = (width - _AXIS) / per_row
    figure = Figure(figsize=(width, rows * (height + 0.5) + 0.3))
    parts = []
    for i, axes in enumerate(figure.subplots(rows, squeeze=False, sharey=True)[:, 0]):
        part = tasks[i * per_row : (i + 1) * per_row]
        axes.set_xlim(-0.5, per_row - 0.5)
        names = [wrapped(task, int(inches / _LETTER)) for task in part]
        axes.set_xticks(np.arange(len(part)), names, size=_SMALL)
        axes.tick_params(axis="x", length=0)
        parts.append((axes, part))
    return figure, parts, inches


def panels(names: Sequence[str], height: float = 1.15) -> tuple[Figure, dict[str, Axes]]:
    """A figure with small panels of equal axes, three or four abreast, by their names.

    Where they do not fill the grid, the first row is short: every column has an axis below. The
    height is that of a row, in inches.
    """
    from matplotlib.figure import Figure

    columns = min(4 if len(names) % 3 == 1 else 3, len(names))
    rows = int(np.ceil(len(names) / columns))
    figure = Figure(figsize=(_COLUMN, 0.6 + height * rows))
    cells = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    filled = columns - (rows * columns - len(names))  # of the first row
    for axes in cells[filled:columns]:
        axes.remove()
    grid = [*cells[:filled], *cells[columns:]]
    letters = int((_COLUMN - _AXIS) / columns / _LETTER)
    for name, axes in zip(names, grid, strict=True):
        axes.set_title(wrapped(name, letters))
    return figure, dict(zip(names, grid, strict=True))


def shade_options(axes: Axes, rows: pd.DataFrame, inches: float) -> list[str]:
    """Darkens the background of each task by its number of options, and names the number.

    Returns:
        The grey of each task.
    """
    ends = list(zip(rows["n_choices_min"], rows["n_choices_max"], strict=True))
    greys = [f"{1 - 0.03 * min((few + many) / 2, 10):.3f}" for few, many in ends]
    spans = [(pair, len(list(same))) for pair, same in groupby(ends)]
    left, between = -0.5, " " if min(n for _, n in spans) * inches > 0.65 else "\n"
    for (few, many), n in spans:
        axes.axvspan(left, left + n, color=greys[int(left + 0.5)], lw=0, zorder=0)
        axes.axvline(left, color="white", lw=1, zorder=0.1)  # spans may be of equal grey
        number = f"{few}" if few == many else f"{few}–{many}"
        above(axes, left + n / 2, f"{number}{between}options")
        left += n
    return greys


def above(axes: Axes, x: float, text: str) -> None:
    """Writes over the axes, at `x` in the data's units."""
    where: Any = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
    axes.text(x, 1.02, text, size=_SMALL, **where)


def upright(axes: Axes, x: float, y: float, text: str, ground: str) -> None:
    """Writes from (x, y) upwards, on a ground that hides the lines behind."""
    box = {"facecolor": ground, "edgecolor": "none", "pad": 0.2}
    place: Any = {"rotation": 90, "ha": "center", "va": "bottom", "bbox": box, "zorder": 4}
    axes.text(x, y, text, size=_SMALL, **place)


def handles(axes: Axes) -> list[list[tuple[Any, str]]]:
    """The artists that have a label, each as a column of a legend."""
    return [[pair] for pair in zip(*axes.get_legend_handles_labels(), strict=True)]


def legend(figure: Figure, columns: list[list[tuple[Any, str]]]) -> None:
    """A legend above the panels; where its columns find no room, in as many as do."""
    from matplotlib.lines import Line2D

    widths = [max(len(label) for _, label in column) * _LETTER + 0.37 for column in columns]
    depth = max(len(column) for column in columns)
    count = len(columns)
    if sum(widths) <= figure.get_figwidth():
        nothing = (Line2D([], [], ls=""), "")
        columns = [[*column, *[nothing] * (depth - len(column))] for column in columns]
    else:
        count = int(figure.get_figwidth() / max(widths))
    handles, labels = zip(*(entry for column in columns for entry in column), strict=True)
    form: Any = {"handlelength": 1.8, "columnspacing": 1.0, "loc": "outside upper center"}
    figure.legend(handles, labels, ncols=max(1, count), **form)
