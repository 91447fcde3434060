"""Whether a network trains faster in bfloat16 here: measured, as processors differ."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

_SECONDS = 2.0  # what is measured for
_WORTH = 60.0  # seconds of training in float32 below which nothing is measured
_GAIN = 1.1  # how much faster bfloat16 has to be


def mixed_precision(
    precision: str,
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    images: int,
    clock: Callable[[], float] = time.perf_counter,
) -> bool:
    """Whether to train in bfloat16 where that is safe (autocast).

    `auto` says so on GPUs that are made for it, and on processors where training steps are faster
    by a tenth at least. What takes less than a minute is done in float32 without measuring, so
    that small runs are the same on any machine.

    Args:
        precision: `auto`, `float32` or `bfloat16`.
        network: is left as it is.
        x: some images, (N, C, H, W) in [0, 1], on the network's device.
        labels: (N,).
        images: number of images that the whole training will see.
        clock: seconds.
    """
    device = x.device
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    trial = copy.deepcopy(network).train()
    step = partial(_step, trial, x, labels)
    step(False)  # the first ones prepare kernels
    plain = _timed(step, False, clock)
    if plain * images / len(x) < _WORTH:
        return False
    step(True)
    seconds: dict[bool, list[float]] = {False: [plain], True: [_timed(step, True, clock)]}
    # in turns, so that other work on the machine slows both
    while sum(map(sum, seconds.values())) < _SECONDS:
        for mixed, those in seconds.items():
            those.append(_timed(step, mixed, clock))
    rates = {mixed: len(x) / median(those) for mixed, those in seconds.items()}
    mixed = rates[True] > _GAIN * rates[False]
    log.warning(
        "precision: %.0f images/s in float32, %.0f in bfloat16: trains in %s",
        rates[False],
        rates[True],
        "bfloat16" if mixed else "float32",
    )
    return mixed


def _step(network: nn.Module, x: Tensor, labels: Tensor, mixed: bool) -> None:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=mixed):
        loss = nn.functional.cross_entropy(network(x).float(), labels)
    network.zero_grad()
    loss.backward()


def _timed(step: Callable[[bool], None], mixed: bool, clock: Callable[[], float]) -> float:
    start = clock()
    step(mixed)
    return clock() - start
