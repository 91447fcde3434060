"""Curves of several seeds: a line for the mean, and a band from the lowest to the highest."""

from __future__ import annotations

from typing import Any

import pandas as pd

MANY = 200  # epochs; longer curves are drawn as pixels, even in a vector figure


def over_seeds(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """For each group, the columns `by`, and NAME_mean, NAME_min, NAME_max of each other column.

    NaN (a seed without a value) is left out, and so is the column `seed`.
    """
    bands = table.drop(columns="seed").groupby(by).agg(["mean", "min", "max"])
    bands.columns = ["_".join(names) for names in bands.columns]
    return bands.reset_index()


def shaded(ax: Any, table: pd.DataFrame, column: str, colour: str, **options: Any) -> None:
    """Draws one column against epoch.

    Args:
        ax: matplotlib's axes.
        table: the result of `over_seeds`, with a row for each epoch.
        column: the NAME.
        colour: colour of the line and the band.
        **options: options of the line.
    """
    pixels = len(table) > MANY
    ends = (table[f"{column}_min"], table[f"{column}_max"])
    band: Any = {"color": colour, "alpha": 0.25, "linewidth": 0}
    ax.fill_between(table.epoch, *ends, rasterized=pixels, **band)
    ax.plot(table.epoch, table[f"{column}_mean"], color=colour, rasterized=pixels, **options)
