"""`llm-attack train`: the folder that it writes, its adapter, and what the dry run says."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_attack.base.errors import UsageError
from llm_attack.demo import MODEL_PATH
from llm_attack.demo.questions import training_texts
from llm_attack.demo.train import batches, train
from llm_attack.demo.world import SEED, World
from llm_attack.lm.units import Epsilon
from llm_attack.suite import train as commands
from llm_attack.suite.plan.training import Training
from llm_attack.suite.train import _batches, tune

EMBEDDING = "model.embed_tokens.weight"


def bundled():
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH).float()


def tuned(folder, **settings):
    training = Training(**{"updates": 2, "batch_size": 4, **settings})
    record = tune(training, training.plan({}), folder and str(folder), bar=False)
    return record, folder


@pytest.fixture(scope="module")
def robust(tmp_path_factory):
    """A model that was trained for two updates."""
    return tuned(tmp_path_factory.mktemp("robust") / "model", against="pgd@0.5rms")


def test_the_embedding_stays_and_the_rest_moves(robust):
    _, folder = robust
    weights = load_file(folder / "model.safetensors")
    for name, before in bundled().state_dict().items():
        assert torch.equal(weights[name], before) == (name == EMBEDDING), name


def test_the_record(robust):
    record, folder = robust
    assert json.loads((folder / "training.json").read_text("utf-8"))["passes"] == 2 * 4
    embedding = load_file(folder / "model.safetensors")[EMBEDDING]
    rms = float(embedding.square().mean().sqrt())
    assert record["epsilon_absolute"] == pytest.approx(0.5 * rms, rel=1e-6)
    assert len(record["losses"]) == 2
    assert record["weights"] - record["trained"] == embedding.numel()


def test_without_an_attack_it_is_the_trainer_of_the_bundled_model(tmp_path):
    _, folder = tuned(tmp_path / "model", against="none")
    model = bundled()
    model.get_input_embeddings().requires_grad_(False)
    tokenizer = commands.load_model(Training(against="none").plan({})).tokenizer
    texts = list(training_texts(World(SEED), 8))
    train(model, batches(texts, tokenizer, 4, 0), 1e-3, 0.0, bar=False)
    weights = load_file(folder / "model.safetensors")
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(weights[name], expected)


@pytest.mark.slow
def test_an_adapter(tmp_path):
    """It belongs to the model whose weights it leaves alone, and changes the answers."""
    text = tmp_path / "text.txt"
    text.write_text("A bird has feathers.\n\nEvery bird has feathers.\n", "utf-8")
    record, folder = tuned(tmp_path / "adapter", text=str(text), lora=2, against="freelb@0.1rms")
    model = bundled()
    ids = torch.tensor([[5, 17, 40]])
    with torch.no_grad():
        before = model(ids).logits
        adapted = PeftModel.from_pretrained(model, folder)
        assert not torch.equal(adapted(ids).logits, before)
        with adapted.disable_adapter():
            assert torch.equal(adapted(ids).logits, before)
    assert record["passes"] == 2 * 3
    assert (
        record["trained"]
        == adapted.get_nb_trainable_parameters()[1] - record["weights"] + (record["trained"])
    )


def test_short_files_are_read_again(tmp_path):
    """Each text as often as any other, or once more."""
    text = tmp_path / "text.txt"
    text.write_text("A bird has feathers.\nEvery bird has feathers.\n", "utf-8")
    training = Training(text=str(text), updates=1, batch_size=5, against="none")
    plan = training.plan({})
    lm = commands.load_model(plan)
    (ids,) = commands._batches(lm, commands._texts(training, plan), training, 0)
    eos = lm.tokenizer.eos_token_id
    assert (ids == eos).sum().item() == 5 == len(ids)
    assert sorted((ids == lm.tokenizer.encode("Every")[0]).sum(1).tolist()) in (
        [0, 0, 0, 1, 1],
        [0, 0, 1, 1, 1],
    )


def test_what_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE: must be 1"):
        tuned(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_the_attack_and_its_settings():
    plan = Training(against="freelb@0.02rms").plan({"norm": "l2", "seed": 3})
    (condition,) = plan.conditions
    assert (condition.attack, condition.epsilon) == ("pgd", Epsilon(0.02, "rms"))
    assert (condition.norm, condition.steps, plan.seed) == ("l2", 3, 3)
    assert str(Training(against="fgsm@1").plan({"model": "mine"}).model) == "mine"


def test_the_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands.run(Training(updates=7, batch_size=4), {}, None, "quiet", dry_run=True)
    rows = capsys.readouterr().out
    assert "passes, forward and backward" in rows and f"{7 * 4} " in rows
    assert not list(tmp_path.iterdir())


def test_the_seed_chooses_the_texts_of_a_file():
    """Also those of the last round, which takes only some of them."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    config = SimpleNamespace(pad_token_id=tokenizer.pad_token_id)
    lm = SimpleNamespace(
        tokenizer=tokenizer, max_length=9, device="cpu", model=SimpleNamespace(config=config)
    )
    texts = tokenizer.convert_ids_to_tokens(range(20, 40))
    some = Training("none", updates=1, batch_size=25)

    def chosen(seed):
        (ids,) = _batches(lm, texts, some, seed)
        return Counter(ids[:, 0].tolist())

    first, other = chosen(0), chosen(1)
    assert {*first} == set(range(20, 40)) == {*other}
    assert sorted(first.values()) == [1] * 15 + [2] * 5
    assert first != other == chosen(1)
