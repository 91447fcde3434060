"""The formulas of `docs/scale.md` against the engine and against transformers."""

import runpy
import sys

import pytest
import torch
from rich.console import Console
from shown import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

from llm_attack import Plan
from llm_attack.attacks import Attack
from llm_attack.suite.run import estimate
from llm_attack.suite.run.cost import passes
from llm_attack.suite.run.execute import prepare


@pytest.fixture(scope="module")
def scale():
    name = "docs_scale"
    found = runpy.run_path(str(ROOT / "docs/scale.py"), run_name=name)
    sys.modules.pop(name, None)
    return found


def test_the_page_shows_what_is_computed(scale):
    text = (ROOT / "docs/scale.md").read_text("utf-8")
    for name in ("fig3", "cluster"):
        assert scale[name]().markdown().strip() in text


@pytest.mark.parametrize("name", ["LARGE", "MIDDLE"])
def test_weights(scale, name):
    """Those of transformers' Llama, less the embedding and the normalisations."""
    of = scale[name]
    heads = {"num_attention_heads": of.width // 128, "num_key_value_heads": of.heads_width // 128}
    sizes = {"hidden_size": of.width, "intermediate_size": of.inner, "vocab_size": of.vocabulary}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=of.layers, **sizes, **heads))
    assert of.blocks == sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    assert of.head == model.lm_head.weight.numel()


def test_passes(scale):
    found = passes([Attack(name) for name in ("none", "random", "fgsm", "bim")], 3)
    assert found.gradients == scale["BACKWARDS"]
    assert found.gradients + found.answers + found.losses + found.clean == scale["FORWARDS"]


def test_what_is_kept_of_a_token(scale):
    """With and without checkpointing, of the bundled model; their difference has no logits."""
    kept = []
    for checkpointing in (False, True):
        options = {"limit": 5, "device": "cpu", "attacks": "none,fgsm", "context": "shared"}
        options["gradient_checkpointing"] = checkpointing
        prepared = prepare(Plan("demo", "demo_arc_easy", **options), "quiet", Console(stderr=True))
        scorer = prepared.lm.engine.scorer
        scorer.lean = scorer.stack = None  # which keep less, on a CPU
        kept.append(estimate.estimate(prepared, seconds=0.01).rates.kept)
    config = prepared.lm.model.config
    demo = scale["Model"](
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.hidden_size * config.num_key_value_heads // config.num_attention_heads,
        config.vocab_size,
    )
    of_float32 = 4 / scale["BYTES"]
    expected = of_float32 * (demo.kept(False) - demo.kept(True))
    assert kept[0] - kept[1] == pytest.approx(expected, rel=0.02)
    assert kept[1] > of_float32 * demo.kept(True)
