"""Fig. 2: accuracies of image classifiers against epoch, with the pixels attacked.

`curves` and `draw` are those of Fig. 5 as well. No torch is imported here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_attack.declare import setting
from llm_attack.drawing import COLOURS, new_figure
from llm_attack.record import Stopwatch, as_csv, write_text
from llm_attack.reproduce import figure_command
from llm_attack.vision.settings import QUICK, UNBOUNDED, ImageSettings, shown, titled

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from llm_attack.vision.data import Dataset


@dataclass(frozen=True)
class Settings(ImageSettings):
    """Data sets and networks may be several here."""

    subset: int | None = setting(
        None,
        "Number of test images that all attacks see, the same for all curves; unless given, all",
        least=1,
    )
    attacked_epochs: int | None = setting(
        None,
        "Number of epochs after which to attack, spread evenly from the first to the last, which"
        " is always one of them; unless given, all",
        least=1,
    )


_ALL = "cnn,resnet18,googlenet"
NOT_ATTACKS = ("none", "lowest", "highest", "all")
PRESETS = {
    "quick": Settings(**QUICK, network=_ALL, subset=100),
    "paper": Settings(dataset="mnist,cifar10", network=_ALL, subset=1000),
}


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """Pixels attacked: clean and robust accuracies and their envelope after every epoch.

    --dataset and --network may be several, separated by commas.
    """
    return curves(settings, folder)


def curves(
    settings: Settings,
    folder: Path,
    at: str | None = None,
    epsilon_unit: str = "absolute",
    then: Callable[[Dataset, str, nn.Module], None] = lambda dataset, name, network: None,
) -> dict[str, Any]:
    """Trains and attacks each network on each data set.

    Writes the figure and `table.csv`, the rows of `measure`. What is finished is kept in
    `checkpoints`, where the same settings go on.

    Args:
        settings: checked before anything is trained.
        folder: for all files.
        at: the block whose output is attacked; None for pixels.
        epsilon_unit: `rms` for an epsilon in units of the point's root mean square.
        then: called with each data set, name and trained network.

    Returns:
        For each data set and network the accuracies after the last epoch; and the seconds.

    Raises:
        UsageError: bad settings, or data that cannot be used; before anything is trained.
    """
    import pandas as pd

    from llm_attack.vision import keeping, stages
    from llm_attack.vision.data import load
    from llm_attack.vision.measure import KNOWN
    from llm_attack.vision.networks import split

    settings = keeping.settled(settings)
    attacks = stages.listed("attacks", settings.attacks, KNOWN)
    names = stages.networks(settings)
    clock = Stopwatch()
    sets = dict.fromkeys(name.strip() for name in settings.dataset.split(","))
    datasets = [load(name, settings) for name in sets]
    clock.lap("data")
    epsilons = {dataset.name: stages.amplitude(settings, dataset, at) for dataset in datasets}
    pairs = [(dataset, name) for dataset in datasets for name in names]
    for dataset, name in pairs:
        stages.kept_in(settings, f"{dataset.name}-{name}")
        network = stages.untrained(dataset, name, settings)
        if at is not None:
            split(network, at)
    table, results = [], {}
    for dataset, name in pairs:
        label = f"{dataset.name}-{name}"
        file = re.sub(r"[^\w.-]+", "_", label)
        network, rows = stages.trained(
            dataset,
            name,
            settings,
            attacks,
            clock,
            state=folder / "checkpoints" / f"{file}.pt",
            epsilon=epsilons[dataset.name],
            subset=settings.subset,
            attacked_epochs=settings.attacked_epochs,
            at=at,
            epsilon_unit=epsilon_unit,
        )
        table += [{"dataset": dataset.name, "network": name, **row} for row in rows]
        results[label] = stages.summary(settings, dataset, network, rows)
        then(dataset, name, network)
    write_text(folder / "table.csv", as_csv(pd.DataFrame(table), "%.6g"))
    draw(folder, settings.width, at)
    return {**results, "seconds": clock}


def draw(folder: Path, width: float, at: str | None = None) -> None:
    """Draws, from table.csv, a row of panels for each data set, a column for each network.

    Args:
        folder: of the CSV file and the figure.
        width: of the networks; 1 is not mentioned.
        at: the block whose output was attacked; None for pixels.
    """
    import pandas as pd

    table = pd.read_csv(folder / "table.csv")
    datasets, networks = (list(table[column].unique()) for column in ("dataset", "network"))
    size = (max(2.4 * len(networks), 3.4) + 2.0, 2.3 * len(datasets) + 0.3)
    with new_figure(folder, size) as figure:
        axes = figure.subplots(
            len(datasets), len(networks), sharex=True, sharey=True, squeeze=False
        )
        for (dataset, network), group in table.groupby(["dataset", "network"], sort=False):
            axis = axes[datasets.index(dataset), networks.index(network)]
            _panel(axis, group)
            scaled = "" if width == 1 else f" × {width:g}"
            epsilon = group["epsilon"].iloc[-1]
            levels = round(255 * epsilon)
            whole = math.isclose(255 * epsilon, levels, rel_tol=1e-5)  # the CSV has six digits
            amplitude = f"{levels}/255" if whole else f"{epsilon:.3g}"
            title = titled(shown(dataset), f"{shown(network)}{scaled}", f"ε = {amplitude}")
            axis.set_title(title, fontsize=8)
        for axis in axes[-1]:
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
        for axis in axes[:, 0]:
            axis.set_ylabel("accuracy")
            axis.set_ylim(-0.02, 1.02)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        where = None if at is None else f"attacked at {at}"
        figure.legend(handles, labels, loc="outside right center", title=where)


def _panel(axis: Any, group: pd.DataFrame) -> None:
    """One panel: clean and robust accuracies with their intervals; the envelope of the latter."""
    attacks = [c for c in group["condition"].unique() if c not in NOT_ATTACKS]
    table = group.pivot(index="epoch", columns="condition", values=["accuracy", "low", "high"])
    accuracy = table["accuracy"]
    lines: Any = {"markersize": 3, "marker": "o" if len(accuracy) < 12 else ""}

    def curve(condition: str, colour: str, label: str, width: float, dashes: str = "-") -> None:
        ends = (table["low"][condition], table["high"][condition])
        axis.fill_between(table.index, *ends, color=colour, alpha=0.15, linewidth=0)
        axis.plot(accuracy[condition], dashes, color=colour, linewidth=width, label=label, **lines)

    ends = (accuracy["lowest"], accuracy["highest"])
    axis.fill_between(accuracy.index, *ends, color="0.85", linewidth=0, label="envelope")
    curve("none", COLOURS[-1], "clean", 1.8)
    kinds = list(dict.fromkeys(attack.removesuffix(UNBOUNDED) for attack in attacks))
    for attack in attacks:
        kind = attack.removesuffix(UNBOUNDED)
        colour = COLOURS[kinds.index(kind) % (len(COLOURS) - 1)]  # the last is that of clean images
        curve(attack, colour, shown(attack), 1, "-" if attack == kind else "--")


COMMAND = figure_command("fig2", PRESETS, run)
