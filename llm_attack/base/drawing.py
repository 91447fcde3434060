"""The style of figures, and how they are saved. Functions import matplotlib when they need it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_attack.base.failures import Attempts
from llm_attack.base.record import whole_or_not

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The palette of Okabe and Ito without yellow, which is too light for lines on white. Colour-blind
# readers can tell it apart, and so can readers of grey prints. https://jfly.uni-koeln.de/color/
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

_FORMS = ("png", "svg")

# Matplotlib warns about letters that it cannot show in a PNG file. An SVG file has them as text.
_UNREADABLE = ("Glyph .* missing from", "Matplotlib currently does not support")


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for all figures of this project, while the context lasts.

    Make figures with `matplotlib.figure.Figure`, and not with pyplot. Pyplot needs a screen in some
    programs, and keeps every figure alive.
    """
    import matplotlib
    from cycler import cycler

    with matplotlib.rc_context({**_STYLE, "axes.prop_cycle": cycler(color=COLOURS)}):
        yield


def nested(i: int, n: int) -> dict[str, Any]:
    """Line width and marker of curve `i` of `n` curves that are drawn over each other.

    Each curve is thinner than those beneath it. Its markers are smaller, hollow and of another
    form. So all curves are visible if they coincide.
    """
    beneath = n - 1 - i
    return {
        "linewidth": 0.8 + 0.5 * beneath,
        "marker": _MARKERS[i % len(_MARKERS)],
        "markersize": 3 + beneath,
        "markerfacecolor": "none",
        "markeredgewidth": 0.9,
    }


def lettered(axes: Iterable[Any], letters: Iterable[str] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ") -> None:
    """Writes a letter beside the title of each panel, if there are several panels."""
    panels = list(axes)
    for axis, letter in zip(panels if len(panels) > 1 else (), letters, strict=False):
        axis.set_title(letter, loc="left", fontsize=9, fontweight="bold")


def save_figure(
    figure: Figure, folder: Path, name: str = "figure", title: str | None = None
) -> None:
    """Writes `name`.png and `name`.svg into `folder`. Equal figures give equal files.

    The SVG file contains `title`, or else `name`, for screen readers and browsers. Letters that the
    usual font does not have are drawn in another installed font that has them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.text import Text

    texts: list[Any] = figure.findobj(Text)
    more = _fonts_for(frozenset("".join(text.get_text() for text in texts)))
    for text in texts if more else ():
        text.set_fontfamily([*text.get_fontfamily(), *more])
    with warnings.catch_warnings():
        for message in _UNREADABLE:
            warnings.filterwarnings("ignore", message)
        # the canvas itself: `savefig` draws twice, once for the layout alone
        figure.dpi = _STYLE["savefig.dpi"]
        with whole_or_not(folder / f"{name}.png") as draft:
            png: Any = FigureCanvasAgg(figure)
            png.print_png(draft, metadata={"Software": None})
        # the layout is already made, and making it takes half of the time of drawing
        figure.set_layout_engine("none")
        with whole_or_not(folder / f"{name}.svg") as draft:
            svg: Any = FigureCanvasSVG(figure)
            svg.print_svg(draft, metadata={"Date": None, "Title": title or name})


def draw(
    folder: Path,
    name: str,
    make: Callable[[], Figure | None],
    attempts: Attempts | None = None,
    title: str | None = None,
) -> bool:
    """Writes the figure of `make` as `name`.png and `name`.svg. Returns whether it was written.

    `make` returns None if there is nothing to draw. Earlier files of that name are then removed.

    Args:
        folder: the folder.
        name: name of the files.
        make: draws the figure.
        attempts: collects a failure as a line; None: the failure is raised.
        title: as for `save_figure`.
    """
    with nullcontext() if attempts is None else attempts(f"figure {name}"):
        figure = make()
        if figure is not None:
            save_figure(figure, folder, name, title)
            return True
        for form in _FORMS:
            (folder / f"{name}.{form}").unlink(missing_ok=True)
    return False


@contextmanager
def new_figure(folder: Path, size: tuple[float, float], name: str = "figure") -> Iterator[Figure]:
    """Yields a figure in our style, and saves it into `folder` at the end of the context.

    If drawing or saving fails, the context prints one line on stderr and does not raise.
    """
    from matplotlib.figure import Figure

    attempts = Attempts()
    with style(), attempts(f"{folder}: figure {name}"):
        figure = Figure(figsize=size)
        yield figure
        save_figure(figure, folder, name)
    for line in attempts.lines:
        print(f"warning: {line}", file=sys.stderr, flush=True)


@cache
def _fonts_for(letters: frozenset[str]) -> list[str]:
    """Names of as few installed fonts as possible for letters that the usual font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager
    from matplotlib.ft2font import FT2Font

    usual = FT2Font(findfont(FontProperties())).get_charmap()
    missing = {letter for letter in letters if ord(letter) not in usual and letter.isprintable()}
    has: dict[str, set[str]] = {}
    for path in sorted(findSystemFonts()) if missing else ():
        try:
            font = FT2Font(path)
            some = missing & set(map(chr, font.get_charmap()))
        except (OSError, RuntimeError, ValueError):  # not a font that matplotlib can read
            continue
        if some and font.scalable and font.family_name not in has:
            fontManager.addfont(path)
            has[font.family_name] = some
    fonts = []
    while has and (best := max(has, key=lambda name: len(has[name] & missing))):
        if not has[best] & missing:
            break
        fonts.append(best)
        missing -= has.pop(best)
    return fonts
