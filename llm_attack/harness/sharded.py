"""Models with a part in each of several processes: tensor parallelism, and FSDP2 (`fully_shard`).

All processes must run the same forwards, and code of ours must not read weights outside of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llm_attack.base.errors import UsageError
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.network.pairs import read


def by(lm: Any) -> str | None:
    """The setting that gives each process a part of the model; None: this process has it whole."""
    plan = lm._arguments.get("tp_plan")
    if plan is not None:
        return f"tp_plan={plan}"
    return "fully_shard" if _has(lm.model, "FSDPModule") else None


def begin(name: str, model: Any) -> None:
    """Runs a model that FSDP2 has divided once, so its parts know that they belong together.

    A part that ran before the whole model would gather its weights by itself from then on.

    Args:
        name: name of the model for messages.
        model: the model.

    Raises:
        UsageError: FSDP1 has divided it.
    """
    if _has(model, "FullyShardedDataParallel"):
        raise UsageError(
            f"pretrained={name}: must be a whole model, or one that fully_shard (FSDP2) has"
            " divided; FullyShardedDataParallel (FSDP1) is not supported"
        )
    if _has(model, "FSDPModule"):
        with frozen(model), torch.no_grad():
            read(model, torch.zeros(1, 2, dtype=torch.int64, device=model.device))


def _has(model: nn.Module, kind: str) -> bool:
    """Whether a module of the model is of this class of torch, which need not be imported."""
    return any(kind in (c.__name__ for c in type(m).__mro__) for m in model.modules())
