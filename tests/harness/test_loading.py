"""Messages about a model that cannot be loaded state only what was checked."""

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from llm_attack import Plan, evaluate
from llm_attack.base.errors import UsageError
from llm_attack.demo import MODEL_PATH
from llm_attack.harness import loading


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": None}, "batch_size=None: must be an integer, 1 or more, or auto"),
        ({"batch_size": 0}, "batch_size=0: must be an integer, 1 or more, or auto"),
        ({"batch_size": "auto:x"}, "batch_size='auto:x': must be an integer"),
        ({"batch_size": "1_0"}, "batch_size='1_0': must be an integer"),
        ({"load_in_4bit": "yes"}, "load_in_4bit=yes: must be one of True, False"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit=True: must not be given with"),
        ({"bnb_4bit_quant_type": "nf4"}, "bnb_4bit_quant_type=nf4: needs load_in_4bit"),
        ({"peft": "a", "delta": "b"}, "delta=b: must not be given with peft=a"),
        ({"peft": 5}, "peft=5: must be a text"),
        ({"enable_thinking": True}, "enable_thinking=True: needs think_end_token"),
        ({"peft": "nowhere"}, r"peft=nowhere: cannot be loaded \(\w*Error: "),
        ({"hidden_size": 7}, r"hidden_size=7: cannot be loaded \(\w*Error: "),
        ({"tokenizer": 5}, "tokenizer=5: must be a name, a folder or a tokenizer"),
        ({"pretrained": 5}, "pretrained=5: must be a model id, a path or a model"),
        ({"pretrained": torch.nn.Linear(1, 1)}, "pretrained=Linear.*: must be a model id, a path"),
        ({"chat_template_args": "x"}, "chat_template_args='x': must be a dictionary"),
    ],
    ids=str,
)
def test_the_argument_is_named_and_no_hub(make, arguments, message):
    """None of these has to do with where the model is."""
    with pytest.raises(UsageError, match=message) as caught:
        make(**arguments)
    assert "a hub" not in str(caught.value)


@pytest.mark.parametrize("package", ["auto_gptq", "gptqmodel", "bitsandbytes"])
def test_packages_that_are_there_are_not_said_to_be_missing(monkeypatch, package):
    there = [package]
    monkeypatch.setattr(loading, "find_spec", lambda name: name in there or None)
    argument = {"auto_gptq": "autogptq", "gptqmodel": "gptqmodel"}.get(package, "load_in_4bit")
    loading.check_arguments("demo", {argument: True})
    there.clear()
    with pytest.raises(UsageError, match=f"{argument}=True: needs the package {package}"):
        loading.check_arguments("demo", {argument: True})
        loading.quantization({argument: True})


def test_bits_become_a_quantization_config(monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: True)
    given = {"load_in_8bit": True, "llm_int8_threshold": 3.0, "dtype": "auto"}
    expected = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.0)
    assert loading.quantization(given).to_dict() == expected.to_dict()
    assert given == {"dtype": "auto"}
    assert loading.quantization({"load_in_4bit": False}) is None


def test_a_quantization_config_is_passed_on(make, monkeypatch):
    """Stock `hf` passes its own besides, and Python refuses the same argument twice."""
    seen = {}

    def stop(self, pretrained, **arguments):
        seen.update(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(HFLM, "_create_model", stop)
    config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(KeyboardInterrupt):
        make(quantization_config=config)
    assert seen["quantization_config"] is config


def test_eight_bits(make):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layers = {type(layer).__name__ for layer in make(load_in_8bit=True).model.modules()}
    assert "Linear8bitLt" in layers


@pytest.fixture(scope="module")
def loaded():
    return {
        "pretrained": AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32),
        "tokenizer": AutoTokenizer.from_pretrained(MODEL_PATH),
    }


@pytest.mark.parametrize(
    "argument", [{"dtype": "float16"}, {"load_in_8bit": True}, {"peft": "x"}, {"subfolder": "x"}]
)
def test_what_a_loaded_model_would_pass_over(make, loaded, argument):
    (name,) = argument
    with pytest.raises(UsageError, match=f"{name}=.*must be left out if pretrained is a loaded"):
        make(**loaded, **argument)


def test_the_dtype_that_a_loaded_model_has(make, loaded):
    assert make(**loaded, dtype="float32").model.dtype == torch.float32
    assert make(**loaded, dtype=torch.float32).model.dtype == torch.float32


def test_paths_and_devices_as_objects(make):
    lm = make(pretrained=MODEL_PATH, device=torch.device("cpu"))
    assert lm.device == torch.device("cpu")


def test_a_model_whose_forward_fails(make, loaded, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("Error(s):\n  of its own\n and more")

    monkeypatch.setattr(loaded["pretrained"].model, "forward", broken)
    with pytest.raises(
        UsageError, match=r"the first forward pass fails \(RuntimeError: of its own\)$"
    ):
        make(**loaded, hookpoint="model.layers.0")


def test_settings_that_no_attack_reads(make):
    """A warning of those that most attacks read; a plan refuses the others."""
    sentence = "steps=5: has no effect, because no attack of this run uses it"
    assert make(attack="fgsm", steps=5).all_warnings() == [sentence]
    assert make(attack="bim", steps=5).all_warnings() == []
    plan = Plan("demo", "demo_piqa", attacks=["none", "fgsm"], steps=5, limit=2, device="cpu")
    assert evaluate(plan, progress="quiet").run["warnings"] == [sentence]
    with pytest.raises(UsageError, match=r"queries=5: no attack of this run uses it.* blocks"):
        Plan("demo", "demo_piqa", attacks=["none", "fgsm"], queries=5)
    assert Plan("demo", "demo_piqa", attacks=["none", "blocks"], queries=5).queries == 5
