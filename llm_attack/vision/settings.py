"""Settings that Fig. 1, 2 and 5 share, and the texts of their values. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import click

from llm_attack.attacks.settings import ATTACKS, ITERATIVE
from llm_attack.base.declare import check, is_plain, parts, setting
from llm_attack.base.errors import UsageError, invalid
from llm_attack.reproduce import DEVICE


class Amplitude(click.ParamType):  # type: ignore[type-arg]  # see options.Numbers
    """A number that may be written as a fraction, such as 8/255."""

    name = "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if not isinstance(value, str):
            return float(value)
        top, slash, bottom = value.partition("/")
        try:
            if is_plain(top) and is_plain(bottom):
                return int(top) / int(bottom) if slash else float(top)
        except (ValueError, ArithmeticError):
            pass
        self.fail(f"{value!r}: must be a number or a fraction, such as 8/255", param, ctx)


TRAININGS = ("none", "pgd", "trades")
# Recipes of training: defaults of options. `fast` reaches a high accuracy in few epochs. `paper` is
# our reading of arXiv 2205.01493, which states none of these: the defaults of Adam, and the usual
# augmentation.
RECIPES: dict[str, dict[str, Any]] = {
    "fast": {
        "optimiser": "sgd",
        "schedule": "cycle",
        "learning_rate": 0.05,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "label_smoothing": 0.1,
        "mirroring": "alternate",
    },
    "paper": {
        "optimiser": "adam",
        "schedule": "constant",
        "learning_rate": 1e-3,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "label_smoothing": 0.0,
        "mirroring": "random",
    },
}
UNBOUNDED = "_unbounded"  # suffix of the names of attacks without an amplitude
SEARCHES = ("deepfool", "sparsefool")
KNOWN = (
    *(name for name, kind in ATTACKS.items() if name != "none" and not kind.minimal),
    *(name + end for end in ("", UNBOUNDED) for name in SEARCHES),
)
"""The attacks on images, by name."""


def _by_recipe(name: str) -> str:
    values = ", ".join(f"{values[name]} for {recipe}" for recipe, values in RECIPES.items())
    return f"The default is {values}"


@dataclass(frozen=True)
class ImageSettings:
    """Settings of all image experiments.

    Raises:
        UsageError: a value is out of range; the message names it.
    """

    dataset: str = setting(
        "digits",
        "Data set: digits, mnist, cifar10, imagefolder:PATH, or any other that `datasets` loads",
        group="image",
    )
    network: str = setting(
        "cnn",
        "Network to attack: cnn, resnet18, googlenet or package.module:function",
        group="network",
    )
    weights: str | None = setting(
        None,
        "File of weights, by safetensors or torch.save. The network is attacked with them,"
        " without training",
        group="network",
    )
    load: str | None = setting(
        None,
        "Network that --save wrote, or a file of checkpoints, to attack without training;"
        " replaces --network",
        group="network",
    )
    save: str | None = setting(
        None,
        "Folder for the trained networks, with their settings and accuracies",
        group="network",
    )
    width: float = setting(
        1.0, "Factor on the channels of the networks", minimum=0, group="network"
    )
    attacks: str = setting(
        "ost,fgsm,bim,illc,pgd,sparsefool,sparsefool_unbounded",
        f"Attacks, separated by commas: {', '.join(KNOWN)}. Names in {UNBOUNDED} have no amplitude",
        group="attack",
    )
    epsilon: float | None = setting(
        None,
        "L-infinity amplitude, such as 8/255. The default is 0.1 for grey images and for"
        " features, and 8/255 for images in colour",
        option=Amplitude(),
        group="attack",
    )
    steps: int = setting(
        10, f"Number of steps of the iterative attacks ({ITERATIVE})", minimum=1, group="attack"
    )
    sparsefool_images: int | None = setting(
        None,
        "Number of the attacked images that DeepFool and SparseFool attack: the first ones. The"
        " default is all",
        minimum=1,
        group="image",
    )
    epochs: int = setting(
        30,
        "Number of passes over the training images; with 0, the network is attacked without"
        " training",
        minimum=0,
        group="training",
    )
    train_size: int | None = setting(
        None,
        "Number of training images, drawn at random. The default is all",
        minimum=1,
        group="image",
    )
    test_size: int | None = setting(
        None, "Number of test images, drawn at random. The default is all", minimum=1, group="image"
    )
    batch_size: int = setting(
        128, "Number of training images per step", minimum=1, group="training"
    )
    recipe: str = setting(
        "fast",
        "Recipe of training: the defaults of the options that name it. fast is one cycle of SGD"
        " with label smoothing; paper is our reading of the paper, Adam without smoothing",
        choices=tuple(RECIPES),
        group="training",
    )
    stop_at: float | None = setting(
        None,
        "Accuracy on all clean test images at which training ends. The default is to train all"
        " epochs",
        minimum=0,
        group="training",
    )
    optimiser: str | None = setting(
        None,
        f"Optimiser: SGD with Nesterov momentum (sgd), or adam. {_by_recipe('optimiser')}",
        choices=("sgd", "adam"),
        group="training",
    )
    schedule: str | None = setting(
        None,
        "Learning rate over the training: cycle rises for a quarter of the steps, then falls to"
        " zero; steps is a tenth after half of the steps and a hundredth after three quarters;"
        f" constant stays. {_by_recipe('schedule')}",
        choices=("cycle", "steps", "constant"),
        group="training",
    )
    learning_rate: float | None = setting(
        None, f"Highest learning rate. {_by_recipe('learning_rate')}", minimum=0, group="training"
    )
    momentum: float | None = setting(
        None,
        f"Momentum of SGD, or the first beta of Adam. {_by_recipe('momentum')}",
        minimum=0,
        group="training",
    )
    weight_decay: float | None = setting(
        None,
        f"Weight decay of the optimiser. {_by_recipe('weight_decay')}",
        minimum=0,
        group="training",
    )
    label_smoothing: float | None = setting(
        None,
        "Share of the labels that is spread over all classes in training."
        f" {_by_recipe('label_smoothing')}",
        minimum=0,
        group="training",
    )
    train_attack: str = setting(
        "none",
        "Attack that the network is trained against. With pgd it trains on attacked images (Madry"
        " et al. 2018), with trades on clean and attacked ones (Zhang et al. 2019)",
        choices=TRAININGS,
        group="training",
    )
    train_epsilon: float | None = setting(
        None,
        "L-infinity amplitude of --train_attack. The default is 0.1 for grey images, and 8/255"
        " for images in colour",
        option=Amplitude(),
        minimum=0,
        group="training",
    )
    train_steps: int | None = setting(
        None,
        "Number of steps of --train_attack. The default is 7 for pgd and 10 for trades",
        minimum=1,
        group="training",
    )
    train_step_size: float | None = setting(
        None,
        "Length of a step of --train_attack. The default is a quarter of its amplitude",
        option=Amplitude(),
        minimum=0,
        exclusive_minimum=True,
        group="training",
    )
    trades_beta: float = setting(
        6.0,
        "Weight of the divergence of clean and attacked scores in trades",
        minimum=0,
        group="training",
    )
    crop: int | None = setting(
        None,
        "Largest shift of training images, in pixels. The default is an eighth of their size",
        minimum=0,
        group="training",
    )
    flip: bool | None = setting(
        None,
        "Whether to mirror training images: true or false. The default is true for images in"
        " colour",
        group="training",
    )
    mirroring: str | None = setting(
        None,
        "How --flip chooses images: alternate mirrors half of them in the first epoch, and each"
        f" in every other epoch; random draws them in each epoch. {_by_recipe('mirroring')}",
        choices=("alternate", "random"),
        group="training",
    )
    precision: str = setting(
        "auto",
        "Precision of training; attacks always use float32. With auto, training uses bfloat16 on"
        " GPUs from compute capability 8.0, and on processors with AMX or AVX-512 for bfloat16 if"
        " it takes 5e12 operations or more. Otherwise it uses float32",
        choices=("auto", "float32", "bfloat16"),
        group="training",
    )
    train_split: str = setting(
        "train",
        "Split of the training images, as `datasets` writes it, such as train[:90%]",
        group="image",
    )
    test_split: str = setting("test", "Split of the test images, in the same form", group="image")
    image_column: str | None = setting(
        None, "Column of the images. The default is the first column with images", group="image"
    )
    label_column: str | None = setting(
        None,
        "Column of the labels. The default is the first column with class labels, or else label",
        group="image",
    )
    seed: int = setting(
        0, "Seed of weights, order, augmentation and attacks", minimum=0, group="engine"
    )
    device: str | None = setting(None, DEVICE, group="engine")

    def __post_init__(self) -> None:
        check(self)
        for name in ("momentum", "label_smoothing"):
            if self.chosen(name) >= 1:
                raise invalid(name, self.chosen(name), "at least 0 and below 1")
        if self.stop_at is not None and self.stop_at > 1:
            raise invalid("stop_at", self.stop_at, "a share from 0 to 1")

    def chosen(self, name: str) -> Any:
        """The value of a setting. If it was not given, the recipe decides."""
        value = getattr(self, name)
        return RECIPES[self.recipe][name] if value is None else value

    def check_used(self) -> None:
        """Refuses given settings that nothing reads.

        Raises:
            UsageError: the message names the setting, and a value of another setting that reads it.
        """
        defaults = {entry.name: entry.default for entry in fields(self)}
        for argument, (choices, own) in _READERS.items():
            used = {*parts(getattr(self, argument))}
            for name, readers in own.items():
                value = getattr(self, name)
                if value != defaults[name] and used.isdisjoint(readers) and used <= choices:
                    wanted = " or ".join(readers) if readers else "another data set"
                    given = f"{argument}={','.join(sorted(used))}"
                    raise UsageError(
                        f"{name}={value}: must be left out with {given}, which does not use it;"
                        f" {wanted} does"
                    )


# For each setting: the values with which certain other settings are not read, and for each of
# these, the values with which it is read.
_READERS: dict[str, tuple[frozenset[str], dict[str, tuple[str, ...]]]] = {
    "train_attack": (
        frozenset(TRAININGS),
        {
            **dict.fromkeys(("train_epsilon", "train_steps", "train_step_size"), TRAININGS[1:]),
            "trades_beta": ("trades",),
        },
    ),
    "dataset": (
        frozenset({"digits"}),
        dict.fromkeys(("train_split", "test_split", "image_column", "label_column"), ()),
    ),
}


Kind = TypeVar("Kind", bound=ImageSettings)


def with_recipe(settings: Kind) -> Kind:
    """The settings with the values of their recipe, unless others were given."""
    return replace(settings, **{name: settings.chosen(name) for name in RECIPES[settings.recipe]})


# The function that finds the settings in effect: with the recipe, and with network and width of the
# file in `load`.
EFFECTIVE = "llm_attack.vision.checkpoints:settled"

# Settings of all quick presets.
QUICK: dict[str, Any] = {"dataset": "digits", "width": 0.25, "epochs": 8, "batch_size": 32}

_LONGEST = 24  # characters of a data set's or network's name in a title
_LINE = 28  # characters of a line in a title
_SHOWN = {
    "cnn": "CNN",
    "resnet18": "ResNet-18",
    "googlenet": "GoogLeNet",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "apgdt": "APGD-T",
    "deepfool": "DeepFool",
    "deepfool_unbounded": "DeepFool, unbounded",
    "sparsefool": "SparseFool",
    "sparsefool_unbounded": "SparseFool, unbounded",
}


def titled(*parts: str) -> str:
    """The title of a panel, on as few lines as there is room for."""
    first, *others = parts
    for lines in ([", ".join(parts)], [first, ", ".join(others)]):
        if max(map(len, lines)) <= _LINE:
            return "\n".join(lines)
    return "\n".join(parts)


def shown(name: str) -> str:
    """The name of a data set, network or attack in figures. A path is cut to its last part."""
    if ":" in name or "/" in name:
        last = name.removeprefix("imagefolder:").rstrip("/").rsplit("/", 1)[-1]
        return last if len(last) <= _LONGEST else f"{last[: _LONGEST - 1]}…"
    return _SHOWN.get(name, name.upper() if len(name) < 5 else name)
