"""Fig. 5 as the paper draws it: does robust accuracy fall faster at features than at pixels?

Each curve has one amplitude in the units of its point, the same after every epoch. No torch is
imported here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_attack.base.declare import again, parts, setting
from llm_attack.base.drawing import COLOURS, lettered, nested, new_figure
from llm_attack.base.errors import UsageError, invalid
from llm_attack.base.record import Stopwatch, as_csv, write_text
from llm_attack.reproduce import figure_command
from llm_attack.vision import fig2
from llm_attack.vision.settings import (
    EFFECTIVE,
    KNOWN,
    QUICK,
    UNBOUNDED,
    Amplitude,
    shown,
    titled,
)

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from llm_attack.vision.data import Dataset

PIXELS = "pixels"
ALL = "all"
SCALES = ("rms", "median")


@dataclass(frozen=True)
class Settings(fig2.Settings):
    """The settings. Data sets and networks may be several."""

    attacks: str = again(fig2.Settings, "attacks", "fgsm,bim")
    points: str = setting(
        ALL,
        f"Places that are attacked: {PIXELS} and blocks of the network, separated by commas;"
        f" {ALL}: the pixels and every block but the last",
        group="attack",
    )
    share: float = setting(
        0.05,
        "Amplitude of a curve, as a share of the scale of its point after the last epoch",
        option=Amplitude(),
        minimum=0,
        exclusive_minimum=True,
        group="attack",
    )
    scale: str = setting(
        "rms",
        "Scale of a point: the root mean square of all its values (rms), or the median over its"
        " channels of each one's root mean square (median), on which few strong channels have no"
        " influence",
        choices=SCALES,
        group="attack",
    )


PRESETS = {
    "quick": Settings(**{**QUICK, "epochs": 4}, subset=100, attacks="fgsm"),
    "paper": Settings(dataset="mnist,cifar10", network="resnet18", subset=1000),
}
_NETWORK = ["dataset", "network"]


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """Attack features after every epoch, and compare with pixels.

    Networks are trained first. Then they are attacked as they were after each epoch. Each curve has
    one amplitude. declines.csv compares the fall of robust accuracy at each block with that at the
    pixels, image by image.
    """
    import pandas as pd

    from llm_attack.vision import checkpoints, stages
    from llm_attack.vision.data import load_dataset

    settings = checkpoints.settled(settings)
    for name in ("load", "weights"):
        if getattr(settings, name) is not None:
            raise invalid(name, getattr(settings, name), "absent: networks are trained here")
    attacks = stages.listed("attacks", settings.attacks, KNOWN)
    for name in attacks:
        if name.endswith(UNBOUNDED):
            raise invalid("attacks", name, "attacks with an amplitude")
    clock = Stopwatch()
    datasets = [load_dataset(name, settings) for name in dict.fromkeys(parts(settings.dataset))]
    clock.lap("data")
    pairs = [(dataset, name) for dataset in datasets for name in stages.networks(settings)]
    for dataset, name in pairs:
        _points(stages.untrained(dataset, name, settings), settings)
    curves, falls, results = [], [], {}
    for dataset, name in pairs:
        label, known = f"{dataset.name}-{name}", {"dataset": dataset.name, "network": name}
        found = list(_attacked(dataset, name, attacks, settings, folder, clock))
        curves += [{**known, **row} for _, row in found]
        falls += [{**known, **row} for row in declines(found)]
        last = [row for _, row in found if row["epoch"] == settings.epochs]
        results[label] = {
            "epsilon": {row["point"]: row["epsilon"] for row in last},
            "clean": last[0]["accuracy"],
        }
    for name, rows in (("curves", curves), ("declines", falls)):
        write_text(folder / f"{name}.csv", as_csv(pd.DataFrame(rows), "%.6g"))
    draw(folder, settings.width)
    return {**results, "seconds": clock}


def _points(network: nn.Module, settings: Settings) -> list[str]:
    """The names of the attacked points, pixels first.

    Raises:
        UsageError: the network is no chain of blocks, or has no such block.
    """
    from torch import nn

    from llm_attack.vision import stages

    if not isinstance(network, nn.Sequential):
        raise UsageError(
            f"network={settings.network}: must be a torch.nn.Sequential of blocks, not"
            f" {type(network).__name__}"
        )
    allowed = [PIXELS, *(name for name, _ in network.named_children())][:-1]
    if settings.points == ALL:
        return allowed
    named = stages.listed("points", settings.points, allowed)
    return [PIXELS, *(name for name in named if name != PIXELS)]


def _attacked(
    dataset: Dataset,
    name: str,
    attacks: list[str],
    settings: Settings,
    folder: Path,
    clock: Stopwatch,
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Trains a network. Yields which images are right, with a row, for each epoch and point."""
    from tqdm import tqdm

    from llm_attack.vision import checkpoints, stages
    from llm_attack.vision.measure import wilson_of
    from llm_attack.vision.rights import right_under
    from llm_attack.vision.train import train

    label = f"{dataset.name}-{name}"
    network = stages.untrained(dataset, name, settings)
    few = dataset.test[: settings.subset]
    chosen = stages.spread(settings.epochs, settings.attacked_epochs)
    kept = {}
    state = stages.state_file(folder, label)
    for epoch, loss, _ in train(network, dataset.train, settings, state=state, label=label):
        kept[epoch] = stages.state_file(folder, f"{label}-{epoch}")
        if epoch in chosen:
            _keep(network, kept[epoch])
        tqdm.write(f"{label}: epoch {epoch} of {settings.epochs}, loss {loss:.4f}")
    clock.lap(f"{label} training")
    points = _points(network, settings)
    scales = {point: scale_of(network, few.scaled(), point, settings.scale) for point in points}
    epsilons = {point: settings.share * scale for point, scale in scales.items()}
    for point, epsilon in epsilons.items():
        tqdm.write(f"{label}: at {point}, epsilon {epsilon:.4g} at every epoch")
    how: Any = {"steps": settings.steps, "seed": settings.seed}
    for epoch in sorted(chosen):
        checkpoints.fill(network, "output", str(stages.state_file(folder, f"{label}-{epoch}")))
        for point in points:
            at = None if point == PIXELS else point
            rights = right_under(network, few, attacks, epsilon=epsilons[point], at=at, **how)
            for condition, right in rights.items():
                known = {"point": point, "epsilon": epsilons[point], "epoch": epoch}
                yield right, {**known, "condition": condition, **wilson_of(right)}
    clock.lap(f"{label} attacks")


