"""The modes of a model and of torch do not change the answers, and are restored afterwards."""

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llm_attack import Plan, evaluate
from llm_attack.base.errors import UsageError
from llm_attack.demo import MODEL_PATH
from llm_attack.lm.network.hook import frozen

DROPOUT = {"attention_dropout": 0.5}


def generation(build):
    (request, *_) = build("demo_piqa", 1).instances
    wanted = (request.args[0], {"until": ["\n"], "max_gen_toks": 4})
    return [type(request)("generate_until", {}, wanted, 0)]


def rolling(build):
    (request, *_) = build("demo_piqa", 1).instances
    return [type(request)("loglikelihood_rolling", {}, (request.args[0],), 0)]


ASKED = {
    "loglikelihood": lambda build: build("demo_piqa", 4).instances,
    "loglikelihood_rolling": rolling,
    "generate_until": generation,
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("attack", ["none", "fgsm"])
@pytest.mark.sampled(3)
def test_in_training_mode_the_answers_are_those_of_evaluation_mode(make, build, attack, asked):
    """Dropout would draw them at random."""
    requests = ASKED[asked](build)
    expected = getattr(make(attack=attack, **DROPOUT), asked)(requests, disable_tqdm=True)
    lm = make(attack=attack, **DROPOUT)
    lm.model.train()
    lm.model.lm_head.eval()
    modes = [module.training for module in lm.model.modules()]
    for _ in range(2):
        assert getattr(lm, asked)(requests, disable_tqdm=True) == expected
    lm.use(lm.settings)
    assert [module.training for module in lm.model.modules()] == modes
    assert True in modes and False in modes


def test_the_mode_is_restored_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).eval())
    with pytest.raises(ArithmeticError), frozen(model):
        assert not any(module.training for module in model.modules())
        raise ArithmeticError
    assert [module.training for module in model.modules()] == [True, True, False]


@pytest.mark.parametrize("loads", ["outside", "inside"])
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.sampled(3)
def test_under_inference_mode(make, build, asked, loads):
    requests = ASKED[asked](build)
    expected = getattr(make(attack="fgsm"), asked)(requests, disable_tqdm=True)
    lm = make(attack="fgsm")
    with torch.inference_mode():
        if loads == "inside":
            lm = make(attack="fgsm")
        assert getattr(lm, asked)(requests, disable_tqdm=True) == expected


def test_a_model_that_was_made_under_inference_mode_is_refused(make):
    config = AutoConfig.from_pretrained(MODEL_PATH)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UsageError, match=r"made under torch\.inference_mode"):
        make(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(MODEL_PATH))


def test_evaluate_under_inference_mode():
    plan = Plan("demo", "demo_piqa", attacks=["none", "fgsm"], limit=4, device="cpu")
    expected = evaluate(plan, progress="quiet").samples
    with torch.inference_mode():
        found = evaluate(plan, progress="quiet").samples
    assert found["log_likelihoods"].map(list).tolist() == (
        expected["log_likelihoods"].map(list).tolist()
    )


def test_the_model_call_of_lm_eval_stays_clean(make):
    """It belongs to what docs/library.md lists as unattacked."""
    tokens = torch.arange(12).reshape(2, 6)
    expected = HFLM(str(MODEL_PATH), device="cpu")._model_call(tokens)
    assert torch.equal(make(attack="fgsm", epsilon=1)._model_call(tokens), expected)
