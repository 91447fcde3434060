"""lm-eval's response cache never gives answers that were written under other settings."""

import json
import shutil

import pytest
import torch
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from llm_attack.attacks import ATTACKS, register_attack
from llm_attack.base.errors import UsageError
from llm_attack.demo import MODEL_PATH
from llm_attack.lm.losses import LOSSES, register_loss


def ask(lm, task):
    return lm.loglikelihood(task.instances)


def test_same_settings_reuse_the_file(make, build, tmp_path, monkeypatch):
    task, file = build("demo_piqa", 3), str(tmp_path / "cache.db")
    first = ask(CachingLM(make(attack="fgsm"), file), task)
    again = CachingLM(make(attack="fgsm", batch_size=2), file)
    monkeypatch.setattr(again.lm.engine, "compute", None)  # nothing may be computed
    assert ask(again, task) == first


@pytest.mark.parametrize(
    "other",
    [
        {"attack": "none"},
        {"attack": "fgsm", "epsilon": 0.02},
        {"attack": "fgsm", "loss": "continuation"},
        {"attack": "fgsm", "seed": 1},
        {"attack": "fgsm", "max_length": 8},
    ],
    ids=str,
)
@pytest.mark.sampled(3)
def test_other_settings_are_refused(make, build, tmp_path, other):
    file = tmp_path / "cache.db"
    ask(CachingLM(make(attack="fgsm"), str(file)), build("demo_piqa", 2))
    (changed,) = set(other) - {"attack"} or {"attack"}
    with pytest.raises(UsageError, match=rf"use_cache=.*cache\.db.*{changed}="):
        CachingLM(make(**other), str(file))


@pytest.mark.parametrize("kind", ["attack", "loss"])
@pytest.mark.sampled(2)
def test_a_function_of_ones_own_that_changed_is_refused(kind, make, build, tmp_path, monkeypatch):
    def known(factor):
        for table in (ATTACKS, LOSSES):
            monkeypatch.delitem(table, "own", raising=False)
        register_attack(lambda x, loss, ball, keys: x + factor * ball.epsilon, "own")
        register_loss(lambda sums: -factor * sums, "own")

    known(1)
    file, asked = str(tmp_path / "cache.db"), {"attack": "fgsm", kind: "own"}
    ask(CachingLM(make(**asked), file), build("demo_piqa", 1))
    known(1)
    CachingLM(make(**asked), file)
    known(2)
    with pytest.raises(UsageError, match=rf"use_cache=.*\W{kind}_source=\w+ there"):
        CachingLM(make(**asked), file)


def edited(path, change):
    """A JSON file with something changed."""
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def retrained(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[0, 0] += 0.01
    model.save_pretrained(folder)


def reconfigured(folder):
    edited(folder / "config.json", lambda content: content.update(rms_norm_eps=1e-3))


def of_other_words(folder):
    """Two words of the tokenizer change places."""

    def swap(content):
        vocabulary = content["model"]["vocab"]
        a, b = list(vocabulary)[-2:]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    edited(folder / "tokenizer.json", swap)


def generating_otherwise(folder):
    edited(folder / "generation_config.json", lambda content: content.update(do_sample=True))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (retrained, "weights"),
        (reconfigured, "config"),
        (of_other_words, "tokenizer"),
        (generating_otherwise, "generation"),
    ],
)
@pytest.mark.sampled(4)
def test_a_folder_that_changed_is_another_model(make, build, tmp_path, change, named):
    """Its name is the same: answers of what was there before are not those of what is there now."""
    folder, file = shutil.copytree(MODEL_PATH, tmp_path / "model"), str(tmp_path / "cache.db")
    arguments = {"pretrained": str(folder), "attack": "fgsm"}
    ask(CachingLM(make(**arguments), file), build("demo_piqa", 1))
    CachingLM(make(**arguments), file)
    change(folder)
    with pytest.raises(UsageError, match=rf"use_cache=.*[(; ]{named}=\w+ there, {named}=\w+ now"):
        CachingLM(make(**arguments), file)


def test_a_loaded_model_is_known_by_its_weights(make, build, tmp_path):
    """It has no name at all."""
    file, model = str(tmp_path / "cache.db"), make().model
    tokenizer = str(MODEL_PATH)
    ask(CachingLM(make(pretrained=model, tokenizer=tokenizer), file), build("demo_piqa", 1))
    CachingLM(make(pretrained=model, tokenizer=tokenizer), file)
    with torch.no_grad():
        model.model.norm.weight[0] += 0.01
    with pytest.raises(UsageError, match=r"use_cache=.*weights="):
        CachingLM(make(pretrained=model, tokenizer=tokenizer), file)
    with torch.no_grad():
        model.model.norm.weight[0] -= 0.01
    with pytest.raises(UsageError, match=r"use_cache=.*dtype=torch.float32 there"):
        CachingLM(make(pretrained=model.double(), tokenizer=tokenizer), file)


@pytest.mark.parametrize("changed", ["weights", "config"])
@pytest.mark.sampled(2)
def test_an_adapter_that_changed(make, build, tmp_path, changed):
    """Trained on, or with another scale, which is in its configuration alone."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    folder, file = tmp_path / "adapter", str(tmp_path / "cache.db")
    settings = {"target_modules": ["v_proj", "q_proj"], "init_lora_weights": False}
    torch.manual_seed(0)
    adapted = peft.get_peft_model(make().model, peft.LoraConfig(**settings))
    adapted.save_pretrained(folder)
    arguments = {"attack": "fgsm", "peft": str(folder)}
    ask(CachingLM(make(**arguments), file), build("demo_piqa", 1))
    CachingLM(make(**arguments), file)
    if changed == "config":
        edited(folder / "adapter_config.json", lambda content: content.update(lora_alpha=3))
    else:
        with torch.no_grad():
            next(p for name, p in adapted.named_parameters() if "lora_B" in name).add_(0.1)
        adapted.save_pretrained(folder)
    with pytest.raises(UsageError, match=rf"use_cache=.*\W{changed}="):
        CachingLM(make(**arguments), file)


def test_a_file_of_stock_hf_is_refused(make, build, tmp_path):
    file = str(tmp_path / "cache.db")
    ask(CachingLM(HFLM(pretrained=str(MODEL_PATH), device="cpu"), file), build("demo_piqa", 1))
    with pytest.raises(UsageError, match="answers that attacked-hf did not write"):
        CachingLM(make(attack="fgsm"), file)


def test_half_answered_question(exact, build, tmp_path):
    """A run that was killed between two choices: the cached and the new answers belong together."""
    task = build("demo_arc_easy", 3)
    expected = ask(exact(attack="fgsm", loss="choice"), task)
    caching = CachingLM(exact(attack="fgsm", loss="choice"), str(tmp_path / "cache.db"))
    caching.loglikelihood(task.instances[1::4])
    found = ask(caching, task)
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in expected], abs=1e-6)


def test_one_request_in_two_questions(make, build, tmp_path):
    """With the gold known an answer belongs to a question, but the cache knows requests."""
    task = build("demo_arc_easy", 2)
    first, second = task.instances[:4], task.instances[4:8]
    second[0].arguments = first[0].arguments
    lm = make(attack="fgsm", loss="choice")
    answers = ask(lm, task)
    assert answers[0] != answers[4]
    with pytest.raises(UsageError, match="belongs to two"):
        ask(CachingLM(lm, str(tmp_path / "cache.db")), task)
