"""Rows without padding give the scores and gradients of whole rows."""

import pytest
import torch
from hypothesis import given, settings
from networks import ARCHITECTURES, CPU, exact, network, scorer_of
from test_trees import question, questions

from llm_attack.attacks import Attack
from llm_attack.lm.engine.engine import Engine, Layout
from llm_attack.lm.engine.probe import longest_flat
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.packing.pack import pack_rows
from llm_attack.lm.packing.questions import Question

ASKED = [
    question([([2, 3, 4, 5, 6, *end], len(end)) for end in ([7], [8, 9], [8, 10, 11], [7, 12])]),
    question([([2, 3, 4, 13, *end], 1) for end in ([7], [8])]),
]


def families(made):
    return [Question([r], [[i]]) for i, r in enumerate(r for q in made for r in q.requests)]


def slopes(scorer, pack, length):
    """Scores of what is watched, and the gradient of their sum; no padding up to this length."""
    scorer.longest_flat = length
    with exact(), frozen(scorer.model), torch.enable_grad():
        x = scorer.point(pack).requires_grad_(True)
        scores = scorer(pack, pack.watched, x)
        (gradient,) = torch.autograd.grad(scores.log_prob.sum(), x)
    scorer.longest_flat = 0
    return scores.log_prob.detach(), gradient


@given(questions())
@settings(max_examples=20)
def test_scores_and_gradients_are_those_of_rows(made):
    scorer = scorer_of(network("llama"))
    pack = pack_rows(families(made), whole=True)
    rows, flat = (slopes(scorer, pack, n) for n in (0, 99))
    for a, b in zip(flat, rows, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not rows[1][~pack.mask].any()


def test_a_model_reads_no_padding():
    """Of six rows, of which the longest has seven tokens to read."""
    scorer = scorer_of(network("llama"))
    pack = pack_rows(families(ASKED), whole=True)
    seen = []
    handle = scorer.model.model.layers[0].register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[:2])
    )
    try:
        for length in (7, 6):  # which the longest rows have; which is too short for them
            slopes(scorer, pack, length)
    finally:
        handle.remove()
    assert seen == [(1, pack.mask.sum()), pack.mask.shape]
    assert pack.mask.sum() < pack.mask.numel()


def test_rows_of_one_length_stay_rows():
    assert pack_rows([Question([question([([2, 3, 4], 1)]).requests[0]], [[0]])]).flat is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_trial_says_whether_a_model_takes_it(name):
    """All do whose attention is the one that is understood, and whose positions are given."""
    scorer = scorer_of(network(name))
    with frozen(scorer.model):
        taken = longest_flat(scorer, CPU)
    assert scorer.longest_flat == 0
    if taken:
        pack = pack_rows(families(ASKED), whole=True)
        rows, flat = (slopes(scorer, pack, n) for n in (0, taken))
        for a, b in zip(flat, rows, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "taken"), [("llama", True), ("bloom", False), ("mamba", False)])
def test_which_models_take_it(name, taken):
    scorer = scorer_of(network(name))
    with frozen(scorer.model):
        assert (longest_flat(scorer, CPU) > 0) == taken


def test_answers_are_those_of_rows():
    """Of attacks whose draws depend on the row that a token is in, too."""
    scorer = scorer_of(network("llama"))
    attacks = [Attack("none"), Attack("random", 0.05), Attack("fgsm", 0.05), Attack("bim", 0.05)]
    found = []
    for once in (False, True):
        with exact(), frozen(scorer.model):
            engine = Engine(scorer, attacks, ThreatModel(), CPU, Layout(once=once))
            assert (scorer.longest_flat > 0) == once
            batches = engine.batches(ASKED, 8)
            answered = [a for _, part in engine.answers(batches) for a in part.answered]
        scorer.longest_flat, scorer.takes_twins = 0, False
        found.append(torch.tensor([a.answers for a in answered])[..., 0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
