"""How figures look and how they are saved; matplotlib is imported by what needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_attack.record import whole_or_not

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is too light for lines on white: readable by the
# colour-blind, and of distinct lightness in grey print. https://jfly.uni-koeln.de/color/
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "llm_attack",  # the same figure is the same file
}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for all figures of this project, while the context lasts.

    Figures are made as `matplotlib.figure.Figure`, without pyplot, which would need a screen
    in some programs, and would keep every figure alive.
    """
    import matplotlib
    from cycler import cycler

    with matplotlib.rc_context({**_STYLE, "axes.prop_cycle": cycler(color=COLOURS)}):
        yield


def nested(i: int, n: int) -> dict[str, Any]:
    """Line width and marker of curve `i` of `n`, which are drawn one over the other.

    Each is thinner than those beneath it, and so are its markers, which are hollow and of another
    form: curves that coincide are all seen.
    """
    beneath = n - 1 - i
    return {
        "linewidth": 0.8 + 0.5 * beneath,
        "marker": _MARKERS[i % len(_MARKERS)],
        "markersize": 3 + beneath,
        "markerfacecolor": "none",
        "markeredgewidth": 0.9,
    }


def save_figure(figure: Figure, folder: Path, name: str = "figure") -> None:
    """Writes `name`.png and `name`.svg into `folder`; equal figures give equal files."""
    for form, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        with whole_or_not(folder / f"{name}.{form}") as draft:
            figure.savefig(draft, format=form, metadata=metadata)


@contextmanager
def new_figure(folder: Path, size: tuple[float, float], name: str = "figure") -> Iterator[Figure]:
    """A figure in our style, to be drawn in the context, at whose end it is saved into `folder`."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=size)
        yield figure
        save_figure(figure, folder, name)
