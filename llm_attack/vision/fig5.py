"""Fig. 5: like Fig. 2, with attacks on the features between two blocks of a network.

For the trained network, it also compares every split and the pixels, at amplitudes that are equal
shares of the attacked values. No torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_attack.base.declare import setting
from llm_attack.base.drawing import COLOURS, nested, new_figure
from llm_attack.base.options import Numbers
from llm_attack.base.record import as_csv, write_text
from llm_attack.reproduce import figure_command
from llm_attack.vision import fig2
from llm_attack.vision.settings import EFFECTIVE, KNOWN, QUICK, Amplitude, shown, titled

if TYPE_CHECKING:
    from torch import nn

    from llm_attack.vision.data import Dataset

PIXELS = "pixels"


@dataclass(frozen=True)
class Settings(fig2.Settings):
    """The settings. Data sets and networks may be several, as in Fig. 2."""

    at: str = setting(
        "layer3",
        "Block whose output is attacked: normalise in every network; conv1, conv2, fc1 in cnn;"
        " stem, layer1 to layer4, pool in resnet18; stem, inception3a, inception3b, pool3,"
        " inception4a to inception4e, pool4, inception5a, inception5b, pool in googlenet",
        group="attack",
    )
    epsilon_unit: str = setting(
        "rms",
        "Unit of epsilon: the root mean square of the features (rms), or their own unit",
        choices=("rms", "absolute"),
        group="attack",
    )
    epsilons: tuple[float, ...] = setting(
        (0.01, 0.02, 0.05, 0.1, 0.2),
        "Amplitudes of the comparison of all splits, in units of the root mean square of the"
        " attacked features",
        option=Numbers(Amplitude()),
        minimum=0,
        exclusive_minimum=True,
        group="attack",
    )
    split_attacks: str = setting(
        "fgsm,bim", "Attacks of the comparison of all splits, separated by commas", group="attack"
    )


PRESETS = {
    "quick": Settings(**QUICK, network="resnet18", subset=100, split_attacks="fgsm"),
    "paper": Settings(dataset="mnist,cifar10", network="resnet18", subset=1000),
}


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """Attack features, as fig2 attacks pixels.

    The output of a block of the network is perturbed. --dataset and --network may be several,
    separated by commas. splits.csv and splits.png compare all blocks of the trained networks, and
    their pixels, at equal relative amplitudes.
    """
    import pandas as pd

    from llm_attack.vision import stages

    attacks = stages.listed("split_attacks", settings.split_attacks, KNOWN)
    rows: list[dict[str, Any]] = []

    def then(dataset: Dataset, name: str, network: nn.Module) -> None:
        rows_of_network = compared(network, dataset, attacks, settings)
        rows.extend({"dataset": dataset.name, "network": name, **row} for row in rows_of_network)

    how: Any = {"at": settings.at, "epsilon_unit": settings.epsilon_unit, "then": then}
    results = fig2.curves(settings, folder, **how)
    write_text(folder / "splits.csv", as_csv(pd.DataFrame(rows), "%.6g"))
    draw_splits(folder)
    return results


def compared(
    network: nn.Module, dataset: Dataset, attacks: list[str], settings: Settings
) -> list[dict[str, Any]]:
    """Rows of `measure` for the pixels and each block except the last, at each of `epsilons`.

    Args:
        network: a chain of blocks.
        dataset: the data set. Its test images are attacked.
        attacks: names of attacks.
        settings: `epsilons`, `subset`, `steps`, `seed`.

    Returns:
        The rows, with `point` (a block's name, or `pixels`) and `relative`, the amplitude in units
            of the point's root mean square. `lowest`, `highest` and `all` are left out.
    """
    from llm_attack.vision.measure import measure

    points = [PIXELS, *(name for name, _ in network.named_children())][:-1]
    images = dataset.test[: settings.subset]  # for more, `all` would cost more than the attacks
    how: Any = {"steps": settings.steps, "seed": settings.seed}
    return [
        {"point": point, "relative": epsilon, **row}
        for point in points
        for epsilon in settings.epsilons
        for row in measure(
            network,
            images,
            attacks,
            epsilon=epsilon,
            epsilon_unit="rms",
            at=None if point == PIXELS else point,
            **how,
        )
        if row["condition"] in ("none", *attacks)
    ]


def draw_splits(folder: Path) -> None:
    """Draws splits.csv: a row of panels for each network, a column for each attack."""
    import pandas as pd

    table = pd.read_csv(folder / "splits.csv")
    pairs = list(table.groupby(["dataset", "network"], sort=False))
    attacks = [name for name in table["condition"].unique() if name != "none"]
    size = (max(2.7 * len(attacks), 3.4) + 1.2, 2.4 * len(pairs) + 0.3)
    with new_figure(folder, size, "splits") as figure:
        axes = figure.subplots(len(pairs), len(attacks), sharex=True, sharey=True, squeeze=False)
        for ((dataset, network), group), row in zip(pairs, axes, strict=True):
            for attack, axis in zip(attacks, row, strict=True):
                _splits(axis, group[group["condition"] == attack])
                axis.axhline(group["before"].iloc[0], color="0.4", linestyle="--", linewidth=0.8)
                title = titled(shown(dataset), shown(network), shown(attack))
                axis.set_title(title, fontsize=8)
            row[0].set_ylabel("robust accuracy")
            row[0].set_ylim(-0.02, 1.02)
        for axis in axes[-1]:
            axis.set_xlabel("ε / RMS")
            axis.set_xscale("log")
        longest = max(axes.flat, key=lambda axis: len(axis.get_lines()))
        figure.legend(*longest.get_legend_handles_labels(), loc="outside right center")


def _splits(axis: Any, table: Any) -> None:
    """Draws a curve with its interval for each attacked point."""
    points = list(table.groupby("point", sort=False))
    for i, (point, curve) in enumerate(points):
        style: Any = {"color": COLOURS[i % len(COLOURS)], "label": point}
        ends = (curve["low"], curve["high"])
        axis.fill_between(curve["relative"], *ends, color=style["color"], alpha=0.12, linewidth=0)
        dashes = ("-", "--")[i // len(COLOURS) % 2]
        look = nested(i, len(points))
        axis.plot(curve["relative"], curve["accuracy"], linestyle=dashes, **style, **look)


COMMAND = figure_command("fig5", PRESETS, run, EFFECTIVE)
