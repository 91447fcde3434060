"""The layout of a run's figures: rows of tasks, small panels, labels, legends.

Sizes refer to print. Letters have at least 6 points in a figure of a column's width. Inside
`paper_style`, no figure is wider than a column, and all letters have 8 points.
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

from llm_attack.attacks.settings import SWAPS
from llm_attack.base.drawing import style
from llm_attack.lm.units import ABSOLUTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMN, _PAGE, _AXIS = 3.5, 7.2, 0.5  # inches: widths in print, and of the y axis
_SMALL = 6  # points
_LETTER = 0.053  # inches, the mean width of a small letter
_LINE = 0.12  # inches for a line of tick labels
_DECADES = 6  # longest logarithmic axis; smaller values are near 0
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
_SET: ContextVar[bool | None] = ContextVar("set", default=None)  # the style that is set: a paper's?
_POINTS = 8  # of all letters in a paper
_FONT_OF_PAPER: Any = {
    **dict.fromkeys(
        ("axes.titlesize", "figure.labelsize", "font.size", "legend.fontsize"), _POINTS
    ),
    "pdf.fonttype": 42,  # whole TrueType fonts, which publishers accept
}

# Characters that XML, and so an SVG file, cannot contain.
_NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@contextmanager
def print_style() -> Iterator[None]:
    """Sets the style of these figures, for drawing and saving."""
    import matplotlib

    paper = _PAPER.get()
    if _SET.get() is paper:  # setting it takes some hundredths of a second
        yield
        return
    before = _SET.set(paper)
    try:
        with style(), matplotlib.rc_context(_FONT | (_FONT_OF_PAPER if paper else {})):
            yield
    finally:
        _SET.reset(before)


@contextmanager
def paper_style() -> Iterator[None]:
    """Sets the style for figures in a column of a paper; see `print_style`."""
    before = _PAPER.set(True)
    try:
        with print_style():
            yield
    finally:
        _PAPER.reset(before)


def scaled(inches: float) -> float:
    """Scales a length that suits small letters to the current size of letters."""
    return inches * _small() / _SMALL


def _small() -> int:
    return _POINTS if _PAPER.get() else _SMALL


def legible(name: str) -> str:
    """A name as drawable text. Matplotlib leaves names that begin with _ out of legends."""
    name = _NOT_TEXT.sub("\ufffd", name)
    return f" {name}" if name.startswith("_") else name


def _letters(name: str) -> int:
    """The width of a name in small letters. For example, Chinese letters are twice as wide."""
    return len(name) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in name)


def wrapped(name: str, letters: int) -> str:
    """A task's whole name in several lines, broken after underscores if possible."""
    name = _NOT_TEXT.sub("\ufffd", name)
    letters = max(1, letters * len(name) // max(1, _letters(name)))
    lines = textwrap.wrap(name.replace("_", "_ "), letters)
    return "\n".join(line.replace("_ ", "_") for line in lines)


class Unit(NamedTuple):
    """The unit in which a figure shows epsilons.

    Attributes:
        name: text after "epsilon" on an axis; may be empty.
        size: its size in the units of the point.
    """

    name: str = ""
    size: float = 1.0


OF_POINT = Unit()


def unit_of(run: Mapping[str, Any]) -> Unit:
    """The unit in which the user gave the epsilons; that of the point if there are several.

    Args:
        run: the content of `run.json`, for one hookpoint.
    """
    without = ("none", *SWAPS)  # a number of tokens is no epsilon
    attacks = run.get("attacks", {}).values()
    given = [attack for attack in attacks if attack.get("attack") not in without]
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
        least: start of the logarithmic part, above 0.
        room: length of the linear part, in decades.
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
        tasks: names of all tasks.
        inches: width of a task's bars; a task is wider if its labels need it.
        height: height of a row without labels, in inches.

    Returns:
        The figure, the axes and tasks of each row (the tasks are at x = 0, 1, ...), and the width
            of a task.
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
    """A figure with small panels with equal axes, three or four in a row, by their names.

    If they do not fill the grid, the first row is short, so every column has an axis at its end.
    `height` is the height of a row, in inches.
    """
    from matplotlib.figure import Figure

    columns = min(4 if len(names) % 3 == 1 else 3, len(names))
    rows = int(np.ceil(len(names) / columns))
    figure = Figure(figsize=(_COLUMN, 0.6 + height * rows))
    cells = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    filled = columns - (rows * columns - len(names))  # panels in the first row
    for axes in cells[filled:columns]:
        axes.remove()
    grid = [*cells[:filled], *cells[columns:]]
    letters = int((_COLUMN - _AXIS) / columns / scaled(_LETTER))
    for name, axes in zip(names, grid, strict=True):
        axes.set_title(wrapped(name, letters))
    return figure, dict(zip(names, grid, strict=True))


def shade_options(axes: Axes, rows: pd.DataFrame, inches: float) -> list[str]:
    """Darkens the background of each task by its number of options, and writes the number above.

    Returns:
        The grey of each task.
    """
    ends = list(zip(rows["n_choices_min"], rows["n_choices_max"], strict=True))
    greys = [f"{1 - 0.03 * min((few + many) / 2, 10):.3f}" for few, many in ends]
    spans = [(pair, len(list(same))) for pair, same in groupby(ends)]
    left, between = -0.5, " " if min(n for _, n in spans) * inches > scaled(0.65) else "\n"
    for (few, many), n in spans:
        axes.axvspan(left, left + n, color=greys[int(left + 0.5)], lw=0, zorder=0)
        axes.axvline(left, color="white", lw=1, zorder=0.1)  # neighbours may have the same grey
        number = f"{few}" if few == many else f"{few}–{many}"
        if many:  # a text has no options
            above(axes, left + n / 2, f"{number}{between}options")
        left += n
    return greys


def above(axes: Axes, x: float, text: str) -> None:
    """Writes above the axes, at `x` in the data's units."""
    where: Any = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
    axes.text(x, 1.02, text, size=_small(), **where)


def upright(axes: Axes, x: float, y: float, text: str, ground: str) -> None:
    """Writes from (x, y) upwards, on a background that hides the lines behind."""
    box = {"facecolor": ground, "edgecolor": "none", "pad": 0.2}
    place: Any = {"rotation": 90, "ha": "center", "va": "bottom", "bbox": box, "zorder": 4}
    axes.text(x, y, text, size=_small(), **place)


def handles(axes: Axes) -> list[list[tuple[Any, str]]]:
    """The artists that have a label, each as a column of a legend."""
    return [[pair] for pair in zip(*axes.get_legend_handles_labels(), strict=True)]


def legend(figure: Figure, columns: list[list[tuple[Any, str]]]) -> None:
    """Adds a legend above the panels; with fewer columns if they do not fit."""
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
