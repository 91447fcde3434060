"""Runs with a loaded model: equal to runs with its name; the model is unchanged afterwards."""

import copy
import json
import pickle
import sys
from types import MethodType

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_attack import Plan, evaluate
from llm_attack.base.errors import UsageError
from llm_attack.base.loaded import LoadedModel
from llm_attack.cli import main
from llm_attack.demo import MODEL_PATH
from llm_attack.harness import hashes
from llm_attack.suite import results
from llm_attack.suite.evaluate import call
from llm_attack.suite.run.load import load_model

GIVEN = {"tasks": "demo_piqa", "attacks": ["none", "random", "bim"], "limit": 3, "steps": 3}


def loaded():
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_PATH)


def plain(value):
    """A tensor by its bytes, anything else as a copy."""
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else copy.copy(value)


def everything(model):
    """All of a model that a run could leave changed; tensors by their bytes and their place."""
    modules = [
        {key: plain(value) for key, value in vars(module).items() if key != "_parameters"}
        for module in model.modules()
    ]
    tensors = [
        (
            name,
            id(of),
            of.dtype,
            of.device,
            of.requires_grad,
            of.grad,
            of.detach().numpy().tobytes(),
        )
        for name, of in model.named_parameters(remove_duplicate=False)
    ]
    return modules, tensors, model.config.to_dict(), model.generation_config.to_dict()


def log_likelihoods(result):
    return [list(values) for values in result.samples["log_likelihoods"]]


