"""Encoder-decoder models in runs, in lm-eval and in `evaluate`; and what is refused of them."""

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from evaluation import evaluated
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.demo import MODEL_PATH
from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.requests import encode
from llm_attack.harness.tasks import tasks_path
from llm_attack.lm.network.pairs import BOTH

TASK = "demo_winogrande"  # its choices are contexts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A T5 with random weights and the tokenizer of the bundled model."""
    path = str(tmp_path_factory.mktemp("t5"))
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    ids = {"pad_token_id": 3, "eos_token_id": 1, "decoder_start_token_id": 3}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **ids))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return T5ForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def loaded(folder, model):
    """loaded(...): `attacked-hf` with this model and arguments."""

    def made(network=model, **arguments):
        options = {"device": "cpu", "batch_size": 8, "attack": "none", **arguments}
        return AttackedHFLM(network, tokenizer=AutoTokenizer.from_pretrained(folder), **options)

    return made


def answers(lm, task):
    return [ll for ll, _ in lm.loglikelihood(task.instances, disable_tqdm=True)]


def test_every_door(folder, one_index):
    """`evaluate`, and `attacked-hf` and stock `hf` in lm-eval: the same accuracies."""
    attacks = {"attacks": "none,fgsm", "epsilons": "0.3rms", "loss": "choice", "limit": 5}
    result = evaluated(folder, TASK, device="cpu", **attacks)
    accuracies = {
        condition: rows["acc"].mean() for condition, rows in result.samples.groupby("condition")
    }
    assert accuracies["fgsm@0.3rms"] < accuracies["none"]
    manager = TaskManager(include_path=str(tasks_path()))
    common = {"tasks": [TASK], "limit": 5, "task_manager": manager, "bootstrap_iters": 0}

    def accuracy(model, **arguments):
        given = {"pretrained": folder, "device": "cpu", **arguments}
        found = simple_evaluate(model, model_args=given, **common)
        return found["results"][TASK]["acc,none"]

    assert accuracy("hf") == accuracies["none"]
    fgsm = {"attack": "fgsm", "epsilon": "0.3rms", "loss": "choice"}
    assert accuracy("attacked-hf", backend="seq2seq", **fgsm) == accuracies["fgsm@0.3rms"]


def test_the_run_of_a_command(folder, one_index, tmp_path):
    out = tmp_path / "out"
    words = f"run --model {folder} --tasks {TASK} --limit 3 --attacks none,pgd --epsilons 0.1rms"
    words += f" --hookpoint {BOTH} --steps 2 --device cpu -o {out}"
    done = CliRunner().invoke(main, words.split())
    assert done.exit_code == 0, done.output
    assert json.loads((out / "run.json").read_text())["settings"]["hookpoint"] == BOTH


@pytest.mark.parametrize("hookpoint", [None, "decoder.embed_tokens", "encoder.block.0"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_checkpointing": True},
        {"packing": "off"},
        {"packing": "tree"},
        {"batch_size": 1},
        {"deterministic": True},
        {"attack": "pgd", "steps": 2, "batch_size": "auto"},
    ],
    ids=str,
)
@pytest.mark.sampled(4)
def test_how_it_is_computed_does_not_matter(loaded, model, build, hookpoint, arguments):
    task = build(TASK, 3)
    common = {"attack": "fgsm", "epsilon": "0.1rms", "hookpoint": hookpoint, "loss": "choice"}
    common |= {name: value for name, value in arguments.items() if name in ("attack", "steps")}
    wide = copy.deepcopy(model).double()
    expected = answers(loaded(wide, softmax_dtype="float64", **common), task)
    found = answers(loaded(wide, softmax_dtype="float64", **{**common, **arguments}), task)
    assert found == pytest.approx(expected, abs=1e-5)


def test_low_precision(loaded, model, build):
    """The copy that computes gradients, and the model itself."""
    task, common = build(TASK, 3), {"attack": "fgsm", "epsilon": "0.1rms", "loss": "choice"}
    clean, expected = answers(loaded(), task), answers(loaded(**common), task)
    damage = sum(abs(a - b) for a, b in zip(clean, expected, strict=True))
    for found in (
        answers(loaded(gradient_dtype="bfloat16", **common), task),
        answers(loaded(copy.deepcopy(model).bfloat16(), **common), task),
    ):
        error = sum(abs(a - b) for a, b in zip(found, expected, strict=True))
        assert error < 0.5 * damage  # nearer to the attack in float32 than to none


def test_parts_on_disk(folder, loaded, build, tmp_path):
    """A block of the decoder, as `parallelize=True` of lm-eval places it."""
    task, common = build(TASK, 2), {"attack": "fgsm", "epsilon": "0.1rms", "loss": "choice"}
    inside = ("embed_tokens", "block.1", "final_layer_norm", "dropout")
    places = dict.fromkeys(
        ("shared", "encoder", "lm_head", *(f"decoder.{n}" for n in inside)), "cpu"
    )
    split = {"parallelize": True, "device_map": {**places, "decoder.block.0": "disk"}}
    lm = loaded(folder, offload_folder=str(tmp_path), **split, **common)
    assert {p.device.type for p in lm.model.parameters()} == {"cpu", "meta"}
    assert answers(lm, task) == pytest.approx(answers(loaded(**common), task), abs=1e-4)


