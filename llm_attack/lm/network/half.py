"""A copy of a model in a dtype of fewer bits, for gradients."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llm_attack.base.errors import UsageError
from llm_attack.lm.network.blocks import known_blocks, prepare
from llm_attack.lm.network.hook import resolve
from llm_attack.lm.settings import EngineSettings


def check(model: PreTrainedModel, name: str, autocast: torch.dtype | None, parts: Any) -> None:
    """Refuses a `gradient_dtype` that does not fit a model.

    Args:
        model: the model.
        name: name of the dtype.
        autocast: dtype of mixed precision, or None.
        parts: the setting that gives each process a part of the model; None: there is none.

    Raises:
        UsageError: its weights are quantised, split, used in mixed precision, or have no more bits
            than the dtype.
    """
    dtype: torch.dtype = getattr(torch, name)
    wrong = ""
    if getattr(model.config, "quantization_config", None) is not None:
        wrong = "a model without quantisation, whose weights can be converted"
    elif parts is not None:
        wrong = f"left out with {parts}, because no process has the whole model"
    elif autocast is not None:
        wrong = f"left out with mixed precision, which computes in {autocast}"
    elif model.dtype.itemsize <= dtype.itemsize:
        wrong = f"of fewer bits than the model's dtype, which is {model.dtype}"
    elif any(hasattr(module, "_hf_hook") for module in model.modules()):
        wrong = "left out if the model is split over devices, or partly not on any device"
    if wrong:
        raise UsageError(f"gradient_dtype={name}: must be {wrong}")


def copied(
    model: PreTrainedModel, name: str, settings: EngineSettings, hookpoint: str | None
) -> PreTrainedModel:
    """Makes the copy and prepares its blocks. Buffers, such as frequencies, keep their dtype.

    Args:
        model: the model to copy.
        name: name of the dtype.
        settings: as for `prepare`.
        hookpoint: as for `resolve`.

    Raises:
        UsageError: another library has replaced the `forward` of a module.
    """
    own = known_blocks(model) if settings.gradient_checkpointing or settings.compile else []
    changed = [module for module in model.modules() if "forward" in vars(module)]
    strange = next((type(m).__name__ for m in changed if m not in own), None)
    if strange is not None:
        raise UsageError(
            f"gradient_dtype={name}: must be left out, because another library has replaced the"
            f" forward method of modules ({strange}), and a copy would lack this change"
        )
    dtype = getattr(torch, name)
    memo: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach().to(dtype), requires_grad=False)
        for weight in model.parameters()
        if weight.is_floating_point()
    }
    copied_model: PreTrainedModel = copy.deepcopy(model, memo)
    for module in copied_model.modules():
        vars(module).pop("forward", None)
    copied_model.config.dtype = dtype
    prepare(copied_model, settings, resolve(copied_model, hookpoint))
    copied_model.eval()
    return copied_model
