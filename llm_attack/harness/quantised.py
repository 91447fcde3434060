"""Quantised weights: their format, a trial of their kernels, and full precision in their place."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.base import HfQuantizer

from llm_attack.base.errors import UsageError
from llm_attack.base.failures import one_line
from llm_attack.lm.network.pairs import read

_TRIALS = ((1, 2), (16, 8))  # rows and tokens; kernels differ for few and for many tokens


def config_of(known: Any) -> Any:
    """The quantisation in the configuration of a model or checkpoint; None if there is none."""
    parts = (known, getattr(known, "get_text_config", lambda: None)())
    given = (getattr(part, "quantization_config", None) for part in parts)
    config = next((config for config in given if config is not None), None)
    return AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else config


def name_of_format(config: Any) -> str:
    """The name of a format, such as `bitsandbytes` or `fp8`."""
    method = config.quant_method
    return str(getattr(method, "value", method))


def asked_for(known: Any, given: Any, gguf_file: str | None) -> Any:
    """The argument `quantization_config` with which transformers loads full precision.

    Some formats are dequantised while they are loaded. `dequantised` does it for the others.

    Args:
        known: the configuration of the checkpoint.
        given: the argument `quantization_config` so far; None if there is none.
        gguf_file: the GGUF file; None if there is none.

    Raises:
        UsageError: nothing is quantised.
    """
    if gguf_file is not None:
        return _of_gguf(given)
    config = config_of(known) or given
    if config is None:
        raise UsageError("dequantize=True: must be left out, because the weights are not quantised")
    if hasattr(config, "dequantize"):
        given = copy.deepcopy(config)
        given.dequantize = True
    return given


def _of_gguf(given: Any) -> Any:
    try:
        from transformers import GgufConfig
    except ImportError:  # older releases of transformers always dequantise these files
        return given
    return GgufConfig(dequantize=True)


def dequantised(model: Any) -> Any:
    """The model with full-precision weights in place of quantised ones.

    Raises:
        UsageError: the library of its format cannot compute them.
    """
    config = config_of(model.config)
    if config is None:  # transformers has done it
        return model
    if not can_be(model):
        raise UsageError(
            "dequantize=True: must be left out, because transformers cannot dequantise the format"
            f" {name_of_format(config)}"
        )
    quantizer, dtype = _quantizer(model), model.dtype
    if type(quantizer)._dequantize is not HfQuantizer._dequantize:
        return model.dequantize()
    for name, module in list(_packed(model)):
        weight = nn.Parameter(module.weight.dequantize().detach().to(dtype), requires_grad=False)
        if isinstance(module, nn.Embedding):
            module.weight = weight
            continue
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight, plain.bias = weight, module.bias
        model.set_submodule(name, plain.train(module.training))
    quantizer.remove_quantization_config(model)
    return model


def unify(model: nn.Module) -> None:
    """Gives dequantised weights and all others the dtype of the model's configuration.

    transformers leaves those others in the dtype of the checkpoint. Weights in float32 stay so.
    """
    config: Any = model.config
    wanted = config.dtype
    for weight in model.parameters():
        if weight.is_floating_point() and weight.dtype not in (wanted, torch.float32):
            weight.data = weight.data.to(wanted)


def can_be(model: Any) -> bool:
    """Whether the library of a loaded model's format computes full-precision weights."""
    config, quantizer = config_of(model.config), _quantizer(model)
    if config is None or quantizer is None:
        return False
    if hasattr(config, "dequantize") and quantizer.pre_quantized:
        return True
    return type(quantizer)._dequantize is not HfQuantizer._dequantize or any(_packed(model))


def _quantizer(model: Any) -> Any:
    return getattr(model, "hf_quantizer", None)


def _packed(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules with weights of a special type that can dequantise itself."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        of_weight = isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize
        if of_weight and isinstance(module, (nn.Linear, nn.Embedding)):
            yield name, module


def replaced_format(known: Any, given: Any, model: Any) -> str:
    """The format whose weights were replaced by full-precision weights; empty if there is none.

    transformers itself dequantises some formats on machines without a kernel for them.

    Args:
        known: the configuration of the checkpoint.
        given: the argument `quantization_config`; None if there is none.
        model: the loaded model.
    """
    config = config_of(known) or given
    if config is None or config_of(model.config) is not None:
        return ""
    return name_of_format(config)


def check_kernels(name: str, model: Any, way_out: bool) -> None:
    """Tries forwards of a quantised model, because its kernels may refuse a machine or a width.

    Args:
        name: name of the model.
        model: the loaded model.
        way_out: whether `dequantize=True` is allowed.

    Raises:
        UsageError: a forward fails. The message names the library that raised the error.
    """
    if config_of(model.config) is None:
        return
    for rows, tokens in _TRIALS:
        try:
            with torch.no_grad():
                read(model, torch.zeros(rows, tokens, dtype=torch.int64, device=model.device))
        except Exception as error:
            check_error(name, model, error, way_out)
            raise


def check_error(name: str, model: Any, error: Exception, way_out: bool) -> None:
    """Turns an error in a trial of a quantised model into one line; see `check_kernels`."""
    config = config_of(model.config)
    if config is None or isinstance(error, UsageError) or should_reduce_batch_size(error):
        return
    hint = ", or dequantize=True" if way_out and can_be(model) else ""
    raise UsageError(
        f"pretrained={name}: its quantised weights ({name_of_format(config)}) cannot be computed"
        f" with: {raiser(error)} raises {one_line(error)}; must be weights that run on"
        f" {model.device.type}{hint}"
    ) from error


def raiser(error: BaseException) -> str:
    """The library in which an error was raised; torch only if no other one called it."""
    frames = traceback.walk_tb(error.__traceback__)
    packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in frames]
    others = [package for package in packages if package != "torch"]
    return (others or packages or ["torch"])[-1]
