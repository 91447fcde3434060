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
from llm_attack.vision.measure import Row
from llm_attack.vision.precision import mixed_precision
from llm_attack.vision.settings import ImageSettings


class Epoch(NamedTuple):
    """A trained epoch: its number from 1, its mean loss, and the precision."""

    number: int
    loss: float
    precision: str


def train(
    network: nn.Module,
    images: Images,
    settings: ImageSettings,
    rows: list[Row],
    *,
    state: Path | None = None,
    label: str = "",
) -> Iterator[Epoch]:
    """Trains `network` in place: SGD with Nesterov momentum, one cycle of the learning rate.

    The order of the images and their augmentation are drawn from the seed and the epoch's number,
    so that a resumed run is the run that was not interrupted. Which images are mirrored alternates:
    each is seen both ways in any two epochs (Jordan 2024, arXiv 2404.00498).

    Args:
        network: on the device of `images`.
        images: to learn from.
        settings: `epochs`, `batch_size`, `learning_rate`, `momentum`, `weight_decay`,
            `label_smoothing`, `crop`, `flip`, `precision`, `seed`, and those of `objective`.
        rows: the caller's of all epochs, to which it adds while an epoch is yielded: kept in
            `state`, and taken from there by a run that is resumed.
        state: file that keeps weights, optimiser and rows after every epoch; if it exists, training
            goes on from there.
        label: what the progress bar says.

    Yields:
        Each epoch after it, `precision` being `float32` or `bfloat16`.

    Raises:
        UsageError: `state` cannot be read, or was written under other settings; the loss of an
            epoch, or a weight after it, is not finite.
    """
    device = images.pixels.device
    batch = min(settings.batch_size, len(images))
    per_epoch = len(images) // batch
    steps = settings.epochs * per_epoch
    optimiser = torch.optim.SGD(
        network.parameters(),
        settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,  # torch has none without momentum
        weight_decay=settings.weight_decay,
    )
    cycle = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(one_cycle, steps=steps))
    same = {**asdict(settings), "label": label}
    same.pop("device", None)  # may differ from that of the run that is resumed
    channels, size = images.pixels.shape[1:3]
    crop = size // 8 if settings.crop is None else settings.crop
    flip = channels == 3 if settings.flip is None else settings.flip
    mirrored = torch.randint(
        2, (len(images),), generator=_drawn(settings, 0, device), device=device
    )
    done = 0
    if state is not None and state.exists():
        kept = _read(state, same, device)
        done, rows[:], mixed = kept["epoch"], kept["rows"], kept["mixed"]
        network.load_state_dict(kept["network"])
        optimiser.load_state_dict(kept["optimiser"])
        cycle.load_state_dict(kept["cycle"])
    else:
        mixed = mixed_precision(settings.precision, network, images[:1].scaled(), steps * batch)
    seen: Any = {"total": steps * batch, "initial": done * per_epoch * batch, "unit": " images"}
    with tqdm(**seen, unit_scale=True, desc=label, disable=None) as bar:
        for epoch in range(done + 1, settings.epochs + 1):
            network.train()
            draws = _drawn(settings, epoch, device)
            order = torch.randperm(len(images), generator=draws, device=device)
            total = torch.zeros((), device=device)
            for rows_now in order[: per_epoch * batch].split(batch):
                now = images[rows_now]
                turned = (mirrored[rows_now] + epoch) % 2 == 1 if flip else None
                x = Images(augment(now.pixels, draws, crop=crop, flip=turned), now.labels).scaled()
                point = adversarial_examples(network, x, now.labels, settings, draws)
                with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                    loss = objective(network, x, point, now.labels, settings)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                cycle.step()
                total += loss.detach()
                bar.update(batch)
            mean = total.item() / per_epoch
            _check_finite(mean, network, epoch, settings)
            yield Epoch(epoch, mean, "bfloat16" if mixed else "float32")
            if state is not None:
                kept = {
                    "same": same,
                    "epoch": epoch,
                    "rows": rows,
                    "mixed": mixed,
                    "network": network.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "cycle": cycle.state_dict(),
                }
                with whole_or_not(state) as draft:
                    torch.save(kept, draft)


def one_cycle(step: int, *, steps: int) -> float:
    """Share of the highest learning rate: up in the first quarter of the steps, then down to 0."""
    share = (step + 1) / (steps + 1)
    return min(4 * share, (1 - share) * 4 / 3)


def _drawn(settings: ImageSettings, epoch: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(settings.seed + 1_000_003 * epoch)


def _check_finite(loss: float, network: nn.Module, epoch: int, settings: ImageSettings) -> None:
    # The loss of an epoch says nothing of what its last step did.
    weights = network.state_dict().values()
    if not math.isfinite(loss):
        fault = f"the loss is {loss} in epoch {epoch}"
    elif not all(weight.isfinite().all() for weight in weights):
        fault = f"weights are not finite after epoch {epoch}"
    else:
        return
    raise UsageError(
        f"learning_rate={settings.learning_rate:g}: {fault}; must be lower, or use other images"
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
