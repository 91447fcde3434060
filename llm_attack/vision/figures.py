"""The figures of the image experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from llm_attack.drawing import COLOURS, save_figure, style

_DISPLAY = {
    "cnn": "CNN",
    "resnet18": "ResNet-18",
    "googlenet": "GoogLeNet",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "sparsefool": "SparseFool",
}


def curves(table: pd.DataFrame, folder: Path, width: float, at: str | None) -> None:
    """Accuracy against epoch: a row of panels for each data set, a column for each network.

    Args:
        table: rows of `measure`, with dataset, network and epoch.
        folder: where figure.png and figure.svg go.
        width: of the networks; 1 is not mentioned.
        at: the block whose output was attacked; None for pixels.
    """
    datasets, networks = table["dataset"].unique(), table["network"].unique()
    ends = ("none", "lowest", "highest")
    attacks = [c for c in table["condition"].unique() if c not in ends]
    with style():
        size = (max(2.4 * len(networks), 3.4) + 1.4, 2.3 * len(datasets) + 0.3)
        figure = Figure(figsize=size)
        axes = figure.subplots(
            len(datasets), len(networks), sharex=True, sharey=True, squeeze=False
        )
        for (dataset, network), group in table.groupby(["dataset", "network"], sort=False):
            row, column = list(datasets).index(dataset), list(networks).index(network)
            epsilon = group["epsilon"].iloc[-1]
            _curve(axes[row, column], group, attacks)
            scaled = "" if width == 1 else f" × {width:g}"
            axes[row, column].set_title(
                f"{_display(dataset)}, {_display(network)}{scaled}, ε = {_amplitude(epsilon)}",
                fontsize=8,
            )
        for axis in axes[-1]:
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
        for axis in axes[:, 0]:
            axis.set_ylabel("accuracy")
            axis.set_ylim(-0.02, 1.02)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        title = None if at is None else f"attacked at {at}"
        figure.legend(handles, labels, loc="outside right center", title=title)
        save_figure(figure, folder)


def _curve(axis: Axes, group: pd.DataFrame, attacks: list[str]) -> None:
    """One panel: clean accuracy, robust accuracies, and the envelope of these as an area."""
    by_condition = group.pivot(index="epoch", columns="condition", values="accuracy")
    marker = "o" if len(by_condition) < 12 else ""
    lines: Any = {"markersize": 3, "marker": marker}
    axis.plot(by_condition["none"], color=COLOURS[-1], linewidth=1.8, label="clean", **lines)
    axis.fill_between(
        by_condition.index,
        by_condition["lowest"],
        by_condition["highest"],
        color="0.85",
        linewidth=0,
        label="envelope",
    )
    for attack, colour in zip(attacks, COLOURS * 2, strict=False):
        axis.plot(by_condition[attack], color=colour, linewidth=1, label=_display(attack), **lines)


def gallery(points: dict[str, Tensor], table: pd.DataFrame, folder: Path) -> None:
    """A row for each attack; for each image its picture, the perturbation, and their sum.

    Args:
        points: (N, C, H, W) in [0, 1] by condition; `none` has the clean images.
        table: image, condition, label, prediction, confidence, l0 and linf.
        folder: where figure.png and figure.svg go.
    """
    clean = points["none"]
    attacks = [name for name in points if name != "none"]
    cells = table.set_index(["image", "condition"])
    with style():
        figure = Figure(figsize=(3.6 * len(clean), 1.35 * len(attacks)))
        axes = figure.subplots(len(attacks), 3 * len(clean), squeeze=False)
        for row, attack in enumerate(attacks):
            for image, x in enumerate(clean):
                before, after = cells.loc[(image, "none")], cells.loc[(image, attack)]
                change = points[attack][image] - x
                largest = change.abs().max().item()
                left, middle, right = axes[row, 3 * image : 3 * image + 3]
                _show(left, x, _said(before))
                _show(
                    middle,
                    0.5 + change / (2 * largest) if largest else change * 0 + 0.5,
                    f"L0 {after['l0']:.0f}, L∞ {after['linf']:.3g}",
                    colours="RdBu_r",
                )
                _show(right, points[attack][image], _said(after))
                if after["prediction"] != before["prediction"]:
                    right.title.set_color(COLOURS[3])
            axes[row, 0].set_ylabel(_display(attack), fontsize=9)
        for axis, text in zip(
            axes[0], ("image", "perturbation", "attacked image") * len(clean), strict=True
        ):
            axis.set_title(f"{text}\n{axis.get_title()}", fontsize=7.5)
        save_figure(figure, folder)


def _show(axis: Axes, picture: Tensor, title: str, colours: str = "gray") -> None:
    pixels = picture.permute(1, 2, 0).numpy()
    axis.imshow(np.clip(pixels.squeeze(), 0, 1), cmap=colours, vmin=0, vmax=1)
    axis.set_title(title, fontsize=7.5, pad=3)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)


def _said(cell: pd.Series) -> str:
    return f"{cell['prediction']}, {100 * cell['confidence']:.1f} %"


def _amplitude(epsilon: float) -> str:
    levels = epsilon * 255
    return f"{levels:.0f}/255" if abs(levels - round(levels)) < 1e-6 else f"{epsilon:.3g}"


def _display(name: str) -> str:
    return _DISPLAY.get(name, name.upper() if len(name) < 5 else name)