@pytest.mark.parametrize("how", [{}, {"gradient_checkpointing": True}, {"hookpoints": "layers"}])
@pytest.mark.sampled(3)
def test_it_is_left_as_it_was(how, tokenizer):
    """Also where modes and flags are mixed, there are hooks, and the run changes blocks."""
    model = loaded().train()
    model.lm_head.eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    seen = []
    model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    before, vocabulary = everything(model), copy.deepcopy(tokenizer.special_tokens_map)
    evaluate(Plan(model, tokenizer=tokenizer, device="cpu", **GIVEN, **how), progress="quiet")
    assert everything(model) == before and seen
    assert tokenizer.special_tokens_map == vocabulary
    sentence = tokenizer("The boat left.", return_tensors="pt")
    model.train()(**sentence, labels=sentence["input_ids"]).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_the_run_is_that_by_its_path(tmp_path, monkeypatch):
    """The folder goes on, is reported and is compared as if the model had been named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llm_attack.suite.report.figures.draw_all", lambda *_: [])
    named = evaluate(Plan(str(MODEL_PATH), device="cpu", **GIVEN), output="named", progress="quiet")
    plan = Plan(loaded(), **GIVEN)
    result = evaluate(plan, output="loaded", progress="quiet")
    assert log_likelihoods(result) == log_likelihoods(named)
    mark = result.run["fingerprint"]
    assert mark == named.run["fingerprint"]
    assert result.run["model"] == str(MODEL_PATH)
    assert result.run["model_name"] == MODEL_PATH.name
    again = evaluate(plan, output="loaded", progress="quiet")  # it is finished, and is read
    assert again.run["timings"] == result.run["timings"]
    for words in (["report", "loaded"], ["compare", "named", "loaded", "-o", "c.csv"]):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output
    assert results.load(tmp_path / "loaded").run["fingerprint"] == mark


def test_other_weights_are_another_run(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("llm_attack.suite.report.figures.draw_all", lambda *_: [])
    model = loaded()
    evaluate(Plan(model, tokenizer=tokenizer, name="mine", **GIVEN), output=tmp_path)
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    with pytest.raises(UsageError, match=r"output=.*weights: .* there, .* here"):
        evaluate(Plan(model, tokenizer=tokenizer, name="mine", **GIVEN), output=tmp_path)


@pytest.mark.slow
def test_a_stopped_run_goes_on(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("llm_attack.suite.report.figures.draw_all", lambda *_: [])
    from llm_attack.suite.run import store

    plan = Plan(loaded(), tokenizer=tokenizer, batch_size=1, **GIVEN)
    add, kept = store.Store.add, []

    def stop(self, *given):
        add(self, *given)
        kept.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store.Store, "add", stop)
        evaluate(plan, output=tmp_path / "run", progress="quiet")
    monkeypatch.setattr(store.Store, "add", lambda *given: kept.append(2) or add(*given))
    result = evaluate(plan, output=tmp_path / "run", progress="quiet")
    whole = evaluate(plan, progress="quiet")
    assert log_likelihoods(result) == log_likelihoods(whole)
    assert kept.count(1) == 1 and len(kept) >= 3


@pytest.mark.parametrize(
    ("tied", "name"), [(True, None), (False, "apart")], ids=["tied", "trained apart"]
)
@pytest.mark.sampled(2)
def test_tied_weights(tied, name, tokenizer):
    """lm-eval ties weights anew where the configuration says so; the caller may know better."""
    model = loaded()
    head = model.get_output_embeddings()
    head.weight = model.get_input_embeddings().weight
    model.config.tie_word_embeddings = True
    if not tied:
        head.weight = torch.nn.Parameter(head.weight.detach() * 2)
    sentence = tokenizer("The boat left.", return_tensors="pt")
    logits = model(**sentence).logits
    plan = Plan(model, tokenizer=tokenizer, name=name, **GIVEN)
    result = evaluate(plan, progress="quiet")
    assert (head.weight is model.get_input_embeddings().weight) == tied
    assert torch.equal(model(**sentence).logits, logits)
    assert result.run["model_name"] == (name or MODEL_PATH.name)


def halved(module, args, output):
    return output / 2


def doubled(module, args, output):
    return output * 2


def mark(model, tokenizer):
    """The part of the model in the fingerprint of its runs."""
    return hashes.of_model(load_model(Plan(model, tokenizer=tokenizer, device="cpu", **GIVEN)))


def test_hooks_of_its_own_make_another_model(tokenizer):
    model = loaded()
    mlp, marks = model.model.layers[0].mlp, [mark(model, tokenizer)]
    for hook in (halved, lambda *_: None, doubled):
        handle = mlp.register_forward_hook(hook)
        marks.append(mark(model, tokenizer))
        assert mark(model, tokenizer) == marks[-1]
        handle.remove()
    assert mark(model, tokenizer) == marks[0]
    mlp.forward = MethodType(lambda self, x: self.down_proj(self.up_proj(x)), mlp)
    marks.append(mark(model, tokenizer))
    assert len({json.dumps(of) for of in marks}) == len(marks)


def test_adapters_that_are_active_make_the_model(tokenizer):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(loaded(), config)
    model.add_adapter("other", config)
    marks = [mark(model, tokenizer)]
    with model.disable_adapter():
        marks.append(mark(model, tokenizer))
    assert mark(model, tokenizer) == marks[0]
    model.set_adapter("other")
    marks.append(mark(model, tokenizer))
    model.base_model.model.model.layers[0].self_attn.q_proj.scale_layer(2)
    marks.append(mark(model, tokenizer))
    assert len({of["weights"] for of in marks}) == 1
    assert len({json.dumps(of) for of in marks}) == 4


def test_adapters(tokenizer):
    """A model of peft gives what it gives with its adapter merged; epsilon 0 changes nothing."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(loaded(), config).eval()
    flags = {name: of.requires_grad for name, of in adapted.named_parameters()}
    assert len(set(flags.values())) == 2
    plan = Plan(adapted, tokenizer=tokenizer, name="adapted", **GIVEN)
    found = evaluate(plan, progress="quiet")
    assert {name: of.requires_grad for name, of in adapted.named_parameters()} == flags
    merged = copy.deepcopy(adapted).merge_and_unload()
    expected = evaluate(Plan(merged, tokenizer=tokenizer, name="merged", **GIVEN), progress="quiet")
    clean = evaluate(Plan(loaded(), tokenizer=tokenizer, **GIVEN), progress="quiet")
    values, others = (np.concatenate(log_likelihoods(of)) for of in (found, expected))
    np.testing.assert_allclose(values, others, atol=2e-3)
    assert np.abs(values - np.concatenate(log_likelihoods(clean))).max() > 0.1
    hashes = [of.run["fingerprint"]["weights"] for of in (found, expected, clean)]
    assert len(set(hashes)) == 3


