"""Small checkpoints with quantised weights, and formats of these tests for transformers.

`CASES` is the only list of the formats. `docs/architectures.md` shows the results of `measured`.
"""

import functools
import json
import re
import shutil
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llm_attack.base.errors import UsageError
from llm_attack.demo import MODEL_PATH
from llm_attack.harness.model import AttackedHFLM

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


PACKAGES = {
    **{"bitsandbytes": "bitsandbytes", "torchao": "torchao", "optimum-quanto": "optimum.quanto"},
    **{"compressed-tensors": "compressed_tensors", "hqq": "hqq", "none": "transformers"},
}


def bits(number, kind="fp4"):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**{f"load_in_{number}bit": True}, bnb_4bit_quant_type=kind)


def torchao(name):
    import torchao.quantization as quantisation

    return transformers.TorchAoConfig(getattr(quantisation, name)())


def given(make_config):
    """The bundled model, quantised while it is loaded."""
    return lambda folder: {"quantization_config": make_config()}


def stored(config, change):
    """A checkpoint with quantised weights."""
    return lambda folder: {"pretrained": checkpoint(folder, config, change)}


BLOCKS = {"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "dynamic"}
CASES = {
    ("bitsandbytes", "8 bits"): given(lambda: bits(8)),
    ("bitsandbytes", "NF4"): given(lambda: bits(4, "nf4")),
    ("bitsandbytes", "FP4"): given(lambda: bits(4)),
    ("torchao", "int8 weights"): given(lambda: torchao("Int8WeightOnlyConfig")),
    ("torchao", "float8 weights"): given(lambda: torchao("Float8WeightOnlyConfig")),
    ("torchao", "int8 weights and activations"): given(
        lambda: torchao("Int8DynamicActivationInt8WeightConfig")
    ),
    ("torchao", "int4 weights"): given(lambda: torchao("Int4WeightOnlyConfig")),
    **{
        ("optimum-quanto", name): given(lambda name=name: transformers.QuantoConfig(weights=name))
        for name in ("int8", "float8", "int4")
    },
    ("compressed-tensors", "float8"): stored(
        compressed(8, "float", "float-quantized"), of_rows(torch.float8_e4m3fn, 448)
    ),
    ("compressed-tensors", "int4, packed"): stored(
        compressed(4, "int", "pack-quantized", 8), four_bits
    ),
    ("compressed-tensors", "int8"): stored(
        compressed(8, "int", "int-quantized"), of_rows(torch.int8, 127)
    ),
    ("hqq", "4 bits"): given(lambda: transformers.HqqConfig(nbits=4, group_size=16)),
    ("none", "float8 in blocks"): stored(BLOCKS, float8),
}
# Verdict -> the message of the refusal.
REFUSED = {
    "refused: the gradient is wrong": r"cannot follow the gradient .*dequantize=True",
    "refused: a kernel fails": r"bitsandbytes raises AssertionError: .*, or dequantize=True",
    "refused: weights are missing": r"weights that are missing in the checkpoint",
    "cannot be loaded": r"cannot be loaded \(",
}


def has_bfloat16():
    from bitsandbytes.functional import has_avx512bf16

    return has_avx512bf16()


def verdict(case, dequantize):
    """What `attacked-hf` does with a format under FGSM."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"pretrained": "demo", "device": "cpu", "dtype": "float32"}
        options |= CASES[case](Path(folder))
        try:
            lm = AttackedHFLM(attack="fgsm", dequantize=dequantize, **options)
        except UsageError as error:
            return next(name for name, says in REFUSED.items() if re.search(says, str(error)))
    whole = any("were dequantised to float32" in text for text in lm.warnings)
    if dequantize:
        return "works" if whole else "stays quantised"
    if whole:
        return "dequantised by transformers"
    slopes = re.findall(r"[-+.e\d]+(?=,)", lm.gradient().figure)  # the first of each is along it
    measured, claimed = float(slopes[0]), float(slopes[2])
    error = abs(measured - claimed) / max(abs(measured), abs(claimed))
    more = f"; the slope along the gradient differs by {100 * error:.0f} %" if error > 0.05 else ""
    return f"accepted{more}"


@functools.cache
def measured(case):
    """A row of the page; None if this machine cannot measure it."""
    library, name = case
    try:
        installed = find_spec(PACKAGES[library]) is not None
    except ModuleNotFoundError:
        installed = False
    if not installed or transformers.__version__ < "5":
        return None
    if name in ("NF4", "FP4") and not has_bfloat16():  # then bitsandbytes has another kernel
        return None
    shown = library if library == "none" else f"{library} {metadata.version(library)}"
    return [name, shown, verdict(case, False), verdict(case, True)]
