"""Fig. 1: attacks on images that a network classifies right. No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_attack.base.declare import setting
from llm_attack.base.drawing import COLOURS, new_figure
from llm_attack.base.errors import UsageError, invalid
from llm_attack.base.record import Stopwatch, as_csv, write_text
from llm_attack.reproduce import figure_command
from llm_attack.vision.settings import EFFECTIVE, KNOWN, QUICK, ImageSettings, shown

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from llm_attack.vision.data import Dataset


@dataclass(frozen=True)
class Settings(ImageSettings):
    """The settings, with one data set and one network."""

    images: int = setting(
        2, "Number of images to show, each from another class", minimum=1, group="image"
    )


PRESETS = {
    "quick": Settings(**QUICK),
    "paper": Settings(dataset="cifar10", network="resnet18"),
}


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """Show images before and after attacks, with their labels.

    The gallery has the perturbations and the confidence too.
    """
    import pandas as pd
    import torch

    from llm_attack.attacks import Attack, keys_for
    from llm_attack.vision import checkpoints, stages
    from llm_attack.vision.data import load_dataset
    from llm_attack.vision.measure import Examples, attacked, frozen

    settings = checkpoints.settled(settings)
    attacks = stages.listed("attacks", settings.attacks, KNOWN)
    if len(names := stages.networks(settings)) > 1:
        raise invalid("network", settings.network, "one name")
    (name,) = names
    if "," in settings.dataset:
        raise UsageError(f"dataset={settings.dataset}: must be one data set")
    clock = Stopwatch()
    dataset = load_dataset(settings.dataset, settings)
    clock.lap("data")
    if settings.images > len(dataset.classes):
        raise invalid(
            "images", settings.images, f"at most {len(dataset.classes)}, one for each class"
        )
    epsilon = stages.amplitude(settings, dataset)
    network, rows = stages.trained(
        dataset,
        name,
        settings,
        ["fgsm"],
        clock,
        state=stages.state_file(folder, f"{dataset.name}-{name}"),
        attacked_epochs=1,
        epsilon=epsilon,
    )
    with frozen(network), torch.no_grad():
        images = _known(network, dataset, settings.images)
        x, labels = dataset.test[images].scaled(), dataset.test.labels[images]
        keys = torch.tensor([keys_for(settings.seed, [i]) for i in images], device=x.device)
        like = Attack(epsilon=epsilon, steps=settings.steps)
        pairs = attacked(attacks, network, Examples(x, labels, keys), like, (0, 1))
        points = {"none": x, **dict(pairs)}
        scores = {condition: network(point).softmax(1) for condition, point in points.items()}
    table = pd.DataFrame(
        {
            "image": i,
            "label": dataset.classes[labels[i]],
            "condition": condition,
            "prediction": dataset.classes[scores[condition][i].argmax()],
            "confidence": scores[condition][i].max().item(),
            **{f"l{p}": (point[i] - x[i]).flatten().norm(float(p)).item() for p in (0, 2, "inf")},
        }
        for i in range(len(images))
        for condition, point in points.items()
    )
    write_text(folder / "table.csv", as_csv(table, "%.6g"))
    draw({condition: point.cpu() for condition, point in points.items()}, table, folder)
    return {
        f"{dataset.name}-{name}": stages.summary(settings, dataset, network, rows),
        "seconds": clock,
    }


def _known(network: nn.Module, dataset: Dataset, n: int) -> list[int]:
    """The first `n` test images that the network classifies right, each from another class."""
    first = dataset.test[:250]
    right = network(first.scaled()).argmax(1) == first.labels
    seen: dict[int, int] = {}
    for i in right.nonzero()[:, 0].tolist():
        seen.setdefault(int(first.labels[i]), i)
    if len(seen) < n:
        raise UsageError(f"images={n}: the trained network knows images of {len(seen)} classes")
    return list(seen.values())[:n]


def draw(points: dict[str, Tensor], table: pd.DataFrame, folder: Path) -> None:
    """Draws a row for each attack: for each image the picture, the perturbation, and their sum.

    Args:
        points: (N, C, H, W) in [0, 1] by condition; `none` has the clean images.
        table: image, condition, label, prediction, confidence, l0 and linf.
        folder: the folder for figure.png and figure.svg.
    """
    clean = points["none"]
    attacks = [name for name in points if name != "none"]
    cells = table.set_index(["image", "condition"])
    with new_figure(folder, (3.6 * len(clean), 1.35 * len(attacks))) as figure:
        axes = figure.subplots(len(attacks), 3 * len(clean), squeeze=False)
        for row, attack in enumerate(attacks):
            for image, x in enumerate(clean):
                before, after = cells.loc[(image, "none")], cells.loc[(image, attack)]
                change = points[attack][image] - x
                largest = change.abs().max().item()
                left, middle, right = axes[row, 3 * image : 3 * image + 3]
                _show(left, x, _said(before))
                norms = f"L0 {after['l0']:.0f}, L∞ {after['linf']:.3g}"
                _show(middle, 0.5 + change / (2 * largest or 1), norms, colours="RdBu_r")
                _show(right, points[attack][image], _said(after))
                if after["prediction"] != before["prediction"]:
                    right.title.set_color(COLOURS[3])
            axes[row, 0].set_ylabel(shown(attack).replace(", ", ",\n"), fontsize=9)
        heads = ("image", "perturbation", "attacked image") * len(clean)
        for axis, text in zip(axes[0], heads, strict=True):
            axis.set_title(f"{text}\n{axis.get_title()}", fontsize=7.5)


def _show(axis: Any, picture: Tensor, title: str, colours: str = "gray") -> None:
    pixels = picture.clamp(0, 1).permute(1, 2, 0).numpy()
    axis.imshow(pixels.squeeze(), cmap=colours, vmin=0, vmax=1)
    axis.set_title(title, fontsize=7.5, pad=3)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)


def _said(cell: pd.Series) -> str:
    return f"{cell['prediction']}, {100 * cell['confidence']:.1f} %"


COMMAND = figure_command("fig1", PRESETS, run, EFFECTIVE)