def _keep(network: nn.Module, path: Path) -> None:
    import torch

    from llm_attack.base.record import whole_or_not

    with whole_or_not(path) as draft:
        torch.save(network.state_dict(), draft)


def scale_of(network: nn.Module, pixels: Tensor, point: str, scale: str) -> float:
    """The scale of a point (one of `SCALES`) over images (N, C, H, W) in [0, 1].

    Args:
        network: a chain of blocks.
        pixels: the images.
        point: `PIXELS`, or the block whose output (N, C, ...) is the point.
        scale: `rms`, the root mean square of all values; `median`, the median over C of each
            channel's root mean square.
    """
    import torch

    from llm_attack.attacks import widest
    from llm_attack.vision.measure import frozen
    from llm_attack.vision.networks import split

    extract = torch.nn.Identity() if point == PIXELS else split(network, point)[0]
    with frozen(network), torch.no_grad():
        features = torch.cat([extract(batch) for batch in pixels.split(250)])
    squares = features.to(widest(pixels.device)).square().transpose(0, 1).flatten(1).mean(1)
    return float((squares.median() if scale == "median" else squares.mean()).sqrt())


def declines(found: list[tuple[Tensor, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The fall of robust accuracy from the first to the last attacked epoch, at each point.

    Args:
        found: (whether each image is right (N,), row with point, epsilon, epoch, condition). The
            images are the same in all of them.

    Returns:
        A row for each attack and point. `decline` is the share of images that are right after the
            first epoch, minus that after the last, with its 95 % interval over images (`low`,
            `high`). `more` is the decline minus that at the pixels, with an interval that pairs the
            images (`more_low`, `more_high`), and `verdict` is its verdict.
    """
    from llm_attack.vision.trends import t_interval

    right = {(row["condition"], row["point"], row["epoch"]): x.double() for x, row in found}
    epochs = sorted({epoch for _, _, epoch in right})
    epsilons = {row["point"]: row["epsilon"] for _, row in found}
    rows = []
    for condition in dict.fromkeys(row["condition"] for _, row in found):
        if condition == "none":  # the same at every point
            continue
        falls = {
            point: right[condition, point, epochs[0]] - right[condition, point, epochs[-1]]
            for point in epsilons
        }
        for point, fall in falls.items():
            decline, low, high = t_interval(fall.tolist())
            more, more_low, more_high = t_interval((fall - falls[PIXELS]).tolist())
            verdict = "more" if more_low > 0 else "less" if more_high < 0 else "cannot be told"
            rows.append(
                {
                    **{"condition": condition, "point": point, "epsilon": epsilons[point]},
                    **{"first": epochs[0], "last": epochs[-1]},
                    **{"decline": decline, "low": low, "high": high},
                    **{"more": more, "more_low": more_low, "more_high": more_high},
                    "verdict": "" if point == PIXELS else verdict,
                }
            )
    return rows


def draw(folder: Path, width: float) -> None:
    """Draws curves.csv: a row of panels for each network, a column for each attack."""
    import pandas as pd

    table = pd.read_csv(folder / "curves.csv")
    pairs = list(table.groupby(_NETWORK, sort=False))
    attacks = [name for name in table["condition"].unique() if name != "none"]
    size = (max(2.7 * len(attacks), 3.4) + 1.8, 2.5 * len(pairs) + 0.3)
    with new_figure(folder, size) as figure:
        axes = figure.subplots(len(pairs), len(attacks), sharey=True, squeeze=False)
        for ((dataset, network), group), row in zip(pairs, axes, strict=True):
            for attack, axis in zip(attacks, row, strict=True):
                _curves(axis, group, attack)
                scaled = "" if width == 1 else f" × {width:g}"
                title = titled(shown(dataset), f"{shown(network)}{scaled}", shown(attack))
                axis.set_title(title, fontsize=8)
                axis.xaxis.get_major_locator().set_params(integer=True)
            row[0].set_ylabel("robust accuracy")
            row[0].set_ylim(-0.03, 1.03)
            row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=7)
        for axis in axes[-1]:
            axis.set_xlabel("epoch")
        lettered(axes.flat)


def _curves(axis: Any, group: pd.DataFrame, attack: str) -> None:
    points = list(group["point"].unique())
    clean = group[(group["condition"] == "none") & (group["point"] == points[0])]
    axis.plot(clean["epoch"], clean["accuracy"], color="0.4", linestyle=":", label="clean")
    for i, point in enumerate(points):
        curve = group[(group["condition"] == attack) & (group["point"] == point)]
        style: Any = {"color": COLOURS[i % len(COLOURS)], **nested(i, len(points))}
        label = f"{point}, ε = {curve['epsilon'].iloc[0]:.3g}"
        dashes = ("-", "--")[i // len(COLOURS) % 2]
        ends = (curve["low"], curve["high"])
        axis.fill_between(curve["epoch"], *ends, color=style["color"], alpha=0.12, linewidth=0)
        axis.plot(curve["epoch"], curve["accuracy"], label=label, linestyle=dashes, **style)


# Networks are trained here, so none is loaded. The amplitude is a share of a scale.
_NO_OPTIONS = ("load", "weights", "epsilon", "save", "stop_at", "sparsefool_images")

COMMAND = figure_command("declines", PRESETS, run, EFFECTIVE, without=_NO_OPTIONS)
