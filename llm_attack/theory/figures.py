"""What the figures of the theory experiments share."""

from __future__ import annotations

from typing import Any

import pandas as pd


def shaded(ax: Any, table: pd.DataFrame, column: str, colour: str, **options: Any) -> None:
    """Draws the mean over seeds against epoch, and the range over seeds as a band.

    Args:
        ax: matplotlib's axes.
        table: a row for each epoch and seed.
        column: what is drawn; NaN where a seed has no value.
        colour: of the line and the band.
        **options: of the line.
    """
    by_epoch = table.groupby("epoch")[column]
    mean = by_epoch.mean()
    ax.fill_between(
        mean.index, by_epoch.min(), by_epoch.max(), color=colour, alpha=0.25, linewidth=0
    )
    ax.plot(mean.index, mean, color=colour, **options)
