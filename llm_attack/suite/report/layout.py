"""Where things stand in the figures of a run: rows of tasks, small panels, labels, legends.

Sizes are those of print: letters of 6 points and more in a figure of a column's width. Inside
`paper_style` no figure is wider than a column, and all letters have 8 points.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from llm_attack.base.drawing import style
from llm_attack.lm.units import ABSOLUTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMN, _PAGE, _AXIS = 3.5, 7.2, 0.5  # inches: widths in print, and what the y axis takes of them
_SMALL = 6  # points
_LETTER = 0.053  # inches, the mean width of a small letter
_LINE = 0.12  # inches, what a line of tick labels needs
_DECADES = 6  # of a logarithmic axis at most; what is smaller stands near 0
_FONT: Any = {
    "axes.axisbelow": True,
    "axes.titlesize": _SMALL,
    "figure.labelsize": 7,
    "font.size": 7,
    "hatch.linewidth": 0.5,
    "legend.fontsize": 6.5,
    "text.parse_math": False,  # names of tasks, models and modules may have a $
}

_PAPER = ContextVar("paper", default=False)
_POINTS = 8  # of all letters in a paper
_FONT_OF_PAPER: Any = {
    **dict.fromkeys(
        ("axes.titlesize", "figure.labelsize", "font.size", "legend.fontsize"), _POINTS
    ),
    "pdf.fonttype": 42,  # whole TrueType fonts, which publishers take
}

# What XML, and so an SVG file, cannot hold.
_NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@contextmanager
def print_style() -> Iterator[None]:
    """The settings of these figures, to draw and to save them."""
    import matplotlib

    with style(), matplotlib.rc_context(_FONT | (_FONT_OF_PAPER if _PAPER.get() else {})):
        yield


@contextmanager
def paper_style() -> Iterator[None]:
    """Figures made and saved in it are for a column of a paper: see `print_style`."""
    before = _PAPER.set(True)
    try:
        with print_style():
            yield
    finally:
        _PAPER.reset(before)


def scaled(inches: float) -> float:
    """A length for small letters, for letters of the size that they have here."""
    return inches * _small() / _SMALL


def _small() -> int:
    return _POINTS if _PAPER.get() else _SMALL


def legible(name: str) -> str:
    """A name as text that can be drawn; matplotlib leaves what begins with _ out of legends."""
    name = _NOT_TEXT.sub("\ufffd", name)
    return f" {name}" if name.startswith("_") else name


def _letters(name: str) -> int:
    """The width of a name in small letters; Chinese ones, for example, are as wide as two."""
    return len(name) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in name)


def wrapped(name: str, letters: int) -> str:
    """A task's name in lines, broken behind underscores where possible; nothing is left out."""
    name = _NOT_TEXT.sub("\ufffd", name)
    letters = max(1, letters * len(name) // max(1, _letters(name)))
    lines = textwrap.wrap(name.replace("_", "_ "), letters)
    return "\n".join(line.replace("_ ", "_") for line in lines)


class Unit(NamedTuple):
    """What epsilons are shown in.

    Attributes:
        name: what an axis has behind "epsilon"; empty: nothing.
        size: one of it in the units of the point.
    """

    name: str = ""
    size: float = 1.0


OF_POINT = Unit()


def unit_of(run: Mapping[str, Any]) -> Unit:
    """The unit that the user gave the epsilons in; that of the point where there are several.

    Args:
        run: what `run.json` holds, of one hookpoint.
    """
    given = [attack for attack in run.get("attacks", {}).values() if attack.get("attack") != "none"]
    units = sorted({attack.get("epsilon_unit", ABSOLUTE) for attack in given})
    if len(units) > 1:
        return Unit(f" (absolute; given in {' and '.join(units)})")
    lengths = [(attack.get("epsilon"), attack.get("epsilon_absolute")) for attack in given]
    sizes = [absolute / epsilon for epsilon, absolute in lengths if epsilon and absolute]
    if units in ([], [ABSOLUTE]) or not sizes:
        return OF_POINT
    return Unit(f" ({units[0]})", sizes[0])


def epsilon_axis(axes: Axes, marks: Iterable[float], least: float, room: float) -> None:
    """Makes x an axis of epsilons from 0 on: linear at first, then logarithmic.

    Args:
        axes: a panel of `panels`.
        marks: epsilons that get a tick, and a label if there is room for it.
        least: where the logarithmic part begins, above 0.
        room: for what is below that, in decades.
    """
    marks = np.unique([0.0, *marks])
    least = max(least, marks[-1] / 10.0**_DECADES)
    axes.set_xscale("symlog", linthresh=least, linscale=room)
    places = axes.xaxis.get_transform().transform(marks)
    panel: Any = axes.get_subplotspec()
    width = 0.8 * (_COLUMN - _AXIS) / panel.get_gridspec().ncols
    places = width * places / places[-1]
    shown: list[int] = []
    for i in (0, *range(len(marks) - 1, 0, -1)):
        if all(abs(places[i] - places[j]) >= scaled(_LINE) for j in shown):
            shown.append(i)
    axes.set_xticks(marks[shown], [f"{marks[i]:.3g}" for i in shown], rotation=90)
    axes.set_xticks(np.delete(marks, shown), minor=True)
    axes.xaxis.set_minor_formatter("")


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

    words = [word for task in tasks for word in task.replace("_", "_ ").split()]
    longest = max(map(_letters, words), default=1)
    letter, page = scaled(_LETTER), _COLUMN if _PAPER.get() else _PAGE
    inches = max(inches, letter * (np.clip(longest, len("options"), 14) + 0.5))
    rows = int(np.ceil(len(tasks) * inches / (page - _AXIS)))
    per_row = int(np.ceil(len(tasks) / rows))
    width = np.clip(inches * per_row + _AXIS, _COLUMN, page)
    inches = (width - _AXIS) / per_row
    figure = Figure(figsize=(width, rows * (height + 0.5) + 0.3))
    parts = []
    for i, axes in enumerate(figure.subplots(rows, squeeze=False, sharey=True)[:, 0]):
        part = tasks[i * per_row : (i + 1) * per_row]
        axes.set_xlim(-0.5, per_row - 0.5)
        names = [wrapped(task, int(inches / letter)) for task in part]
        axes.set_xticks(np.arange(len(part)), names, size=_small())
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
    letters = int((_COLUMN - _AXIS) / columns / scaled(_LETTER))
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
    left, between = -0.5, " " if min(n for _, n in spans) * inches > scaled(0.65) else "\n"
    for (few, many), n in spans:
        axes.axvspan(left, left + n, color=greys[int(left + 0.5)], lw=0, zorder=0)
        axes.axvline(left, color="white", lw=1, zorder=0.1)  # spans may be of equal grey
        number = f"{few}" if few == many else f"{few}–{many}"
        if many:  # a text has none
            above(axes, left + n / 2, f"{number}{between}options")
        left += n
    return greys


def above(axes: Axes, x: float, text: str) -> None:
    """Writes over the axes, at `x` in the data's units."""
    where: Any = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
    axes.text(x, 1.02, text, size=_small(), **where)


def upright(axes: Axes, x: float, y: float, text: str, ground: str) -> None:
    """Writes from (x, y) upwards, on a ground that hides the lines behind."""
    box = {"facecolor": ground, "edgecolor": "none", "pad": 0.2}
    place: Any = {"rotation": 90, "ha": "center", "va": "bottom", "bbox": box, "zorder": 4}
    axes.text(x, y, text, size=_small(), **place)


def handles(axes: Axes) -> list[list[tuple[Any, str]]]:
    """The artists that have a label, each as a column of a legend."""
    return [[pair] for pair in zip(*axes.get_legend_handles_labels(), strict=True)]


def legend(figure: Figure, columns: list[list[tuple[Any, str]]]) -> None:
    """A legend above the panels; where its columns find no room, in as many as do."""
    from matplotlib.lines import Line2D

    letter = scaled(_LETTER)
    widths = [max(_letters(label) for _, label in column) * letter + 0.37 for column in columns]
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
