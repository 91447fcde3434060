"""Fig. 2: accuracies of image classifiers against epoch, with the pixels attacked.

Fig. 5 also uses `curves` and `draw`. No torch is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_attack.base.declare import parts, setting
from llm_attack.base.drawing import COLOURS, lettered, nested, new_figure
from llm_attack.base.options import Numbers
from llm_attack.base.record import Stopwatch, as_csv, write_text
from llm_attack.reproduce import figure_command
from llm_attack.vision.settings import (
    EFFECTIVE,
    KNOWN,
    QUICK,
    UNBOUNDED,
    Amplitude,
    ImageSettings,
    shown,
    titled,
)

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from llm_attack.vision.data import Dataset


@dataclass(frozen=True)
class Settings(ImageSettings):
    """The settings. Data sets and networks may be several."""

    subset: int | None = setting(
        None,
        "Number of test images to attack, the same for all curves. The default is all",
        minimum=1,
        group="image",
    )
    attacked_epochs: int | None = setting(
        None,
        "Number of epochs after which to attack, spread evenly from the first to the last. The"
        " default is all",
        minimum=1,
        group="attack",
    )


@dataclass(frozen=True)
class SeveralNetworks(Settings):
    """Widths and seeds may be several, too."""

    widths: tuple[float, ...] = setting(
        (1.0,),
        "Widths of the networks, in units of --width",
        option=Numbers(Amplitude()),
        minimum=0,
        exclusive_minimum=True,
        group="network",
    )
    seeds: int = setting(
        1,
        "Number of seeds, starting at --seed. Each has networks of its own",
        minimum=1,
        group="training",
    )


_ALL = "cnn,resnet18,googlenet"
NOT_ATTACKS = ("none", "lowest", "highest", "all")
PRESETS = {
    "quick": Settings(**QUICK, network=_ALL, subset=100),
    "paper": Settings(dataset="mnist,cifar10", network=_ALL, subset=1000),
}


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """Attack pixels after every epoch of a training.

    The result is clean and robust accuracies, and the envelope of these. --dataset and --network
    may be several, separated by commas.
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

    It writes the figure, and `table.csv` with the rows of `measure`. Finished parts are in
    `checkpoints`. A call with the same settings continues there.

    Args:
        settings: the settings, which are checked before anything is trained.
        folder: the folder for all files.
        at: the block whose output is attacked; None for pixels.
        epsilon_unit: `rms` for an epsilon in units of the point's root mean square.
        then: called with each data set, name and trained network.

    Returns:
        The accuracies after the last epoch for each data set and network, and the seconds.

    Raises:
        UsageError: settings are bad, or data cannot be used. It is raised before anything is
            trained.
    """
    import pandas as pd

    from llm_attack.vision import checkpoints, stages
    from llm_attack.vision.data import load_dataset
    from llm_attack.vision.networks import split

    settings = checkpoints.settled(settings)
    attacks = stages.listed("attacks", settings.attacks, KNOWN)
    names = stages.networks(settings)
    clock = Stopwatch()
    sets = dict.fromkeys(parts(settings.dataset))
    datasets = [load_dataset(name, settings) for name in sets]
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
        network, rows = stages.trained(
            dataset,
            name,
            settings,
            attacks,
            clock,
            state=stages.state_file(folder, label),
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
    draw(folder, settings.width, at, epsilon_unit)
    return {**results, "seconds": clock}


def draw(folder: Path, width: float, at: str | None = None, epsilon_unit: str = "absolute") -> None:
    """Draws table.csv: a row of panels for each data set, a column for each network.

    A panel has accuracies against epoch. If the networks were attacked after only one epoch, it has
    a point for each attack instead.

    Args:
        folder: the folder of the CSV file and the figure.
        width: width of the networks; 1 is not mentioned.
        at: the block whose output was attacked; None for pixels.
        epsilon_unit: `rms` for an epsilon that follows the point's root mean square.
    """
    import pandas as pd

    table = pd.read_csv(folder / "table.csv")
    datasets, networks = (list(table[column].unique()) for column in ("dataset", "network"))
    panels = table.groupby(["dataset", "network"], sort=False)
    once = bool((panels["epoch"].nunique() == 1).all())
    size = (max(2.4 * len(networks), 3.4) + 2.0, 2.3 * len(datasets) + (0.9 if once else 0.3))
    with new_figure(folder, size) as figure:
        axes = figure.subplots(
            len(datasets), len(networks), sharex=True, sharey=True, squeeze=False
        )
        for (dataset, network), group in panels:
            axis = axes[datasets.index(dataset), networks.index(network)]
            (_points if once else _curves)(axis, group)
            scaled = "" if width == 1 else f" × {width:g}"
            parts = (shown(dataset), f"{shown(network)}{scaled}", _amplitude(group, epsilon_unit))
            axis.set_title(titled(*parts), fontsize=8)
        for axis in axes[:, 0]:
            axis.set_ylabel("accuracy")
            axis.set_ylim(-0.04, 1.04)
        lettered(axes.flat)
        where = None if at is None else f"attacked at {at}"
        if once:
            after = f"after epoch {table['epoch'].iloc[0]}"
            figure.supxlabel(after if where is None else f"{after}, {where}", fontsize=9)
            return
        for axis in axes[-1]:
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", title=where)


def _amplitude(group: pd.DataFrame, epsilon_unit: str) -> str:
    """Epsilon for the title of a panel, in a form that holds for all its epochs."""
    last = group.iloc[-1]
    if epsilon_unit == "rms":
        return f"ε = {last['epsilon'] / last['rms']:.3g} RMS"
    levels = round(255 * last["epsilon"])
    whole = math.isclose(255 * last["epsilon"], levels, rel_tol=1e-5)  # the CSV has six digits
    return f"ε = {levels}/255" if whole else f"ε = {last['epsilon']:.3g}"


def _styles(group: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The look of each condition: label, colour, dashes, and the look of `nested`."""
    attacks = [c for c in group["condition"].unique() if c not in NOT_ATTACKS]
    kinds = list(dict.fromkeys(attack.removesuffix(UNBOUNDED) for attack in attacks))
    styles: dict[str, dict[str, Any]] = {"none": {"label": "clean", "color": COLOURS[-1]}}
    for attack in attacks:
        kind = attack.removesuffix(UNBOUNDED)
        styles[attack] = {
            "label": shown(attack),
            "color": COLOURS[kinds.index(kind) % (len(COLOURS) - 1)],  # the last is for clean ones
        }
        if attack != kind:
            styles[attack] |= {"linestyle": "--", "markerfacecolor": "white"}
    return {c: {**nested(i, len(styles)), **style} for i, (c, style) in enumerate(styles.items())}


