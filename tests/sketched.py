"""Figures that are made and laid down as files, but not drawn, because drawing takes longest.

`test_figures`, `test_layers`, `test_saving` and the tests of the report look at real drawings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_attack.base import drawing
from llm_attack.base.record import whole_or_not


def save_figure(figure: Any, folder: Path, name: str = "figure", title: str | None = None) -> None:
    """In place of `drawing.save_figure`, by as many durable operations."""
    for form in ("png", "svg"):
        with whole_or_not(folder / f"{name}.{form}") as draft:
            draft.write_text(f"{len(figure.axes)} panels" if form == "png" else "")


def sketch(patch: Any) -> None:
    """From now on figures are only sketched, until `patch` (of `pytest`) is undone."""
    patch.setattr(drawing, "save_figure", save_figure)
