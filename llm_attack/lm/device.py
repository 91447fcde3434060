"""Devices that are there."""

from __future__ import annotations

from typing import Any

import torch

from llm_attack.errors import invalid


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
    others = ("hpu", "npu", "xpu")  # which torch knows only with libraries of their own
    if device not in there and device.partition(":")[0] not in others:
        raise invalid("device", device, there)
