"""The stages of an image experiment: checks of names, a network, its training under attack."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from llm_attack.attacks import Attack
from llm_attack.base.declare import declared, parts
from llm_attack.base.errors import UsageError, invalid
from llm_attack.base.failures import one_line
from llm_attack.base.folder import resolved
from llm_attack.base.record import Stopwatch, write_json
from llm_attack.vision.adversarial import usual_epsilon
from llm_attack.vision.checkpoints import fill, imported, place, read_metadata, save
from llm_attack.vision.data import Dataset
from llm_attack.vision.measure import Row, frozen, measure
from llm_attack.vision.networks import NETWORKS, build
from llm_attack.vision.rights import clean_accuracy
from llm_attack.vision.settings import ImageSettings
from llm_attack.vision.train import train

# The settings that describe a training.
_TRAINING = [entry.name for entry, spec in declared(ImageSettings) if spec.group == "training"]
_TRAINING += ["train_size", "seed"]


def listed(argument: str, text: str, allowed: Iterable[str]) -> list[str]:
    """The names in `text`, which are separated by commas."""
    allowed = list(allowed)
    names = list(dict.fromkeys(parts(text)))
    for name in names:
        if name not in allowed:
            raise invalid(argument, name, allowed)
    return names


def amplitude(settings: ImageSettings, dataset: Dataset, at: str | None = None) -> float:
    """The given epsilon, or the usual one for the attacked point: pixels, or the output of `at`."""
    usual = usual_epsilon(dataset.shape[0]) if at is None else 0.1
    epsilon = usual if settings.epsilon is None else settings.epsilon
    return Attack(epsilon=epsilon).epsilon  # this checks it


def networks(settings: ImageSettings) -> list[str]:
    """The names in `network`: of `NETWORKS`, or `package.module:function`."""
    names = listed("network", settings.network, [*NETWORKS, *_foreign(settings.network)])
    if settings.weights is not None and len(names) > 1:
        raise invalid("network", settings.network, "one name together with weights")
    return names


def _foreign(text: str) -> list[str]:
    return [name for name in parts(text) if ":" in name]


def untrained(dataset: Dataset, name: str, settings: ImageSettings) -> nn.Module:
    """The network `name` for these images, with weights from a file, or drawn with the seed.

    Raises:
        UsageError: the network cannot be made, or its weights or its scores do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        moments = [moment.cpu() for moment in dataset.train.moments()]
        how: Any = {
            "size": dataset.shape[1],
            "classes": len(dataset.classes),
            "width": settings.width,
        }
        given = {name: getattr(settings, name) for name in ("weights", "load")}
        given = {argument: path for argument, path in given.items() if path is not None}
        if given and ":" not in name:  # a file may describe more than fits into memory
            with torch.device("meta"):
                sizes = build(name, *moments, **how)
            for argument, path in given.items():
                fill(sizes, argument, path)
        network = imported(name) if ":" in name else build(name, *moments, **how)
    for argument, path in given.items():
        fill(network, argument, path)
    network = network.to(settings.device or "cpu")
    if ":" in name or settings.weights or settings.load:
        _check_scores(network, dataset, name)
    return network


def _check_scores(network: nn.Module, dataset: Dataset, name: str) -> None:
    """Raises `UsageError` unless two images have a finite score for each class."""
    wanted = (min(2, len(dataset.test)), len(dataset.classes))
    try:
        with frozen(network), torch.no_grad():
            scores = network(dataset.test[:2].scaled())
        shape, right = tuple(scores.shape), bool(scores.isfinite().all())
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"network={name}: fails on images of {dataset.name}: {one_line(error)}"
        ) from error
    if shape != wanted:
        raise UsageError(
            f"network={name}: must return scores of shape {wanted} for two images of"
            f" {dataset.name}, not {shape}"
        )
    if not right:
        raise UsageError(f"network={name}: must return finite scores for images of {dataset.name}")


