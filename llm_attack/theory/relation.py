"""Δx · Δp of image classifiers: the relation of Fig. 4 at features, as the paper claims it.

No torch is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_attack.base.declare import setting
from llm_attack.base.drawing import COLOURS, new_figure
from llm_attack.base.errors import invalid
from llm_attack.base.record import Stopwatch, as_csv, write_text
from llm_attack.reproduce import figure_command
from llm_attack.vision.settings import QUICK, ImageSettings

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from llm_attack.theory.packet import Uncertainty
    from llm_attack.vision.data import Dataset, Images

PIXELS = "pixels"
NORMALISED = "normalise"  # this block only scales the pixels
DIRECTIONS = ("gradient", "principal", "random")
MEASURED = ("dx", "dp", "product", "bound")
_KNOWN = 500  # test images for principal directions and distances
_NODES = {"panels": 16, "order": 8}  # of a line; a ReLU's jump costs the fourth digit


@dataclass(frozen=True)
class Settings(ImageSettings):
    """The settings, with one data set and one network."""

    images: int = setting(
        10,
        "Number of test images with a right answer, and as many with a wrong one, through which"
        " lines are drawn",
        minimum=1,
        group="line",
    )
    lines: int = setting(
        2,
        "Number of principal directions, and as many random ones, through each image",
        minimum=1,
        group="line",
    )
    reach: float = setting(
        1.0,
        "Half length of the lines, in units of the points' mean distance from their mean",
        minimum=0,
        exclusive_minimum=True,
        group="line",
    )


PRESETS = {
    "quick": Settings(**QUICK),
    "paper": Settings(dataset="mnist", epochs=4, width=0.25),
}


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """The uncertainty relation along lines through images.

    It is computed at pixels and features, by epoch. There is one --dataset and one --network. The
    packet is the loss of an image's own label.
    """
    import pandas as pd

    from llm_attack.vision import stages
    from llm_attack.vision.data import load_dataset

    clock = Stopwatch()
    name, *others = stages.networks(settings)
    if others:
        raise invalid("network", settings.network, "one network")
    dataset = load_dataset(settings.dataset, settings)
    clock.lap("data")
    table = pd.DataFrame(_rows(dataset, name, settings, clock))
    write_text(folder / "lines.csv", as_csv(table, "%.6g"))
    draw(folder)
    return {
        "lines": len(table),
        "lowest_margin": float((table["product"] - table["bound"]).min()),
        "seconds": clock,
    }


def _rows(
    dataset: Dataset, name: str, settings: Settings, clock: Stopwatch
) -> Iterator[dict[str, Any]]:
    """Yields a row for every epoch, block, direction and line."""
    from llm_attack.vision import stages
    from llm_attack.vision.train import train

    network = stages.untrained(dataset, name, settings)
    yield from _of_epoch(0, network, dataset.test, settings)
    for epoch, *_ in train(network, dataset.train, settings, label=f"{dataset.name}-{name}"):
        clock.lap("training")
        yield from _of_epoch(epoch, network, dataset.test, settings)
        clock.lap("lines")


def _of_epoch(
    epoch: int, network: nn.Module, test: Images, settings: Settings
) -> Iterator[dict[str, Any]]:
    import torch

    from llm_attack.vision.measure import frozen
    from llm_attack.vision.networks import split

    known = test[:_KNOWN]
    blocks = [PIXELS, *(name for name, _ in network.named_children() if name != NORMALISED)][:-1]
    with frozen(network), torch.no_grad():
        right = network(known.scaled()).argmax(-1) == known.labels
        of_kinds = [
            (good, (right == good).nonzero()[: settings.images, 0]) for good in (True, False)
        ]
        for block in blocks:
            head: nn.Module = network
            points = known.scaled()
            if block != PIXELS:
                extractor, head = split(network, block)
                points = extractor(points)
            away = points - points.mean(0)
            reach = settings.reach * away.flatten(1).norm(dim=1).mean().item()
            for good, some in of_kinds:
                for i in some.tolist():
                    directions = relations(head, points, i, known.labels[i], reach, settings)
                    for direction, relation in directions.items():
                        values = {m: getattr(relation, m)[0].tolist() for m in MEASURED}
                        for line in zip(*values.values(), strict=True):
                            yield {
                                **{"epoch": epoch, "block": block, "direction": direction},
                                **{"image": i, "right": good, "reach": reach},
                                **dict(zip(MEASURED, line, strict=True)),
                            }


def relations(
    head: nn.Module, points: Tensor, i: int, label: Tensor, reach: float, settings: Settings
) -> dict[str, Uncertainty]:
    """The relation along lines through the i-th of `points`: (1, lines) for each of `DIRECTIONS`.

    Args:
        head: maps points to scores.
        points: (N, ...) points, which also give the principal directions.
        i: number of a point.
        label: its label. The packet is the loss of this label.
        reach: half length of the lines, in L2.
        settings: `lines`, `seed`.
    """
    import torch

    from llm_attack.theory.lines import along, principal
    from llm_attack.vision.measure import cross_entropy

    def loss(x: Tensor) -> Tensor:
        flat = x.flatten(0, 2)
        return cross_entropy(head(flat), label.expand(len(flat))).reshape(x.shape[:3])

    x = points[i : i + 1]
    with torch.enable_grad():
        at = x.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(cross_entropy(head(at), label[None]).sum(), at)
    draws = torch.Generator().manual_seed(settings.seed + 1_000_003 * i)
    random = torch.randn((settings.lines, *x.shape[1:]), generator=draws).to(x)
    directions = (slope, principal(points, settings.lines), random)
    return {
        name: along(loss, x, lines, reach, **_NODES)
        for name, lines in zip(DIRECTIONS, directions, strict=True)
        if lines.flatten(1).norm(dim=1).gt(0).all()  # a sure network has no gradient
    }


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Means over images of the lines' means, with 95 % intervals by Student's t.

    There is a row for each epoch, block, direction and kind of image (`right`), with the number of
    images `n`.
    """
    import numpy as np
    import pandas as pd

    from llm_attack.stats import mean_of

    keys = ["epoch", "block", "direction", "right"]
    of_images = table.groupby([*keys, "image"], sort=False)[list(MEASURED)].mean().reset_index()
    rows = []
    for known, some in of_images.groupby(keys, sort=False):
        row = dict(zip(keys, known, strict=True)) | {"n": len(some)}
        for name in MEASURED:
            ends = ("", "_low", "_high")
            values = mean_of([(some[name], np.arange(len(some)))])[:3]
            row |= {f"{name}{end}": value for end, value in zip(ends, values, strict=True)}
        rows.append(row)
    return pd.DataFrame(rows)


