"""Checks that a device exists."""

from __future__ import annotations

from typing import Any

import torch

from llm_attack.base.errors import invalid


def check_device(device: Any) -> None:
    """Refuses a device that this machine does not have. lm-eval would silently use the CPU.

    Raises:
        UsageError: the message names the devices that exist.
    """
    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there += ["mps", "mps:0"]
    device = str(device)  # torch.device
    kind = device.partition(":")[0]
    # torch knows some devices only if an additional library is installed
    known = getattr(torch, kind, None) if kind in ("hpu", "npu", "xpu") else None
    if device not in there and not (known and known.is_available()):
        raise invalid("device", device, there)
