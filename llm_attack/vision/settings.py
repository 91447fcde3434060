"""Settings and presets of the image experiments, Fig. 1, 2 and 5. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import click

from llm_attack.experiment import check_settings, setting


class Amplitude(click.ParamType):
    """A number that may be written as a fraction, such as 8/255."""

    name = "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            return float(Fraction(value))
        except (ValueError, ZeroDivisionError):
            self.fail(f"{value!r}: must be a number or a fraction, such as 8/255", param, ctx)


_COUNT = click.IntRange(min=1)


@dataclass(frozen=True)
class Settings:
    """What the image experiments share.

    Raises:
        UsageError: a value is out of range; the message names it.
    """

    dataset: str = setting(
        "digits", "digits, mnist, cifar10, imagefolder:PATH, or another that `datasets` loads."
    )
    network: str = setting("cnn", "cnn, resnet18, googlenet.")
    width: float = setting(1.0, "Factor on the channels of the networks.", least=0)
    attacks: str = setting("ost,fgsm,bim,illc,pgd,sparsefool", "Names separated by commas.")
    epsilon: float | None = setting(
        None,
        "L-infinity amplitude, such as 8/255; unless given, 0.1 for grey images and for features, "
        "8/255 for images in colour.",
        type=Amplitude(),
    )
    steps: int = setting(10, "Of bim, illc and pgd.", least=1)
    epochs: int = setting(30, "Passes over the training images.", least=1)
    train_size: int | None = setting(None, "Training images, drawn at random.", type=_COUNT)
    test_size: int | None = setting(None, "Test images, drawn at random.", type=_COUNT)
    batch_size: int = setting(128, "Training images per step.", least=1)
    learning_rate: float = setting(0.05, "Highest of the cycle.", least=0)
    weight_decay: float = setting(5e-4, "Of the optimiser.", least=0)
    crop: int | None = setting(
        None,
        "Training images are shifted by up to so many pixels; unless given, an eighth of their "
        "size.",
        type=click.IntRange(min=0),
    )
    flip: bool | None = setting(
        None, "Whether training images are mirrored; unless given, those in colour.", type=bool
    )
    precision: str = setting(
        "auto",
        "Of training; auto: bfloat16 on GPUs that are made for it.",
        type=click.Choice(("auto", "float32", "bfloat16")),
    )
    train_split: str = setting("train", "As `datasets` writes it: train[:90%].")
    test_split: str = setting("test", "Likewise.")
    image_column: str | None = setting(None, "The first of images unless given.", type=str)
    label_column: str | None = setting(
        None, "The first of class labels unless given, else label.", type=str
    )
    seed: int = setting(0, "Of weights, order, augmentation and draws.", least=0)
    device: str | None = setting(
        None, "cuda, cuda:1, cpu, ...; cuda where there is one unless given.", type=str
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class GallerySettings(Settings):
    """Fig. 1: what the attacks do to a few images."""

    images: int = setting(2, "How many images to show.", least=1)


@dataclass(frozen=True)
class CurveSettings(Settings):
    """Fig. 2: accuracies against epoch, for several data sets and networks."""

    subset: int | None = setting(
        None, "Test images that bim, illc, pgd and sparsefool see; all unless given.", type=_COUNT
    )
    resume: bool = setting(
        False, "Goes on where an earlier run into the same folder stopped.", type=bool
    )


@dataclass(frozen=True)
class FeatureSettings(CurveSettings):
    """Fig. 5: the same, with the features attacked."""

    at: str = setting("layer3", "Block of the network whose output is attacked.")
    epsilon_unit: str = setting(
        "absolute",
        "rms: epsilon in units of the features' root mean square.",
        type=click.Choice(("absolute", "rms")),
    )


_QUICK: dict[str, Any] = {"dataset": "digits", "width": 0.25, "epochs": 8, "batch_size": 32}
_PAPER: dict[str, Any] = {"dataset": "mnist,cifar10", "subset": 1000}

GALLERY = {
    "quick": GallerySettings(**_QUICK),
    "paper": GallerySettings(dataset="cifar10", network="resnet18"),
}
CURVES = {
    "quick": CurveSettings(**_QUICK, network="cnn,resnet18,googlenet", subset=100),
    "paper": CurveSettings(**_PAPER, network="cnn,resnet18,googlenet"),
}
FEATURES = {
    "quick": FeatureSettings(**_QUICK, network="resnet18", subset=100),
    "paper": FeatureSettings(**_PAPER, network="resnet18"),
}
