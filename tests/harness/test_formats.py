"""The table of quantised formats in docs/how/model.md, for the libraries that are installed."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from formats import checkpoint, compressed, float8, four_bits, of_rows

from llm_attack.base.errors import UsageError

PAGE = Path(__file__).parents[2] / "docs/how/model.md"
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
KERNEL = "refused: a kernel fails"
SAYS = {
    "refused: the gradient is wrong": r"cannot follow the gradient .*dequantize=True",
    KERNEL: r"bitsandbytes raises AssertionError: .*, or dequantize=True",
    "refused: weights are missing": r"weights that are missing in the checkpoint",
    "cannot be loaded": r"cannot be loaded \(",
}


def has_bfloat16():
    from bitsandbytes.functional import has_avx512bf16

    return has_avx512bf16()


def table():
    """(library, format): (verdict, verdict with `dequantize`)."""
    rows = re.findall(
        r"^\| ([^|]+) \| `?([\w-]+)`?(?: [\d.]+)? \| ([^|]+) \| ([^|]+) \|$",
        PAGE.read_text("utf-8").partition("## Quantised weights")[2].partition("\n## ")[0],
        re.M,
    )
    return {(library, name): (plain, whole) for name, library, plain, whole in rows[1:]}


def test_every_row_is_tried():
    assert table().keys() == CASES.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(transformers.__version__ < "5", reason="the table is of transformers 5")
@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case).replace(" ", "_"))
def test_the_verdict_of_the_table(make, tmp_path, case, dequantize):
    library, _ = case
    try:
        installed = find_spec(PACKAGES[library]) is not None
    except ModuleNotFoundError:
        installed = False
    if not installed:
        pytest.skip(f"{library} is not installed")
    verdict = table()[case][dequantize]
    if verdict == KERNEL and not has_bfloat16():
        pytest.skip("on processors without bfloat16 bitsandbytes has another kernel")
    options = {"dtype": "float32", "dequantize": dequantize, **CASES[case](tmp_path)}
    expected = next((text for start, text in SAYS.items() if verdict.startswith(start)), None)
    if expected is None:
        assert verdict.startswith(("accepted", "works", "dequantised")), verdict
        lm = make(attack="fgsm", **options)
        assert any("were dequantised to float32" in text for text in lm.warnings) == (
            dequantize or verdict.startswith("dequantised")
        )
        return
    with pytest.raises(UsageError, match=expected):
        make(attack="fgsm", **options)
