"""Training of an image classifier, epoch by epoch, that can be resumed."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from llm_attack.base.errors import UsageError
from llm_attack.base.record import whole_or_not
from llm_attack.vision.adversarial import adversarial_examples, objective
from llm_attack.vision.checkpoints import reason
from llm_attack.vision.data import Images, augment
from llm_attack.vision.precision import mixed_precision
from llm_attack.vision.settings import ImageSettings, with_recipe


class Epoch(NamedTuple):
    """A trained epoch: its number from 1, its mean loss, and the precision."""

    number: int
    loss: float
    precision: str


def train(
    network: nn.Module,
    images: Images,
    settings: ImageSettings,
    *,
    state: Path | None = None,
    label: str = "",
) -> Iterator[Epoch]:
    """Trains `network` in place.

    The order of the images and their augmentation follow from the seed and the epoch's number. So a
    resumed run equals an uninterrupted one. If mirroring alternates, each image is seen both ways
    in any two epochs (Jordan 2024, arXiv 2404.00498).

    Args:
        network: the network, on the device of `images`.
        images: the training images.
        settings: `recipe` and the settings that it decides, `epochs`, `batch_size`, `crop`, `flip`,
            `precision`, `seed`, and those of `objective`.
        state: file with weights and optimiser. It is written after every epoch, before the epoch is
            yielded. If it exists, training continues from it.
        label: text of the progress bar.

    Yields:
        Each epoch after it was trained, with the precision `float32` or `bfloat16`. A resumed run
            first yields the epoch of `state` again.

    Raises:
        UsageError: `state` cannot be read, or was written under other settings; the loss of an
            epoch, or a weight after it, is not finite.
    """
    settings = with_recipe(settings)
    device = images.pixels.device
    batch = min(settings.batch_size, len(images))
    per_epoch = len(images) // batch
    steps = settings.epochs * per_epoch
    optimiser = _optimiser(network, settings)
    share = partial(SCHEDULES[settings.chosen("schedule")], steps=steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, share)
    same = {**asdict(settings), "label": label}
    same.pop("device", None)  # the resumed run may use another device
    crop, flip = _augmentation(images, settings)
    mirrored = torch.randint(
        2, (len(images),), generator=_drawn(settings, 0, device), device=device
    )
    done = 0
    if state is not None and state.exists():
        kept = _read(state, same, device)
        done, mixed = kept["epoch"], kept["mixed"]
        network.load_state_dict(kept["network"])
        optimiser.load_state_dict(kept["optimiser"])
        schedule.load_state_dict(kept["schedule"])
        yield Epoch(done, kept["loss"], _PRECISIONS[mixed])
    else:
        mixed = mixed_precision(settings.precision, network, images[:1].scaled(), steps * batch)
    seen: Any = {"total": steps * batch, "initial": done * per_epoch * batch, "unit": " images"}
    with tqdm(**seen, unit_scale=True, desc=label, disable=None) as bar:
        for epoch in range(done + 1, settings.epochs + 1):
            network.train()
            draws = _drawn(settings, epoch, device)
            order = torch.randperm(len(images), generator=draws, device=device)
            turns = mirrored + epoch
            if settings.mirroring == "random":
                turns = torch.randint(2, (len(images),), generator=draws, device=device)
            total = torch.zeros((), device=device)
            for rows_now in order[: per_epoch * batch].split(batch):
                now = images[rows_now]
                turned = turns[rows_now] % 2 == 1 if flip else None
                x = Images(augment(now.pixels, draws, crop=crop, flip=turned), now.labels).scaled()
                point = adversarial_examples(network, x, now.labels, settings, draws)
                with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                    loss = objective(network, x, point, now.labels, settings)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                total += loss.detach()
                bar.update(batch)
            mean = total.item() / per_epoch
            _check_finite(mean, network, epoch, settings)
            if state is not None:
                kept = {
                    "same": same,
                    "epoch": epoch,
                    "loss": mean,
                    "mixed": mixed,
                    "network": network.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "schedule": schedule.state_dict(),
                }
                with whole_or_not(state) as draft:
                    torch.save(kept, draft)
            yield Epoch(epoch, mean, _PRECISIONS[mixed])


def _augmentation(images: Images, settings: ImageSettings) -> tuple[int, bool]:
    """The largest shift in pixels, and whether images are mirrored."""
    channels, size = images.pixels.shape[1:3]
    crop = size // 8 if settings.crop is None else settings.crop
    return crop, channels == 3 if settings.flip is None else settings.flip


def _optimiser(network: nn.Module, settings: ImageSettings) -> torch.optim.Optimizer:
    rate, momentum = settings.chosen("learning_rate"), settings.chosen("momentum")
    decay = settings.chosen("weight_decay")
    weights = network.parameters()
    if settings.chosen("optimiser") == "adam":
        return torch.optim.Adam(weights, rate, betas=(momentum, 0.999), weight_decay=decay)
    nesterov = momentum > 0  # torch has none without momentum
    return torch.optim.SGD(weights, rate, momentum=momentum, nesterov=nesterov, weight_decay=decay)


def one_cycle(step: int, *, steps: int) -> float:
    """Share of the highest learning rate: up in the first quarter of the steps, then down to 0."""
    share = (step + 1) / (steps + 1)
    return min(4 * share, (1 - share) * 4 / 3)


def by_steps(step: int, *, steps: int) -> float:
    """Share of the highest learning rate, in steps (He et al. 2016, for CIFAR-10).

    It is a tenth from half of the steps on, and a hundredth from three quarters on.
    """
    return 1.0 if 2 * step < steps else 0.1 if 4 * step < 3 * steps else 0.01


def constant(step: int, *, steps: int) -> float:
    """The highest learning rate in every step."""
    return 1.0


SCHEDULES = {"cycle": one_cycle, "steps": by_steps, "constant": constant}
_PRECISIONS = {False: "float32", True: "bfloat16"}


def _drawn(settings: ImageSettings, epoch: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(settings.seed + 1_000_003 * epoch)


def _check_finite(loss: float, network: nn.Module, epoch: int, settings: ImageSettings) -> None:
    # The loss of an epoch does not show the effect of its last step.
    weights = network.state_dict().values()
    if not math.isfinite(loss):
        fault = f"the loss is {loss} in epoch {epoch}"
    elif not all(weight.isfinite().all() for weight in weights):
        fault = f"weights are not finite after epoch {epoch}"
    else:
        return
    raise UsageError(
        f"learning_rate={settings.chosen('learning_rate'):g}: {fault}; must be lower, or use other"
        " images"
    )


def _read(state: Path, same: dict[str, Any], device: torch.device) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = torch.load(state, map_location=device, weights_only=True)
        before = kept["same"]
    except (OSError, EOFError, KeyError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"output: {state}: must be a file that training wrote ({reason(error)}), or not exist"
        ) from error
    if before != same:
        other = [k for k in same if before.get(k) != same[k]]
        differing = "; ".join(f"{k}={same[k]}, there {before.get(k)}" for k in other)
        raise UsageError(
            f"output: {state} belongs to a run with other settings ({differing}); must be another"
            " folder, or have the same settings"
        )
    return kept