def trained(
    dataset: Dataset,
    name: str,
    settings: ImageSettings,
    attacks: Sequence[str],
    clock: Stopwatch,
    *,
    attacked_epochs: int | None = None,
    state: Path | None = None,
    label: str | None = None,
    besides: Callable[[nn.Module], Row] = lambda network: {},
    **how: Any,
) -> tuple[nn.Module, list[Row]]:
    """Trains a network, and measures it after epochs; prints the results.

    After the first epoch, it prints how long the whole training will take.

    Args:
        dataset: the data set for training and measuring.
        name: name of the network.
        settings: settings of the training, and `steps` of the attacks.
        attacks: names of the attacks.
        clock: gets the seconds of training and of attacks.
        attacked_epochs: number of epochs after which to measure, spread evenly from the first to
            the last; None for all, 1 for the last.
        state: see `train`. Measurements are stored beside it, in a file with the suffix `.json`. A
            resumed run measures what is missing there.
        label: name of the network in messages and files; by default, from data set and name.
        besides: makes more columns, with numbers about the network, for all rows of an epoch.
        **how: arguments of `measure`, such as `epsilon`.

    Returns:
        The trained network, and the rows of `measure`.
    """
    label = f"{dataset.name}-{name}" if label is None else label
    kept = kept_in(settings, label)
    network, rows = untrained(dataset, name, settings), _kept_rows(state)
    how_to_train: Any = {"state": state, "label": label}
    how |= {"steps": settings.steps, "seed": settings.seed}
    how["searched"] = settings.sparsefool_images

    def measured(epoch: int, precision: str | None = None) -> list[Row]:
        rows_of_epoch = measure(network, dataset.test, attacks, **how)
        further = {**besides(network), "precision": precision}
        return [{"epoch": epoch, **row, **further} for row in rows_of_epoch]

    if not settings.epochs:
        about = {} if settings.load is None else read_metadata(settings.load)
        measurements = measured(about.get("epochs", 0), about.get("precision"))
        tqdm.write(f"{label}: without training{_said(measurements)}")
        clock.lap(f"{label} attacks")
        return network, measurements
    chosen = spread(settings.epochs, attacked_epochs)
    first = True
    for epoch, loss, precision in train(network, dataset.train, settings, **how_to_train):
        learning = clock.lap(f"{label} training")
        said = f"{label}: epoch {epoch} of {settings.epochs}, loss {loss:.4f}"
        last = epoch == settings.epochs or _reached(network, dataset, settings)
        missing = all(row["epoch"] != epoch for row in rows)
        if missing and (last or epoch in chosen):
            measurements = measured(epoch, precision)
            rows += measurements
            if state is not None:
                write_json(_beside(state), rows)
            said += _said(measurements)
        measuring = clock.lap(f"{label} attacks")
        if first and not last:
            more = sum(later > epoch for later in chosen)
            left = (settings.epochs - epoch) * learning + more * measuring
            unknown = "" if epoch in chosen else " without the attacks"
            said += f"; about {left / 60:.1f} more minutes for this network{unknown}"
            first = False
        tqdm.write(said)
        if last:
            break
    clock.lap(f"{label} training")
    if kept is not None:
        about = {
            "network": name,
            "dataset": dataset.name,
            **summary(settings, dataset, network, rows),
        }
        save(kept, label, network, settings, about)
    return network, rows


def state_file(folder: Path, label: str) -> Path:
    """The file in a folder of results from which a training can continue."""
    return folder / "checkpoints" / (re.sub(r"[^\w.-]+", "_", label) + ".pt")


def _beside(state: Path) -> Path:
    return state.with_suffix(".json")


def _kept_rows(state: Path | None) -> list[Row]:
    """The stored rows of a resumed run."""
    if state is None or not (state.exists() and _beside(state).exists()):
        return []
    try:
        rows: list[Row] = json.loads(_beside(state).read_text(encoding="utf-8"))
        epochs = [row["epoch"] for row in rows]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"output: {_beside(state)}: must be a file that the attacks wrote ({one_line(error)}),"
            " or not exist"
        ) from error
    return [row for row, epoch in zip(rows, epochs, strict=True) if type(epoch) is int]


def _reached(network: nn.Module, dataset: Dataset, settings: ImageSettings) -> bool:
    """Whether the network has the accuracy at which training ends."""
    if settings.stop_at is None:
        return False
    return clean_accuracy(network, dataset.test) >= settings.stop_at


def kept_in(settings: ImageSettings, label: str) -> Path | None:
    """The folder of `save`, if a network with this label can be stored in it.

    Raises:
        UsageError: it cannot; see `checkpoints.place`.
    """
    folder = None if settings.save is None else resolved(settings.save, "save")
    if folder is not None and settings.epochs:  # a network that is not trained is not stored
        place(folder, label)
    return folder


def _said(rows: Sequence[Row]) -> str:
    return "".join(f", {row['condition']} {row['accuracy']:.3f}" for row in rows)


def spread(epochs: int, n: int | None) -> set[int]:
    """`n` of the epochs from 1, evenly spread from the first to the last; None for all."""
    if n == 1:
        return {epochs}
    n = epochs if n is None else min(n, epochs)
    return {round(1 + i * (epochs - 1) / (n - 1)) for i in range(n)} if n > 1 else {epochs}


def summary(
    settings: ImageSettings, dataset: Dataset, network: nn.Module, rows: Sequence[Row]
) -> dict[str, Any]:
    """A network's entry in the record: sizes, precision of the training, the last accuracies.

    The entry has the width of the network. For a loaded network, the file says it. Then `trained`
    has the settings of its training, because those of the run trained nothing.
    """
    last = [row for row in rows if row["epoch"] == rows[-1]["epoch"]]
    loaded = None if settings.load is None else read_metadata(settings.load)["settings"]
    return {
        "width": settings.width,
        "parameters": sum(p.numel() for p in network.parameters()),
        "train_images": len(dataset.train),
        "test_images": len(dataset.test),
        "epochs": rows[-1]["epoch"],
        "precision": rows[-1].get("precision"),
        "epsilon": last[0]["epsilon"],
        "accuracy": {row["condition"]: round(row["accuracy"], 4) for row in last},
        **({} if loaded is None else {"trained": {k: loaded[k] for k in _TRAINING if k in loaded}}),
    }
