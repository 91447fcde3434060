"""A question packed as a tree has the logits, gradients and answers of its separate requests."""

import copy
import functools
import logging

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import CPU, network, prepared, scorer_of
from unchanged import unchanged

from llm_attack.attacks import ATTACKS, Attack
from llm_attack.lm.engine import engine as engines
from llm_attack.lm.engine.attacked import AttackedBatch
from llm_attack.lm.engine.clean import Needs, clean_pass
from llm_attack.lm.engine.engine import Engine, Layout
from llm_attack.lm.engine.probe import longest_tree, trees_fault
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.network.blocks import blocks, compiled, recompute
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.packing.batches import layouts
from llm_attack.lm.packing.pack import pack_trees
from llm_attack.lm.packing.questions import Question, Request


def question(requests, **content):
    made = [Request(tuple(tokens), n) for tokens, n in requests]
    return Question(made, [[i] for i in range(len(made))], **content)


@st.composite
def questions(draw):
    """Questions with contexts that are shared, nested, repeated, or not shared at all."""
    token = st.integers(2, 5)  # few: prefixes are shared by chance, too
    made = []
    for _ in range(draw(st.integers(1, 3))):
        context = draw(st.lists(token, min_size=1, max_size=8))
        requests = []
        for _ in range(draw(st.integers(1, 4))):
            own = draw(st.lists(token, min_size=1, max_size=5))
            kept = context[: draw(st.integers(0, len(context)))] or [draw(token)]
            requests.append((kept + own, draw(st.integers(1, len(own)))))
        made.append(question(requests, gold=[True] + [False] * (len(requests) - 1)))
    return made


@given(
    questions(),
    st.sampled_from(["llama", "gemma2", "gpt2"]),
    st.integers(0, 1),
)
@settings(max_examples=30)
def test_logits(made, kind, pad):
    """Against brute force: each request alone, unpacked, without a mask, all logits computed."""
    model = network(kind)
    pack = pack_trees(made, pad, whole=True)
    with torch.no_grad():
        found = scorer_of(model).logits(pack, pack.watched.positions)[pack.watched.slot]
        for i, request in enumerate(pack.requests):
            alone = model(torch.tensor([request.inputs])).logits[0]
            assert torch.allclose(found[pack.watched.request == i], alone, atol=1e-5)


@given(questions(), st.sampled_from(["sequence", "continuation", "choice"]))
@settings(max_examples=20)
def test_gradients(made, loss):
    """The gradient at a shared token is the sum over the choices that share it."""
    model = network("llama")
    pack = pack_trees(made, whole=loss == "sequence")
    threat = ThreatModel(loss, shared=True)
    with frozen(model):
        found = prepared(scorer_of(model), pack, threat).clean.gradient
    for row, of_question in enumerate(made):
        log_likelihoods, points = [], []
        for request in of_question.requests:
            embedded = model.get_input_embeddings()(torch.tensor([request.inputs])).detach()
            points.append(embedded.requires_grad_())
            log_probs = model(inputs_embeds=points[-1]).logits[0].log_softmax(-1)
            told = log_probs[range(len(request.inputs)), list(request.tokens[1:])]
            log_likelihoods.append(
                (told if loss == "sequence" else told[-request.n_continuation :]).sum()
            )
        scores = torch.stack(log_likelihoods)
        others = scores[1:].logsumexp(0) if len(scores) > 1 else scores[0]  # of one: no attack
        value = others - scores[0] if loss == "choice" else -scores.sum()
        gradients = torch.autograd.grad(value, points)
        expected = torch.zeros_like(found[row])
        for path, gradient in zip(of_question.trie.paths, gradients, strict=True):
            expected.index_add_(0, torch.from_numpy(path), gradient[0])
        # of the summands: those of equal choices cancel
        largest = max(gradient.abs().max() for gradient in gradients)
        assert torch.allclose(found[row], expected, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("name", "norm"),
    [(name, norm) for name, kind in ATTACKS.items() for norm in ("linf", "l2", "l2_token")],
)
@pytest.mark.sampled(8)
@given(questions())
@settings(max_examples=5)
def test_answers_do_not_depend_on_the_layout(name, norm, made):
    """Trees, shared rows, and batches of any composition give the same answers.

    Of GPT-2, all of which is in float64, so that no sign is a matter of rounding.
    """
    for q in made:  # among equal choices the loss is constant: its gradient's sign is rounding
        assume(len({(r.tokens, r.n_continuation) for r in q.requests}) == len(q.requests))
    epsilon, of = 0.05 if norm == "linf" else 0.5, norm.removesuffix("_token")
    attack = Attack(name, epsilon, of, per_token=norm != of, steps=3, queries=6)
    threat = ThreatModel("choice", shared=True)
    results = []
    for longest, tokens in ((99, 1000), (99, 20), (0, 1000), (9, 1000)):
        scorer = scorer_of(network("gpt2"))
        engine = Engine(scorer, [attack], threat, CPU, Layout(longest_tree=longest))
        engine.probe(made)  # with an older transformers GPT-2 takes no trees
        with frozen(scorer.model):
            batches = list(engine.answers(engine.batches(made, 8, tokens)))
        answered = [a for _, found in batches for a in found.answered]
        found = {id(a.question): a.answers[0] for a in answered}
        flat = [answer for q in made for answer in found[id(q)]]
        results.append(torch.tensor([ll for ll, _ in flat], dtype=torch.float64))
    for other in results[1:]:
        assert torch.allclose(results[0], other, atol=1e-7)