def _curves(axis: Any, group: pd.DataFrame) -> None:
    """Draws one panel: clean and robust accuracies with intervals, and the envelope of the latter.

    The envelope is hatched, so it does not look like the interval of a curve. For one epoch, an
    interval is a bar, because it has no area.
    """
    table = group.pivot(index="epoch", columns="condition", values=["accuracy", "low", "high"])
    accuracy = table["accuracy"]
    ends = (accuracy["lowest"], accuracy["highest"])
    look: Any = {"facecolor": "none", "edgecolor": "0.8", "hatch": "////", "linewidth": 0}
    axis.fill_between(accuracy.index, *ends, **look, label="envelope")
    for condition, style in _styles(group).items():
        ends = (table["low"][condition], table["high"][condition])
        if len(table) == 1:
            axis.vlines(table.index, *ends, color=style["color"], linewidth=1)
        axis.fill_between(table.index, *ends, color=style["color"], alpha=0.15, linewidth=0)
        axis.plot(accuracy[condition], markevery=math.ceil(len(accuracy) / 12), **style)


def _points(axis: Any, group: pd.DataFrame) -> None:
    """Draws one panel for one epoch: a point with its interval for each condition."""
    styles, table = _styles(group), group.set_index("condition")
    for i, (condition, style) in enumerate(styles.items()):
        row = table.loc[condition]
        ends = [[row["accuracy"] - row["low"]], [row["high"] - row["accuracy"]]]
        look: Any = {"color": style["color"], "capsize": 2, "markersize": 4, "linewidth": 1}
        axis.errorbar([i], [row["accuracy"]], ends, fmt="o", **look)
    names = [style["label"].replace(", ", ",\n") for style in styles.values()]
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")


COMMAND = figure_command("fig2", PRESETS, run, EFFECTIVE)
