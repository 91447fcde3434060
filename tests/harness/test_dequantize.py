"""Full-precision weights in place of quantised ones, and kernels that refuse to compute."""

import json
import re

import pytest
import torch
import transformers
from click.testing import CliRunner
from formats import checkpoint, float8, register, value_of
from safetensors.torch import load_file

from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.demo import MODEL_PATH

RUN = ["run", "--tasks", "demo_piqa", "--limit", "2", "--device", "cpu", "--progress", "quiet"]
RUN += ["--attacks", "none,fgsm", "--epsilons", "0.1rms"]


@pytest.fixture(autouse=True)
def formats(monkeypatch):
    register(monkeypatch)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The checkpoint of a format of `formats`, by its name."""
    root = tmp_path_factory.mktemp("formats")
    kinds = {
        "eighths": {"quant_method": "eighths"},
        "opaque": {"quant_method": "opaque"},
        "refusing": {"quant_method": "eighths", "refuses": True},
        "closed": {"quant_method": "opaque", "refuses": True},
    }
    return {name: checkpoint(root / name, config) for name, config in kinds.items()}


@pytest.mark.skipif(
    transformers.__version__ < "5", reason="transformers 4 needs a GPU for float8 checkpoints"
)
def test_float8_weights(make, tmp_path):
    """They are the stored numbers times their scales, and the results say so."""
    config = {"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "dynamic"}
    folder = checkpoint(tmp_path, config, float8)
    stored, original = (load_file(f"{of}/model.safetensors") for of in (folder, MODEL_PATH))
    lm = make(pretrained=folder, attack="fgsm", dequantize=True)
    assert lm.warnings == ["quantised weights (fp8) were dequantised to float32"]
    names = [name for name in stored if f"{name}_scale_inv" in stored]
    weights = lm.model.state_dict()
    for name in names:
        torch.testing.assert_close(
            weights[name], value_of(stored[name], stored[f"{name}_scale_inv"])
        )
        assert 0.01 < (weights[name] - original[name]).norm() / original[name].float().norm() < 0.04
    assert len(names) == 28
    assert make(pretrained=folder, attack="fgsm").warnings == lm.warnings  # on a CPU by itself


def test_the_library_of_the_format(make, folders):
    """Its own method is used, and the weights keep their rounding errors."""
    lm = make(pretrained=folders["eighths"], attack="fgsm", dequantize=True)
    assert lm.warnings == ["quantised weights (eighths) were dequantised to float32"]
    original = load_file(MODEL_PATH / "model.safetensors")
    weights = lm.model.state_dict()
    for name in [name for name in original if name.endswith("proj.weight")]:
        torch.testing.assert_close(weights[name], (8 * original[name].float()).round() / 8)
    assert not hasattr(lm.model.config, "quantization_config")


@pytest.mark.parametrize(
    "name, way",
    [("eighths", "; dequantize=True gives these weights one"), ("opaque", ". The same weights")],
)
def test_the_way_out_of_a_wrong_gradient(make, folders, name, way):
    """It is named if it works."""
    with pytest.raises(UsageError, match=f"or a model whose gradient is right{re.escape(way)}"):
        make(pretrained=folders[name], attack="fgsm")


@pytest.mark.parametrize(
    "name, way, attack", [("refusing", ", or dequantize=True", "fgsm"), ("closed", "", "random")]
)
def test_a_kernel_that_refuses(make, folders, name, way, attack):
    """The line names who raised the error."""
    method = "eighths" if name == "refusing" else "opaque"
    line = (
        f"pretrained={folders[name]}: its quantised weights ({method}) cannot be computed with:"
        f" formats raises AssertionError: too many rows; must be weights that run on cpu{way}"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(line)}$"):
        make(pretrained=folders[name], attack=attack)


def test_a_kernel_that_refuses_later(make, folders, monkeypatch):
    """An error in the check of the gradient becomes the same line."""
    monkeypatch.setattr("llm_attack.harness.quantised._TRIALS", ())
    with pytest.raises(UsageError, match="formats raises AssertionError: too many rows"):
        make(pretrained=folders["refusing"], attack="fgsm")


def test_refused(make, folders):
    with pytest.raises(UsageError, match=r"transformers cannot dequantise the format opaque$"):
        make(pretrained=folders["opaque"], attack="none", dequantize=True)
    with pytest.raises(UsageError, match="dequantize=True: must be left out if pretrained is a lo"):
        lm = make(attack="none")
        make(pretrained=lm.model, tokenizer=lm.tokenizer, dequantize=True)


@pytest.mark.slow
def test_a_run_says_it(folders, tmp_path):
    """In the record, the table and the report; and a run without it is another run."""
    out = tmp_path / "out"
    run = [*RUN, "--model", folders["eighths"]]
    done = CliRunner().invoke(main, [*run, "--dequantize", "--dry_run"])
    assert done.exit_code == 0, done.output
    assert "dequantised from eighths" in re.sub(r"[\s│]+", " ", done.output)
    done = CliRunner().invoke(main, [*run, "--dequantize", "-o", str(out)])
    assert done.exit_code == 0, done.output
    record, sentence = (
        json.loads((out / "run.json").read_text()),
        "quantised weights (eighths) were",
    )
    assert record["settings"]["dequantize"] is record["fingerprint"]["dequantize"] is True
    assert sentence in record["warnings"][0]
    for name in ("table.md", "report.html"):
        assert sentence in (out / name).read_text(), name
    done = CliRunner().invoke(main, [*run[:-2], "--model", "demo", "-o", str(out)])
    assert done.exit_code == 2 and "dequantize: true there, false here" in done.stderr, done.output