def test_adapters(loaded, model, build):
    task = build(TASK, 2)
    config = LoraConfig(
        target_modules=["q", "v"], init_lora_weights=False, task_type="SEQ_2_SEQ_LM"
    )
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(model), config)
    clean = answers(loaded(adapted), task)
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert clean == pytest.approx(answers(loaded(merged), task), abs=1e-4)
    given = {"attack": "fgsm", "epsilon": "0.1rms"}
    found, expected = (answers(loaded(of, **given), task) for of in (adapted, merged))
    assert found == pytest.approx(expected, abs=1e-2)
    config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2)
    with pytest.raises(UsageError, match="has virtual tokens of an adapter; must be"):
        loaded(get_peft_model(copy.deepcopy(model), config))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"backend": "causal"}, "backend=causal: must be left out, or be seq2seq, because T5For"),
        ({"compile": True}, "compile=True: must be left out for encoder-decoder models"),
        (
            {"positions": "continuation"},
            "positions=continuation: must be another value with hookpoint=encoder.embed_tokens",
        ),
        (
            {"positions": "context", "hookpoint": "decoder.embed_tokens"},
            "positions=context: must be another value with hookpoint=decoder.embed_tokens",
        ),
        ({"hookpoint": "shared"}, "hookpoint=shared: must be the dotted path of a module"),
        ({"hookpoint": "encoder.blok.0"}, "hookpoint=encoder.blok.0: .*did you mean 'encoder.bloc"),
        ({"hookpoint": "encoder"}, "hookpoint=encoder: must be the dotted path of a module"),
    ],
    ids=str,
)
def test_refused(loaded, arguments, line):
    with pytest.raises(UsageError, match=line):
        loaded(**arguments)


def test_a_decoder_without_shared_rows(loaded, monkeypatch):
    monkeypatch.setattr("llm_attack.harness.seq2seq.longest_decoder", lambda *_: 0)
    with pytest.raises(UsageError, match="packing=tree: must be auto or off for T5ForCond"):
        loaded(packing="tree")


def test_refused_models(loaded, model, make):
    nameless = copy.deepcopy(model)
    nameless.config.decoder_start_token_id = None
    with pytest.raises(UsageError, match="does not name the first token of its decoder"):
        loaded(nameless)
    with pytest.raises(UsageError, match="LlamaForCausalLM: must be a causal model, or an encod"):
        causal = make(attack="none")
        make(pretrained=causal.model, tokenizer=causal.tokenizer, backend="seq2seq")


@pytest.mark.slow
def test_texts_in_a_run(folder, loaded, build, one_index):
    """Those of `generate_until`, under each condition."""
    given = {"attacks": "none,fgsm", "epsilons": "1rms", "limit": 2, "device": "cpu"}
    result = evaluated(folder, "demo_answers", **given)
    samples, about = result.samples, result.run["texts"]["demo_answers"]["attack"]
    assert "of the text that the model writes without an attack" in about
    asked = build("demo_answers", 2).instances
    for condition in ({"attack": "none"}, {"attack": "fgsm", "epsilon": "1rms"}):
        lm = loaded(**condition)
        texts = samples[samples["attack"] == condition["attack"]]["text"].tolist()
        assert texts == lm.generate_until(asked, disable_tqdm=True)
    assert len(set(samples["text"])) > 2


def test_refused_in_a_run(folder, one_index, tmp_path):
    given = {"device": "cpu", "limit": 1, "attacks": "none,fgsm"}
    with pytest.raises(UsageError, match="save_perturbations=True: must be left out for encoder-"):
        evaluated(folder, TASK, save_perturbations=True, output=str(tmp_path / "out"), **given)
    with pytest.raises(
        UsageError, match=r"hookpoints=embed,encoder\.block\.0: must be one hookpoint"
    ):
        evaluated(folder, TASK, hookpoints=["embed", "encoder.block.0"], **given)
    with pytest.raises(UsageError, match="hookpoint=both: must be left out, or be a module of the"):
        evaluated(folder, "demo_answers", hookpoint=BOTH, **given)


def test_positions(loaded, build):
    """Of the question alone; the token that ends a prompt belongs to it."""
    task = build("demo_piqa", 2)
    task.set_config("num_fewshot", 2)
    task.build_all_requests(limit=2)
    lm = loaded(positions="question", attack="fgsm")
    for request, encoded in zip(task.instances, encode(lm, task.instances), strict=True):
        own = encoded.n_question - encoded.n_continuation
        question = lm.tok_decode(list(encoded.context[-own:]))
        assert question.strip() == task.doc_to_text(request.doc).strip()
    assert answers(lm, task) != answers(loaded(), task)


def test_prompts_that_are_cut(loaded, build):
    task = build("demo_piqa", 2)
    lm = loaded(max_length=8)
    encoded = encode(lm, task.instances)
    assert {len(request.context) for request in encoded} == {8}
    assert lm.warnings == [
        "task demo_piqa: 4 of 4 requests are longer than max_length=8, so their first tokens are"
        " cut off"
    ]
