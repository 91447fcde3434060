"""Interval bounds of a small Llama contain what the network computes."""

import runpy

import pytest
import torch
from shown import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

from llm_attack.lm.packing.questions import Question, Request

BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "interval_bounds.py"))
Bounds, Interval = BENCHMARK["Bounds"], BENCHMARK["Interval"]
TOKENS = [3, 9, 4, 4, 7]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)


def logits(model, change):
    embedded = model.model.embed_tokens(torch.tensor([TOKENS])) + change
    return model(inputs_embeds=embedded).logits[0]


def test_without_a_change_they_are_the_logits(model):
    """transformers computes the norm in float32."""
    found = Bounds(model).logits(TOKENS, 0.0)
    for end in found:
        assert torch.allclose(end, logits(model, 0.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("r", [1e-3, 3e-2])
def test_they_contain_what_the_network_computes(model, r):
    """At corners of the box, and where the gradient says that a logit is extreme."""
    found = Bounds(model).logits(TOKENS, r)
    generator = torch.Generator().manual_seed(1)
    shape = (1, len(TOKENS), 8)
    changes = [r * (torch.randint(0, 2, shape, generator=generator) * 2.0 - 1) for _ in range(50)]
    for token in range(12):
        leaf = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(logits(model, leaf)[-1, token], leaf)
        changes += [r * slope.sign(), -r * slope.sign()]
    seen = torch.stack([logits(model, change.double()) for change in changes])
    assert (seen >= found.low - 1e-5).all() and (seen <= found.high + 1e-5).all()
    if r == 1e-3:  # they are no wider than needed by orders of magnitude
        assert (found.high - found.low).max() < 300 * (seen.amax(0) - seen.amin(0)).max()


def test_the_reach_is_no_longer_than_an_attack_needs(model):
    """The bracket: certified at the reach, and FGSM at any amplitude beyond it may succeed."""
    choices = [Request((*TOKENS, 1), 1), Request((*TOKENS, 2), 1)]
    first, second = (Bounds(model).score(request, 0.0)[0] for request in choices)
    gold = [first > second, second > first]
    question = Question(choices, [[0], [1]], gold)
    wrong = Question(choices, [[0], [1]], gold[::-1])
    bounds = Bounds(model)
    reach = bounds.reach(question, 1.0)
    assert 1e-8 < reach < 1e-2 and bounds.reach(wrong, 1.0) == 0
    assert bounds.certifies(question, reach) and not bounds.certifies(question, 4 * reach)
    sign = 1.0 if gold[0] else -1.0
    leaf = torch.zeros(1, len(TOKENS), 8, dtype=torch.float64, requires_grad=True)
    log_share = logits(model, leaf)[-1].log_softmax(-1)
    (slope,) = torch.autograd.grad(sign * (log_share[1] - log_share[2]), leaf)
    after = logits(model, -reach * slope.sign())[-1]
    assert sign * (after[1] - after[2]) > 0


def test_the_sigmoid_unit_has_a_minimum():
    x = Interval(torch.tensor([-2.0, -5.0, 0.5]), torch.tensor([-0.5, -3.0, 1.0]))
    found = BENCHMARK["silu"](x)
    grid = torch.linspace(0, 1, 10_001)[:, None] * (x.high - x.low) + x.low
    seen = torch.nn.functional.silu(grid)
    assert torch.allclose(found.low, seen.amin(0), atol=1e-6)
    assert torch.allclose(found.high, seen.amax(0), atol=1e-6)
