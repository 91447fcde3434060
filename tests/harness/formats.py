"""Small checkpoints with quantised weights, and formats of these tests for transformers."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llm_attack.demo import MODEL_PATH

BLOCK = 8  # rows and columns that share a scale
LARGEST = 448.0  # largest number of float8 with three bits of mantissa


def checkpoint(folder, config, change=lambda name, weight: {name: weight}):
    """The bundled model with this quantisation, and weights of its blocks changed by `change`."""
    shutil.copytree(MODEL_PATH, folder, dirs_exist_ok=True)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | {"quantization_config": config}))
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("proj.weight")]:
        weights |= change(name, weights.pop(name))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def float8(name, weight):
    """The weight in float8 with a scale for each block, as DeepSeek's checkpoints have it."""
    blocks = weight.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # (m, B, n, B)
    scale = blocks.abs().amax((1, 3), keepdim=True) / LARGEST
    values = (blocks / scale).to(torch.float8_e4m3fn)
    packed = {name: values.flatten(2, 3).flatten(0, 1), f"{name}_scale_inv": scale[:, 0, :, 0]}
    return {key: value.contiguous() for key, value in packed.items()}


def value_of(weight, scale):
    """The numbers that `float8` stores."""
    return weight.float() * scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


class Eighths(nn.Module):
    """A linear layer with weights in eighths. It has no gradient."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("weight", (8 * linear.weight.detach()).round().to(torch.int8))

    def plain(self):
        made = nn.Linear(*self.weight.T.shape, bias=False)
        made.weight = nn.Parameter(self.weight / 8, requires_grad=False)
        return made

    def forward(self, x):
        return nn.functional.linear(x.detach(), self.weight / 8)


class Refusing(Eighths):
    """A kernel that refuses many tokens, unless a gradient is needed."""

    def forward(self, x):
        assert torch.is_grad_enabled() or x.shape[:-1].numel() < 16, "too many rows"
        return super().forward(x)


class Config(QuantizationConfigMixin):
    def __init__(self, quant_method="eighths", refuses=False, **_):
        self.quant_method, self.refuses = quant_method, refuses


class Opaque(HfQuantizer):
    """A format without a way back."""

    requires_calibration = False
    is_trainable = True

    def is_serializable(self, *_):
        return False

    def _process_model_before_weight_loading(self, model, **_):
        return model

    def _process_model_after_weight_loading(self, model, **_):
        kind = Refusing if self.quantization_config.refuses else Eighths
        for name, module in list(model.model.layers.named_modules()):
            if isinstance(module, nn.Linear):
                model.model.layers.set_submodule(name, kind(module))
        return model


class Open(Opaque):
    """The same format with a way back."""

    def _dequantize(self, model, dtype=None):
        for name, module in list(model.named_modules()):
            if isinstance(module, Eighths):
                model.set_submodule(name, module.plain().to(dtype or torch.float32))
        return model


def register(patch):
    """Makes the formats `eighths` and `opaque` known to transformers."""
    for name, kind in (("eighths", Open), ("opaque", Opaque)):
        patch.setitem(auto.AUTO_QUANTIZER_MAPPING, name, kind)
        patch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, name, Config)


def of_rows(dtype, largest):
    """Makes a change with a scale for each row, as compressed-tensors stores it."""

    def change(name, weight):
        scale = weight.float().abs().amax(1, keepdim=True) / largest
        values = weight.float() / scale
        whole = values if dtype.is_floating_point else values.round()
        return {name: whole.to(dtype).contiguous(), f"{name}_scale": scale}

    return change


def four_bits(name, weight):
    """The weight in packed groups of `BLOCK`, as compressed-tensors stores it."""
    from compressed_tensors.compressors import pack_to_int32

    groups = weight.float().unflatten(1, (-1, BLOCK))
    scale = groups.abs().amax(2, keepdim=True) / 7
    values = (groups / scale).round().clamp(-8, 7).to(torch.int8).flatten(1)
    parts = {"packed": pack_to_int32(values, 4), "scale": scale[..., 0].contiguous()}
    parts["shape"] = torch.tensor(weight.shape)
    return {f"{name}_{part}": value for part, value in parts.items()}


def compressed(bits, kind, form, group=None):
    """A configuration of compressed-tensors."""
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "group_size": group}
    weights["strategy"] = "channel" if group is None else "group"
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
    return config | {"quantization_status": "compressed", "ignore": ["lm_head"]}
