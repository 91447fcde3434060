"""Whether a network is trained in bfloat16: a rule of the processor and the amount of work."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")  # of processors that multiply bfloat16 directly
_WORTH = 5e12  # operations; smaller trainings stay in float32. About a minute in float32


def mixed_precision(precision: str, network: nn.Module, x: Tensor, images: int) -> bool:
    """Whether to train in bfloat16 where that is safe (autocast).

    With `auto`, GPUs from compute capability 8.0 do so, and processors with AMX or AVX-512 for
    bfloat16. On processors, a training with fewer than 5e12 floating-point operations stays in
    float32, so its result is the same everywhere. Nothing is timed, so the same command on the same
    machine gives the same answer.

    Args:
        precision: `auto`, `float32` or `bfloat16`.
        network: the network, which is not changed.
        x: an image (1, C, H, W) in [0, 1], on the network's device.
        images: number of images that the whole training will see.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if x.device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(x.device)
        return major >= 8
    if x.device.type != "cpu" or not _has_instructions():
        return False
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(network).eval()(x)
    # the backward pass takes twice as many as the forward pass
    operations: int = 3 * counter.get_total_flops() * images
    return operations >= _WORTH


def _has_instructions() -> bool:
    # releases of torch without this function train in float32
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in _INSTRUCTIONS)
