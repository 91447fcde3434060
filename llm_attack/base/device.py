"""Devices that are there."""

from __future__ import annotations

from typing import Any

import torch

from llm_attack.base.errors import invalid


def check_device(device: Any) -> None:
    """Refuses a device that is not there, in whose place lm-eval would take the CPU without a word.

    Raises:
        UsageError: naming those that are there.
    """
    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there += ["mps", "mps:0"]
    device = str(device)  # torch.device
    kind = device.partition(":")[0]
    # torch knows some of them only with libraries of their own
    known = getattr(torch, kind, None) if kind in ("hpu", "npu", "xpu") else None
    if device not in there and not (known and known.is_available()):
        raise invalid("device", device, there)
