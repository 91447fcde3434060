"""The clean forward computes shared parts of rows once, and gives the gradients of each row."""

import pytest
import torch
from hypothesis import given, settings
from networks import ARCHITECTURES, CPU, exact, network, prepared, scorer_of
from test_trees import question, questions

from llm_attack.attacks import Attack
from llm_attack.lm.engine import probe
from llm_attack.lm.engine.clean import usable_twins
from llm_attack.lm.engine.engine import Engine, Layout
from llm_attack.lm.engine.probe import takes_twins
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.packing.pack import pack_rows
from llm_attack.lm.packing.questions import Question, Request

ASKED = [
    question([([2, 3, 4, 5, 6, *end], len(end)) for end in ([7], [8, 9], [8, 10, 11], [7, 12])]),
    question([([2, 3, 4, 13, *end], 1) for end in ([7], [8])]),
]


def families(made):
    return [Question([r], [[i]]) for i, r in enumerate(r for q in made for r in q.requests)]


def both(scorer, pack, loss):
    """Gradient and clean scores by rows and once, with the surfaces."""
    found = []
    for once in (False, True):
        scorer.takes_twins = once
        threat = ThreatModel(loss)
        with exact(), frozen(scorer.model):
            clean = prepared(scorer, pack, threat).clean
        assert (usable_twins(scorer, pack, threat) is not None) == once
        found.append((clean.gradient, *clean.scores, clean.loss))
    scorer.takes_twins = False
    return found


@pytest.mark.parametrize("loss", ["sequence", "continuation"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3", "mixtral"])
def test_gradients_are_those_of_rows(name, loss):
    """In float64, of each row its own."""
    scorer = scorer_of(network(name))
    pack = pack_rows(families(ASKED), whole=loss == "sequence")
    rows, once = both(scorer, pack, loss)
    torch.testing.assert_close(once[0], rows[0], rtol=1e-9, atol=1e-13)
    for a, b in zip(once[1:], rows[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    # rows that begin alike have gradients of their own there
    assert not torch.allclose(rows[0][0, 2], rows[0][1, 2], rtol=1e-3, atol=0)


@given(questions())
@settings(max_examples=20)
def test_of_any_questions(made):
    scorer = scorer_of(network("llama"))
    pack = pack_rows(families(made), whole=True)
    if pack.twins is not None:
        rows, once = both(scorer, pack, "sequence")
        torch.testing.assert_close(once[0], rows[0], rtol=1e-9, atol=1e-12)


def test_products_are_made_once_for_each_node(monkeypatch):
    """Counted at the linear layers themselves."""
    scorer = scorer_of(network("llama"))
    pack = pack_rows(families(ASKED), whole=True)
    seen = []
    linear = torch.nn.functional.linear

    def counted(x, *args):
        seen.append(x.numel() // x.shape[-1])
        return linear(x, *args)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    scorer.takes_twins = True
    with frozen(scorer.model):
        clean = prepared(scorer, pack, ThreatModel()).clean
    assert clean.gradient.shape == clean.x.shape
    scorer.takes_twins = False
    nodes, predictions = len(pack.twins.first), len(pack.twins.entries.slot)
    assert set(seen) == {nodes, predictions}
    assert nodes < 0.8 * pack.mask.sum()
    assert predictions < len(pack.watched.slot)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_trial_says_whether_a_model_takes_it(name):
    """All do whose positions have activations that depend on what is before them alone."""
    scorer = scorer_of(network(name))
    with frozen(scorer.model):
        if takes_twins(scorer, CPU):
            rows, once = both(scorer, pack_rows(families(ASKED), whole=True), "sequence")
            torch.testing.assert_close(once[0], rows[0], rtol=1e-6, atol=1e-9)


def test_a_model_that_does_not(monkeypatch):
    """Its layers look at the row that they are in: twins are no twins there."""
    model = network("llama")
    scorer = scorer_of(model)
    with frozen(model):
        assert takes_twins(scorer, CPU)
        handle = model.model.layers[0].register_forward_pre_hook(
            lambda module, args: (args[0] * torch.arange(1.0, 1 + len(args[0]))[:, None, None],)
        )
        try:
            assert not takes_twins(scorer, CPU)
        finally:
            handle.remove()
        monkeypatch.setattr(
            probe.Scorer, "at_twins", lambda *_: (_ for _ in ()).throw(RuntimeError("packed"))
        )
        assert not takes_twins(scorer, CPU)


def test_nothing_of_the_model_differs_afterwards():
    scorer = scorer_of(network("llama"))
    before = {name: dict(vars(module)) for name, module in scorer.model.named_modules()}
    with frozen(scorer.model):
        assert takes_twins(scorer, CPU)
    for name, module in scorer.model.named_modules():
        assert vars(module).keys() == before[name].keys()


def test_siblings_share_a_batch():
    """In batches that hold one question each, and answers that are those of rows."""
    scorer = scorer_of(network("llama"))
    made = [
        Question([Request((*range(2, 9 + n), 20 + n, i), 1) for i in (3, 4, 5)], [[0], [1], [2]])
        for n in range(3)
    ]
    found = {}
    for once in (False, True):
        attacks = [Attack("none"), Attack("fgsm", 0.05), Attack("bim", 0.05, steps=2)]
        with exact(), frozen(scorer.model):
            engine = Engine(scorer, attacks, ThreatModel(), CPU, Layout(once=once))
            assert scorer.takes_twins == once
            batches = engine.batches(made, 3)
            answered = [a for _, part in engine.answers(batches) for a in part.answered]
        assert [len({q.requests[0].inputs[-1] for q in b.questions}) for b in batches] == [1] * 3
        found[once] = {a.question.requests[0].tokens: a.answers for a in answered}
        scorer.takes_twins = False
    for tokens, answers in found[True].items():
        ours, theirs = (torch.tensor(of)[..., 0] for of in (answers, found[False][tokens]))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
