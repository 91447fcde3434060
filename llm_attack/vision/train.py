"""Training of an image classifier, with a measurement after every epoch, that can be resumed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from llm_attack.errors import UsageError
from llm_attack.vision.data import Images, augment
from llm_attack.vision.measure import Row
from llm_attack.vision.settings import Settings


def train(
    network: nn.Module,
    images: Images,
    settings: Settings,
    after_epoch: Callable[[int, float], list[Row]],
    *,
    flip: bool = False,
    crop: int = 0,
    state: Path | None = None,
    resume: bool = False,
    label: str = "",
) -> list[Row]:
    """Trains `network` in place: SGD with Nesterov momentum, one cycle of the learning rate.

    The order of the images and their augmentation are drawn from the seed and the epoch's number,
    so that a resumed run is the run that was not interrupted.

    Args:
        network: on the device of `images`.
        images: to learn from.
        settings: `epochs`, `batch_size`, `learning_rate`, `weight_decay`, `precision`, `seed`.
        after_epoch: called with the epoch's number, from 1, and its mean loss; gives what to keep.
        flip: mirrors half of the images.
        crop: pixels by which images are shifted at most.
        state: file that keeps weights, optimiser and rows after every epoch.
        resume: goes on from `state`, if it exists.
        label: what the progress bar says.

    Returns:
        The rows of all epochs.

    Raises:
        UsageError: `state` cannot be read, or was written under other settings.
    """
    device = images.pixels.device
    batch = min(settings.batch_size, len(images))
    per_epoch = len(images) // batch
    steps = settings.epochs * per_epoch
    optimiser = torch.optim.SGD(
        network.parameters(),
        settings.learning_rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=settings.weight_decay,
    )
    cycle = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(one_cycle, steps=steps))
    mixed = mixed_precision(settings.precision, device)
    same = {**asdict(settings), "label": label}
    for where in ("resume", "device"):  # may differ from the run that is resumed
        same.pop(where, None)
    done, rows = 0, []
    if resume and state is not None and state.exists():
        kept = _read(state, same, device)
        done, rows = kept["epoch"], kept["rows"]
        network.load_state_dict(kept["network"])
        optimiser.load_state_dict(kept["optimiser"])
        cycle.load_state_dict(kept["cycle"])
    with tqdm(total=steps, initial=done * per_epoch, desc=label, disable=None) as bar:
        for epoch in range(done + 1, settings.epochs + 1):
            network.train()
            draws = torch.Generator(device).manual_seed(settings.seed + 1_000_003 * epoch)
            order = torch.randperm(len(images), generator=draws, device=device)
            total = torch.zeros((), device=device)
            for rows_now in order[: per_epoch * batch].split(batch):
                now = images[rows_now]
                x = Images(augment(now.pixels, draws, crop=crop, flip=flip), now.labels).scaled()
                with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                    loss = nn.functional.cross_entropy(network(x).float(), now.labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                cycle.step()
                total += loss.detach()
                bar.update()
            found = after_epoch(epoch, total.item() / per_epoch)
            rows += [{"epoch": epoch, **row} for row in found]
            if state is not None:
                kept = {
                    "same": same,
                    "epoch": epoch,
                    "rows": rows,
                    "network": network.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "cycle": cycle.state_dict(),
                }
                _write(state, kept)
    return rows


def one_cycle(step: int, *, steps: int) -> float:
    """Share of the highest learning rate: up in the first quarter of the steps, then down to 0."""
    share = (step + 1) / (steps + 1)
    return min(4 * share, (1 - share) * 4 / 3)


def mixed_precision(precision: str, device: torch.device) -> bool:
    """Whether to train in bfloat16 where that is safe: `auto` does on GPUs that are made for it."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bfloat16"


def _write(state: Path, kept: dict[str, Any]) -> None:
    """Writes the file whole or not at all."""
    state.parent.mkdir(parents=True, exist_ok=True)
    draft = state.with_name(f".{state.name}.{os.getpid()}")
    try:
        torch.save(kept, draft)
        draft.replace(state)
    finally:
        draft.unlink(missing_ok=True)


def _read(state: Path, same: dict[str, Any], device: torch.device) -> dict[str, Any]:
    try:
        kept = torch.load(state, map_location=device, weights_only=True)
        before = kept["same"]
    except (OSError, EOFError, KeyError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"resume: {state}: must be a file that training wrote ({reason})"
        ) from error
    if before != same:
        other = [k for k in same if before.get(k) != same[k]]
        differing = "; ".join(f"{k}={same[k]}, there {before.get(k)}" for k in other)
        raise UsageError(f"resume: {state} is of other settings: {differing}")
    return kept