def test_layers_that_look_back_over_a_window():
    """Trees longer than the window get rows; all answers are those of the requests alone."""
    scorer = scorer_of(network("gpt_neo"))
    assert longest_tree(scorer, CPU) == 30
    context = [2 + i * 7 % 40 for i in range(20)]
    made = [
        question([([*context, 3, i], 2), ([*context[:n], 4, i], 1)]) for i, n in ((5, 18), (6, 2))
    ]
    assert [len(q.trie) for q in made] == [22, 22]
    made.append(question([(context + [i] * 9, 2) for i in (3, 4)]))
    assert len(made[-1].trie) == 36
    assert trees_fault(scorer, made[-1:], CPU)  # what the rule is there for
    trees, others = layouts(made, lambda q: len(q.trie) <= 30, shared=False)
    assert trees == [[q] for q in made[:2]]
    assert [[q.requests for q in of] for of in others] == [[[r] for r in made[2].requests]]


def test_choices_of_one_token_are_a_tree():
    """All logits that are looked at are those of one position: their spread is over the tokens."""
    scorer = scorer_of(copy.deepcopy(network("llama")).float())
    made = [question([([2, 3, 4, 5 + i], 1) for i in range(4)])]
    assert not trees_fault(scorer, made, CPU)


def test_a_long_tree_that_fails_turns_packing_off(monkeypatch, caplog):
    """The longest question of a run is tried too: short trials cannot show everything."""
    scorer = scorer_of(network("llama"))
    made = [question([([2, 3, 4], 1), ([2, 3, 5], 1)])]
    engine = Engine(scorer, [Attack("none")], ThreatModel(), CPU, Layout(longest_tree=99))
    monkeypatch.setattr(engines, "trees_fault", lambda *args: "gives other logits")
    with caplog.at_level(logging.WARNING, "llm_attack"):
        assert engine.batches(made, 8)[0].trees
        engine.probe(made)
    assert [(b.trees, len(b.questions)) for b in engine.batches(made, 8)] == [(False, 2)]
    assert "packing: off" in caplog.text


@pytest.mark.parametrize("change", [recompute, pytest.param(compiled, marks=pytest.mark.slow)])
def test_blocks_that_are_recomputed_or_compiled_change_nothing(change, monkeypatch):
    quick = functools.partial(torch.compile, backend="aot_eager")  # traced, but not made into C++
    monkeypatch.setattr(torch, "compile", quick)
    made = [question([([5, 6, 7, 8, 9], 2), ([5, 6, 7, 11], 1)], gold=[True, False])]
    plain = network("llama")
    model = copy.deepcopy(plain)
    found = blocks(model, "compile")
    assert found == list(model.model.layers)
    for block in found:
        change(block)
    gradients = []
    for each in (plain, model):
        with frozen(each):
            threat = ThreatModel("choice", shared=True)
            clean = prepared(scorer_of(each), pack_trees(made), threat).clean
            gradients.append(clean.gradient)
            assert clean.scores.log_prob.isfinite().all()
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("hookpoint", ["model.layers.0", "model.layers.1.self_attn"])
def test_recomputing_keeps_what_is_put_inside_of_a_block(hookpoint):
    """The hook is gone when the backward pass computes the block's activations again."""
    made = [question([([5, 6, 7, 8, 9], 2), ([5, 6, 7, 11], 1)], gold=[True, False])]
    plain = network("llama")
    model = copy.deepcopy(plain)
    for block in blocks(model, ""):
        recompute(block)
    attacked = []
    for each in (plain, model):
        with frozen(each), unchanged(each):
            pack, threat = pack_trees(made), ThreatModel("choice", shared=True)
            batch = prepared(scorer_of(each, hookpoint), pack, threat)
            attacked.append(batch.attack(Attack("bim", 0.3, steps=3)).x)
    assert torch.equal(*attacked)
    assert not torch.equal(attacked[0], batch.x)


def test_recomputing_keeps_less():
    """What autograd saves for the backward pass is a block's input, not its activations."""
    made = [question([([*range(2, 40)], 2), ([*range(2, 39), 5], 1)])]

    def saved(model):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with frozen(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            scorer, made_pack, threat = scorer_of(model), pack_trees(made), ThreatModel(shared=True)
            clean = clean_pass(scorer, made_pack, threat, Needs())
            AttackedBatch(scorer, made_pack, threat, clean).loss(clean.x.requires_grad_())
        return sum(sizes)

    plain = network("llama")
    model = copy.deepcopy(plain)
    for block in blocks(model, "gradient_checkpointing"):
        recompute(block)
    assert saved(model) < saved(plain) / 2
