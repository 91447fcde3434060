"""Networks from files and from other people's code: `--save` writes them for later attacks."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save_file
from torch import nn

from llm_attack import __version__
from llm_attack.base.errors import UsageError
from llm_attack.base.failures import one_line
from llm_attack.base.folder import check_readable, check_writable
from llm_attack.base.record import whole_or_not
from llm_attack.base.redact import redacted
from llm_attack.vision.networks import NETWORKS, WIDEST
from llm_attack.vision.settings import ImageSettings, Kind, with_recipe

_KEY = "llm_attack"  # the key of our metadata in the file
_HEADER = 100_000_000  # largest number of bytes, as in safetensors itself
# Exceptions of reading a file as weights.
UNREADABLE = (
    *(OSError, EOFError, SafetensorError, pickle.UnpicklingError),
    *(RuntimeError, ValueError, LookupError, TypeError, AttributeError),
)


def save(
    folder: Path, label: str, network: nn.Module, settings: ImageSettings, about: dict[str, Any]
) -> Path:
    """Writes weights, settings and `about` into `place(folder, label)`, and returns this path.

    Args:
        folder: the folder; it is made if necessary.
        label: name of the file. Characters that file names cannot have become `_`.
        network: the network.
        settings: the settings of its training, from which `settled` builds it again.
        about: more metadata: `network` (its name), `epochs`, accuracies.
    """
    path = place(folder, label)
    content = {"version": __version__, "settings": asdict(settings), **about}
    weights = {k: value.detach().cpu().contiguous() for k, value in network.state_dict().items()}
    with whole_or_not(path) as draft:
        save_file(weights, draft, {_KEY: json.dumps(redacted(content))})
    return path


def place(folder: Path, label: str) -> Path:
    """The path of a network's file.

    Raises:
        UsageError: the file cannot be written, or exists and is not from `save`.
    """
    path = folder / f"{re.sub(r'[^.a-zA-Z0-9_-]+', '_', label)}.safetensors"
    check_writable(folder, path.name, argument="save")
    if path.exists() or path.is_symlink():
        try:
            _of_kept(str(path))
        except UNREADABLE as error:
            raise UsageError(
                f"save={folder}: {path.name} in this folder was not written by --save"
                f" ({reason(error)}); must be another folder"
            ) from error
    return path


def read_metadata(path: str) -> dict[str, Any]:
    """The metadata of a network's file: settings, epochs, accuracies.

    Returns:
        `settings`, `network` (its name), `epochs`, `precision`. Files of `save` also have
            `accuracy` and other entries.

    Raises:
        UsageError: the file is no such file.
    """
    check_readable(path, "load")
    try:
        about = _of_checkpoint(path) if _is_checkpoint(path) else _of_kept(path)
        network = about["network"]
        _check("network", network, isinstance(network, str))
        width, epochs = about["settings"]["width"], about["epochs"]
        _check("width", width, type(width) in (int, float) and 0 < width <= WIDEST)
        _check("epochs", epochs, type(epochs) is int and 0 <= epochs < 2**31)
        precision = about.get("precision")  # older files do not have it
        _check("precision", precision, precision in (None, "float32", "bfloat16"))
    except UNREADABLE as error:
        wanted = "must be a file that --save wrote, or of checkpoints"
        raise UsageError(f"load={path}: {wanted} ({reason(error)})") from error
    if network not in NETWORKS:  # a file of weights must not choose the code that runs
        raise UsageError(
            f"load={path}: has network={network}, which is none of {', '.join(NETWORKS)}; give"
            " --network, and this file as --weights"
        )
    return about


def _check(name: str, value: Any, right: bool) -> None:
    if not right:
        raise ValueError(f"its {name} is {value!r:.80}")


def _is_checkpoint(path: str) -> bool:
    return path.endswith(".pt")


def _of_kept(path: str) -> dict[str, Any]:
    # without safetensors, which takes only paths in UTF-8;
    # https://github.com/huggingface/safetensors
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(size, _HEADER)))
    metadata: dict[str, Any] = json.loads(header["__metadata__"][_KEY])
    return metadata


def _of_checkpoint(path: str) -> dict[str, Any]:
    """The metadata of a checkpoint of `train`, whose label contains data set and network."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    settings = state["same"]
    sets = settings["dataset"].split(",")
    label = f"{settings['label']}-"  # more may follow in the label
    (network,) = (
        name
        for name in NETWORKS
        for dataset in sets
        if label.startswith(f"{dataset.strip()}-{name}-")
    )
    return {
        "settings": settings,
        "network": network,
        "epochs": state["epoch"],
        "precision": "bfloat16" if state["mixed"] else "float32",
    }


def settled(settings: Kind) -> Kind:
    """The settings as they take effect.

    They have the values of the recipe, and network and width of the file in `load`. If weights are
    given, `epochs` is 0.

    Raises:
        UsageError: see `read_metadata`; or `load` and `weights` are both given.
    """
    settings = with_recipe(settings)
    if settings.load is None:
        return settings if settings.weights is None else replace(settings, epochs=0)
    if settings.weights is not None:
        raise UsageError(
            f"weights={settings.weights}: must not be given with load, which already has weights"
        )
    about = read_metadata(settings.load)
    return replace(settings, network=about["network"], width=about["settings"]["width"], epochs=0)


def fill(network: nn.Module, argument: str, path: str) -> None:
    """Loads a file of weights, from safetensors or torch, into the network.

    Raises:
        UsageError: the file cannot be read, or does not fit. The message names `argument`, which
            gave the file.
    """
    check_readable(path, argument)
    try:
        weights: dict[str, Any]
        if path.endswith(".safetensors"):
            weights = from_bytes(Path(path).read_bytes())
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            weights = weights.get("network", weights)  # a checkpoint
        # a network on the device meta takes over the weights instead of copying them
        network.load_state_dict(weights, assign=any(x.is_meta for x in network.parameters()))
    except UNREADABLE as error:
        wanted = "must be weights of this network, as safetensors or torch.save write them"
        raise UsageError(f"{argument}={path}: {wanted} ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """The class of the error, and the line that says what is wrong."""
    if isinstance(error, pickle.UnpicklingError):  # its text explains how to run the file's code
        return f"{type(error).__name__}: it contains more than weights"
    return one_line(error)


def imported(name: str) -> nn.Module:
    """The classifier of pixels in [0, 1] that `package.module:function` returns.

    Modules in the working folder are found, too.

    Raises:
        UsageError: there is no such function, it fails, or it returns something else.
    """
    module, _, function = name.partition(":")
    with _here():
        try:
            network = getattr(importlib.import_module(module), function)()
        except Exception as error:  # foreign code may raise anything
            raise UsageError(
                f"network={name}: must be package.module:function, a function without arguments"
                f" ({one_line(error)})"
            ) from error
    if not isinstance(network, nn.Module):
        returned = type(network).__name__
        raise UsageError(f"network={name}: must return a torch.nn.Module, not {returned}")
    return network


@contextmanager
def _here() -> Iterator[None]:
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")
