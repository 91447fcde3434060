"""Arguments of `hf` mean the same to `attacked-hf`."""

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from llm_attack.demo import MODEL_PATH
from llm_attack.harness.model import AttackedHFLM


def answers(lm, task):
    return [ll for ll, _ in lm.loglikelihood(task.instances, disable_tqdm=True)]


def stock(**arguments):
    return HFLM(**{"pretrained": str(MODEL_PATH), "device": "cpu", "batch_size": 8, **arguments})


@pytest.mark.parametrize(
    ("arguments", "tolerance"),
    [
        # a logit of 16 has a last place of 0.125 in bfloat16 and of 0.016 in float16: a few of them
        ({"dtype": "bfloat16"}, 0.5),
        ({"dtype": "float16"}, 0.06),
        ({"mixed_precision_dtype": "bfloat16"}, 0.5),
        ({"attn_implementation": "eager"}, 1e-4),
        ({"add_bos_token": True}, 1e-4),
        ({"prefix_token_id": 2}, 1e-4),
        ({"truncation": True, "max_length": 8}, 1e-4),
        ({"logits_cache": False}, 1e-4),
        ({"revision": "main", "trust_remote_code": False, "use_fast_tokenizer": True}, 1e-4),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
@pytest.mark.sampled(3)
def test_as_in_stock(make, build, arguments, tolerance):
    task = build("demo_openbookqa", 5)
    expected = answers(stock(**arguments, softmax_dtype="float32"), task)
    assert answers(make(attack="none", **arguments), task) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    "arguments",
    [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"mixed_precision_dtype": "bfloat16"}],
    ids=str,
)
@pytest.mark.sampled(3)
def test_attack_of_low_precision_does_what_that_of_float32_does(make, build, arguments):
    task = build("demo_openbookqa", 5)
    clean, expected = (answers(make(attack=attack), task) for attack in ("none", "fgsm"))
    lm = make(attack="fgsm", **arguments)
    found = answers(lm, task)
    damage = sum(clean) - sum(expected)
    assert sum(clean) - sum(found) == pytest.approx(damage, rel=0.05)
    assert lm.attack_info()["noise_rms"] == pytest.approx(0.01, rel=2e-3)


def test_peft_adapter(make, build, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    task = build("demo_openbookqa", 5)
    expected = answers(stock(peft=str(tmp_path)), task)
    clean = answers(make(attack="none", peft=str(tmp_path)), task)
    assert clean == pytest.approx(expected, abs=1e-4)
    assert clean != answers(make(attack="none"), task)
    lm = make(attack="fgsm", loss="choice", peft=str(tmp_path))
    assert answers(lm, task) != clean
    assert lm.attack_info()["zero_gradient_fraction"] == 0


def test_loaded_model(make, build):
    task = build("demo_piqa", 4)
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH).train()
    tokenizer = make().tokenizer
    tokenizer.pad_token = None
    lm = make(pretrained=model, tokenizer=tokenizer, attack="fgsm")
    assert answers(lm, task) == answers(make(attack="fgsm"), task)
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert tokenizer.pad_token is None and lm.tokenizer.pad_token is not None


@pytest.mark.parametrize("size", ["auto", "auto:2", "3"])
@pytest.mark.sampled(3)
def test_batch_size(exact, build, size):
    task = build("demo_piqa", 6)
    expected = answers(exact(attack="fgsm"), task)
    found = answers(exact(attack="fgsm", batch_size=size), task)
    assert found == pytest.approx(expected, abs=1e-6)


def test_strings_of_arguments():
    """lm-eval reads `none` in them as Python's None."""
    lm = AttackedHFLM.create_from_arg_string("pretrained=demo,attack=none,epsilon=0.7rms")
    assert lm.attack_info()["condition"] == "none"
    lm = AttackedHFLM.create_from_arg_string("pretrained=demo,attack=fgsm,epsilon=0.7rms")
    assert lm.attack_info()["condition"] == "fgsm@0.7rms"
