"""Our norms and rotary embeddings give the same numbers as the model's own."""

import copy

import pytest
import torch
from networks import ARCHITECTURES, CPU, network, scorer_of
from test_once import ASKED, families

from llm_attack.attacks import Attack
from llm_attack.lm.engine.engine import Engine, Layout
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.network.lean import Lean
from llm_attack.lm.packing.pack import pack_rows

NORMS = {"llama": 5, "qwen3": 9, "mixtral": 5}  # two of each of two blocks, and the last


def single(name, dtype=torch.float32):
    return copy.deepcopy(network(name)).to(dtype)


def slopes(scorer, pack):
    x = scorer.point(pack).requires_grad_(True)
    with torch.enable_grad():
        scores = scorer(pack, pack.watched, x)
        (gradient,) = torch.autograd.grad(scores.log_prob.sum(), x)
    return scores.log_prob.detach(), gradient


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_have_the_same_bits(name):
    """Gradients have other rounding."""
    scorer = scorer_of(single(name))
    pack = pack_rows(families(ASKED), whole=True)
    with frozen(scorer.model):
        theirs = slopes(scorer, pack)
        scorer.lean = Lean(scorer.model)
        ours = slopes(scorer, pack)
    assert len(scorer.lean.norms) == NORMS.get(name, len(scorer.lean.norms))
    assert scorer.lean.sources or name not in NORMS
    assert torch.equal(ours[0], theirs[0])
    spread = theirs[1].square().mean().sqrt()
    assert (ours[1] - theirs[1]).square().mean().sqrt() <= 1e-5 * spread


def test_others_are_left_as_they_are():
    """In another precision, where its gain is not known; and norms that are computed otherwise."""
    for dtype in (torch.float64, torch.bfloat16):
        lean = Lean(single("llama", dtype))
        assert not lean.norms
        assert not lean.sources
    assert not Lean(single("gemma2")).norms  # times 1 + weight
    assert not Lean(single("gpt2")).norms


def test_nothing_differs_afterwards():
    model = single("llama")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    lean = Lean(model)
    (source,) = lean.sources
    rotary = source.apply_rotary_pos_emb
    with pytest.raises(RuntimeError, match="inside"), lean.used():
        assert source.apply_rotary_pos_emb is not rotary
        raise RuntimeError("inside")
    assert source.apply_rotary_pos_emb is rotary
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()


def test_the_engine_uses_it_where_it_may():
    scorer = scorer_of(single("llama"))
    for once in (False, True):
        with frozen(scorer.model):
            Engine(scorer, [Attack("none")], ThreatModel(), CPU, Layout(once=once))
        assert (scorer.lean is not None) == once
