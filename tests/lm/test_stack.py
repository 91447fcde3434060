"""One function for all blocks: the numbers of the model's own code."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from networks import ARCHITECTURES, CPU, exact, network, prepared, scorer_of, single
from test_once import ASKED, families
from test_trees import questions

from llm_attack.attacks import Attack
from llm_attack.lm.engine import stack as module
from llm_attack.lm.engine.clean import usable_twins
from llm_attack.lm.engine.engine import Engine, Layout
from llm_attack.lm.engine.probe import usable_stack
from llm_attack.lm.engine.stack import Stack
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.network.blocks import blocks
from llm_attack.lm.network.hook import edit_output, frozen
from llm_attack.lm.network.lean import Lean
from llm_attack.lm.packing.pack import pack_rows, pack_trees

TAKEN = ["llama", "llama, dynamic", "qwen2", "mistral", "smollm3"]


def stack_of(scorer):
    """In float64, which the engine leaves alone."""
    return Stack(scorer.model, blocks(scorer.model, ""))


def clean(scorer, pack):
    with exact(), frozen(scorer.model):
        found = prepared(scorer, pack, ThreatModel()).clean
    return found.gradient, *found.scores, found.loss


def both(scorer, pack):
    """Clean passes with the model's own code, and with the function, which must be used."""
    theirs = clean(scorer, pack)
    scorer.stack = stack_of(scorer)
    assert scorer._stacks(pack)
    ours = clean(scorer, pack)
    scorer.stack = None
    return theirs, ours


@pytest.mark.parametrize("make", [pack_rows, pack_trees])
@pytest.mark.parametrize("flat", [0, 99])
@pytest.mark.parametrize("twins", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_gradients_are_those_of_the_model(name, twins, flat, make):
    """In float64. The gradient of the model's own code agrees with finite differences."""
    scorer = scorer_of(network(name))
    pack = make(families(ASKED) if make is pack_rows else ASKED, whole=True)
    scorer.takes_twins, scorer.longest_flat = twins, flat
    assert (usable_twins(scorer, pack, ThreatModel()) is not None) == (twins and make is pack_rows)
    for a, b in zip(*both(scorer, pack), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


@given(questions())
@settings(max_examples=20)
def test_of_any_questions(made):
    scorer = scorer_of(network("llama"))
    scorer.takes_twins, scorer.longest_flat = True, 99
    for a, b in zip(*both(scorer, pack_rows(families(made), whole=True)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


def test_slopes_are_those_of_finite_differences():
    scorer = scorer_of(network("llama"))
    scorer.stack = stack_of(scorer)
    pack = pack_rows(families(ASKED), whole=True)
    with exact(), frozen(scorer.model):
        batch = prepared(scorer, pack, ThreatModel())
        gradient, h = batch.clean.gradient, 3e-5 * batch.x.square().mean().sqrt()
        drawn = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
        drawn = (drawn * pack.mask[..., None]) / drawn.norm()
        with torch.no_grad():
            up, down = (batch.loss(batch.x + s * h * drawn).sum() for s in (1, -1))
    assert ((gradient * drawn).sum() - (up - down) / (2 * h)).abs() < 1e-6 * gradient.norm()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_trial_says_which_models_take_it(name):
    """Those with the blocks of a Llama; their scores are the same."""
    scorer = scorer_of(single(name))
    pack = pack_rows(families(ASKED), whole=True)
    with frozen(scorer.model):
        scorer.lean = Lean(scorer.model)
        stack = usable_stack(scorer, CPU)
        assert scorer.stack is None
        assert (stack is not None) == (name in TAKEN)
        if stack is not None:
            with torch.no_grad():
                theirs = scorer(pack, pack.watched)
                scorer.stack = stack
                torch.testing.assert_close(scorer(pack, pack.watched), theirs, rtol=0, atol=1e-4)


def test_a_wrong_function_is_refused(monkeypatch, caplog):
    scorer = scorer_of(single("llama"))
    turned_back = module.turned_back
    with frozen(scorer.model):
        scorer.lean = Lean(scorer.model)
        assert usable_stack(scorer, CPU) is not None
        monkeypatch.setattr(module, "turned_back", lambda x, cos, sin: turned_back(x, cos, -sin))
        assert usable_stack(scorer, CPU) is None
        monkeypatch.setattr(module, "turned_back", lambda *_: 1 / 0)
        with caplog.at_level(logging.INFO):
            assert usable_stack(scorer, CPU) is None
    assert "computed by the model: ZeroDivisionError" in caplog.text


def test_who_looks_inside_of_a_block_sees_it_run():
    """As with a hookpoint there, or a library that counts."""
    scorer = scorer_of(network("llama"))
    scorer.stack, seen = stack_of(scorer), []
    pack = pack_rows(families(ASKED), whole=True)
    inside = scorer.model.model.layers[0].mlp.up_proj
    with edit_output(inside, lambda output: seen.append(output.shape) or output):
        assert not scorer._stacks(pack)
        clean(scorer, pack)
    assert seen
    assert scorer._stacks(pack)


def test_a_forward_that_was_replaced():
    """As accelerate does; what is put back is an attribute, and the model's own forward again."""
    scorer = scorer_of(network("llama"))
    scorer.stack = stack_of(scorer)
    pack = pack_rows(families(ASKED), whole=True)
    inside = scorer.model.model.layers[0].mlp
    own = inside.forward
    try:
        inside.forward = lambda x: x
        assert not scorer._stacks(pack)
        inside.forward = own
        assert scorer._stacks(pack)
    finally:
        del inside.forward


def test_a_hookpoint_in_a_block_keeps_the_model():
    model = single("llama")
    for hookpoint, taken in (("model.embed_tokens", True), ("model.layers.0", False)):
        scorer = scorer_of(model, hookpoint)
        with frozen(model):
            scorer.lean = Lean(model)
            assert (usable_stack(scorer, CPU) is not None) == taken


def test_nothing_of_the_model_differs_afterwards():
    model = copy.deepcopy(network("llama"))
    scorer = scorer_of(model)
    before = {name: dict(vars(part)) for name, part in model.named_modules()}
    scorer.stack = stack_of(scorer)
    clean(scorer, pack_rows(families(ASKED), whole=True))
    for name, part in model.named_modules():
        assert vars(part).keys() == before[name].keys()


def test_large_packs_are_divided_without_it():
    """Parts are recomputed, and autograd decides what they keep."""
    scorer = scorer_of(single("llama"))
    whole = pack_rows(families(ASKED), whole=True)
    scorer.stack = stack_of(scorer)
    slopes = []
    for pack, used in ((whole, True), (replace(whole, limit=14), False)):
        with frozen(scorer.model):
            assert scorer._stacks(pack) == used
            slopes.append(prepared(scorer, pack, ThreatModel()).clean.gradient)
    error = (slopes[0] - slopes[1]).square().mean().sqrt()
    assert error <= 1e-5 * slopes[1].square().mean().sqrt()


def test_the_engine_uses_it():
    """Answers are those of the model's own code."""
    answers = []
    for once in (False, True):
        scorer = scorer_of(single("llama"))
        attacks = [Attack("none"), Attack("fgsm", 0.05), Attack("bim", 0.05, steps=3)]
        with frozen(scorer.model):
            engine = Engine(scorer, attacks, ThreatModel(), CPU, Layout(once=once))
            assert (scorer.stack is not None) == once
            results = [
                a for _, part in engine.answers(engine.batches(ASKED, 8)) for a in part.answered
            ]
        answers.append(torch.tensor([a.answers for a in results])[..., 0])
    torch.testing.assert_close(*answers, rtol=0, atol=1e-3)