def test_in_half_precision(tokenizer):
    """Its own dtype counts, and stays."""
    model = loaded().to(torch.bfloat16)
    result = evaluate(Plan(model, tokenizer=tokenizer, **GIVEN), progress="quiet")
    assert result.run["fingerprint"]["dtype"] == "torch.bfloat16" == str(model.dtype)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"shard": "1/2"}, "shard=1/2: must not be given with a loaded model"),
        ({"ray": "local"}, "ray=local: must not be given with a loaded model"),
        ({"name": " "}, "name=' ': must be a text"),
        ({"name": 5}, "name=5: must be a text"),
        ({"model_args": {"dtype": "float16"}}, "dtype=float16: must be left out if"),
        ({"model_args": {"parallelize": True}}, "parallelize=True: must be left out if"),
        ({"model_args": {"tp_plan": "auto"}}, "tp_plan=auto: must be left out if"),
        ({"tokenizer": 5}, "tokenizer=5: must be a name, a folder or a tokenizer"),
        ({"device": "cuda:7"}, "device=cuda:7: must be"),
    ],
)
def test_what_does_not_go_with_it(given, said, tokenizer, tmp_path):
    with pytest.raises(UsageError, match=said) as refused:
        evaluate(
            Plan(loaded(), **{"tokenizer": tokenizer, **GIVEN, **given}), output=tmp_path / "o"
        )
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200
    assert not (tmp_path / "o").exists()


def test_several_processes(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UsageError, match=r"model=mine: .* belongs to one process"):
        evaluate(Plan(loaded(), tokenizer=tokenizer, name="mine", **GIVEN), output=tmp_path / "o")


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        (torch.nn.Linear(2, 2), {}, "model=Linear: must be a model of transformers"),
        ("demo", {"name": "x"}, "name: must be given together with a loaded model"),
        ("demo", {"tokenizer": "x"}, r"tokenizer: must be given together with .* model_args="),
        (5, {}, "model=5: must be a text"),
    ],
    ids=["no transformer", "a name of a name", "a tokenizer of a name", "a number"],
)
def test_what_is_no_loaded_model(model, given, said):
    with pytest.raises(UsageError, match=said) as refused:
        Plan(model, **given)
    assert "\n" not in str(refused.value)


def test_one_that_does_not_say_where_it_is_from(tokenizer):
    model = AutoModelForCausalLM.from_config(loaded().config.__class__(**SMALL))
    with pytest.raises(UsageError, match="tokenizer=None: must be given, because the loaded Llama"):
        Plan(model, **GIVEN)
    assert Plan(model, tokenizer=tokenizer, **GIVEN).model == type(model).__name__


SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}


def test_the_plan_is_a_value(tokenizer):
    """Settings are texts and numbers; the model is not copied, and is found in a changed plan."""
    from dataclasses import replace

    model = loaded()
    plan = replace(Plan(model, tokenizer=tokenizer, name="mine", **GIVEN), limit=2)
    assert isinstance(plan.model, LoadedModel) and plan.model.model is model
    assert copy.deepcopy(plan).model is plan.model  # never other weights by the same name
    with pytest.raises(UsageError, match="model=mine: is loaded in this process"):
        pickle.dumps(plan)
    assert plan.model.tokenizer is tokenizer
    assert json.loads(json.dumps(plan.settings()))["model"] == "mine"
    assert type(plan.settings()["model"]) is str
    text = call(plan, "out")
    assert text.startswith("evaluate(Plan(model, tokenizer=tokenizer, name='mine', ")
    assert text.endswith("output='out')  # in Python, where model is a LlamaForCausalLM")
    made = eval(
        text.replace("evaluate(", "dict(plan=", 1),
        {**vars(sys.modules[__name__])} | {"model": model, "tokenizer": tokenizer},
    )
    assert made["plan"] == plan and made["output"] == "out"