def draw(folder: Path) -> None:
    """Draws lines.csv: Δx and Δp in units of the lines' reach, the product and its bound."""
    import pandas as pd

    table = pd.read_csv(folder / "lines.csv")
    scaled = table.assign(dx=table["dx"] / table["reach"], dp=table["dp"] * table["reach"])
    averages = means(scaled)
    blocks = list(averages["block"].unique())
    with new_figure(folder, (7.2, 6.0)) as figure:
        axes = figure.subplots(3, len(DIRECTIONS), sharex=True, sharey="row", squeeze=False)
        for direction, column in zip(DIRECTIONS, axes.T, strict=True):
            for i, block in enumerate(blocks):
                for right, dash in ((True, "-"), (False, "--")):
                    chosen = (averages["block"] == block) & (averages["right"] == right)
                    part = averages[chosen & (averages["direction"] == direction)]
                    form: Any = {"color": COLOURS[i % len(COLOURS)], "ls": dash, "lw": 1}
                    for axis, name in zip(column, ("dx", "dp", "product"), strict=True):
                        label = f"{block}, {'right' if right else 'wrong'}"
                        axis.plot(part["epoch"], part[name], label=label, **form)
            column[2].axhline(0.5, color="black", lw=1, ls=":")
            column[0].set_title(direction)
            column[2].set_xlabel("epoch")
        axes[0, 0].set_ylabel("Δx / reach")
        axes[1, 0].set_ylabel("Δp · reach")
        axes[2, 0].set_ylabel("Δx · Δp")
        axes[1, 0].set_yscale("log")
        figure.legend(
            *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7
        )


# Nothing is attacked here, and the network is neither loaded nor saved. Nobody varied the momentum.
_NO_OPTIONS = ("attacks", "epsilon", "steps", "load", "save", "momentum")

COMMAND = figure_command("relation", PRESETS, run, without=_NO_OPTIONS)
