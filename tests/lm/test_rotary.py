"""Rotary embeddings that depend on the longest row: an answer equals that of the request by itself.

A fresh copy of the model computes the expected answers, one request at a time, without padding.
"""

import copy

import pytest
import torch
from lm_eval.api.instance import Instance
from networks import CPU, ROTARY_BY_LENGTH, THRESHOLD, network, prepared, scorer_of
from peft import PromptTuningConfig, get_peft_model

from llm_attack.attacks import Attack
from llm_attack.demo import MODEL_PATH
from llm_attack.lm.engine.engine import Engine, Layout
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.packing.pack import pack_rows
from llm_attack.lm.packing.questions import Question, Request


def copied(kind, vocabulary=48):
    return copy.deepcopy(network(kind, vocabulary)).requires_grad_(False)


@pytest.fixture(params=ROTARY_BY_LENGTH)
def kind(request):
    return request.param


@pytest.fixture
def fresh(kind):
    """fresh(): a copy of a model that has seen nothing."""
    return lambda: copied(kind)


def asked():
    """Questions whose requests have from 30 to 40 tokens to read: some on one side of the
    threshold, some on both.
    """
    words = torch.randint(2, 48, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    made = []
    for i, lengths in enumerate([(30, 31), (32, 33), (31, 36, 40), (36, 36), (33, 30), (40, 36)]):
        requests = []
        for j, n in enumerate(lengths):
            shared = words[i : i + min(lengths) - 3]
            requests.append((*shared, *[2 + 7 * j + k for k in range(n + 1 - len(shared))]))
        answers = [[10 * i + j] for j in range(len(lengths))]
        gold = [True] + [False] * (len(lengths) - 1)
        made.append(Question([Request(tokens, 3) for tokens in requests], answers, gold=gold))
    return made


def log_probs(model, x, tokens):
    """Of each token but the first; x (tokens - 1, hidden) embeds the others."""
    logits = model(inputs_embeds=x[None]).logits[0].log_softmax(-1)
    return logits[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]


def alone(fresh, request, epsilon=0.0):
    """Log-likelihood of a request that is attacked alone by FGSM."""
    model = fresh()
    x = model.get_input_embeddings()(torch.tensor(request.inputs))
    if epsilon:
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(-log_probs(model, x, request.tokens).sum(), x)
        model, x = fresh(), x.detach() + epsilon * gradient.sign()
    return float(log_probs(model, x, request.tokens)[-request.n_continuation :].sum())


def engine_of(model, *attacks, longest_tree=99):
    return Engine(scorer_of(model), attacks, ThreatModel(), CPU, Layout(longest_tree=longest_tree))


def answers(engine, questions, tokens=10_000):
    """Log-likelihoods in the order of the requests, under each attack."""
    found = {}
    with frozen(engine.scorer.model):
        for _, of_batch in engine.answers(engine.batches(questions, 99, tokens)):
            for question, of_attacks, *_ in of_batch.answered:
                for i, index in enumerate(question.answers):
                    found[index[0]] = [of_attack[i][0] for of_attack in of_attacks]
    return torch.tensor([found[i[0]] for q in questions for i in q.answers], dtype=torch.float64)


def test_neighbours_matter_to_the_model(fresh):
    """What the rule is there for: behind equal tokens, and in a model that has read a longer row,
    the first tokens of a request have other logits.
    """
    long, short = asked()[2].requests[2].inputs, asked()[3].requests[0].inputs[:THRESHOLD]
    expected = fresh()(torch.tensor([short])).logits[0]
    padded = torch.tensor([long, (*short, *[0] * (len(long) - len(short)))])
    model = fresh()
    assert (model(padded).logits[1, : len(short)] - expected).abs().max() > 0.1


@pytest.mark.parametrize("longest_tree", [99, 0])
def test_none_is_that_of_each_request_alone(kind, fresh, longest_tree):
    questions = asked()
    expected = [alone(fresh, r) for q in questions for r in q.requests]
    engine = engine_of(fresh(), Attack("none"), longest_tree=longest_tree)
    for tokens in (10_000, 1):  # all together, and a question at a time
        found = answers(engine, questions, tokens)
        assert found[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    trees = [q for b in engine.batches(questions, 99) if b.trees for q in b.questions]
    of_one_scale = [(30, 31), (36, 36)] + [(40, 36)] * ("longrope" in kind)
    lengths = {tuple(len(r.inputs) for r in q.requests) for q in trees}
    assert lengths == set(of_one_scale if longest_tree else [])


def test_virtual_tokens_count(fresh):
    """Of prompt tuning, which stand before those of a request."""
    lengths = range(THRESHOLD - 6, THRESHOLD + 2)
    words = asked()[2].requests[2].tokens
    rows = [Question([Request(words[: n + 1], 3)], [[n]]) for n in lengths]
    tuned = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(fresh(), tuned)
    alone = [answers(engine_of(copy.deepcopy(model), Attack("none")), [row]) for row in rows]
    together = answers(engine_of(model, Attack("none")), rows)
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_attacks_are_those_of_each_request_alone(fresh):
    questions, epsilon = asked(), 0.05
    expected = [alone(fresh, r, epsilon) for q in questions for r in q.requests]
    engine = engine_of(fresh(), Attack("fgsm", epsilon))
    assert answers(engine, questions)[:, 0].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("loss", ["choice", "sequence"])
def test_a_perturbation_that_choices_share(fresh, loss):
    """A question's loss is that of separate forwards where its choices have different scales."""
    questions = asked()
    threat = ThreatModel(loss, shared=True)
    pack = pack_rows(questions, shared=True, whole=loss == "sequence")
    found = prepared(scorer_of(fresh()), pack, threat).clean.gradient
    at = 0
    for question in questions:
        embed = fresh().get_input_embeddings()
        points = [embed(torch.tensor(r.inputs)).requires_grad_() for r in question.requests]
        told = [
            log_probs(fresh(), x, r.tokens) for x, r in zip(points, question.requests, strict=True)
        ]
        scores = torch.stack([x.sum() if loss == "sequence" else x[-3:].sum() for x in told])
        value = scores[1:].logsumexp(0) - scores[0] if loss == "choice" else -scores.sum()
        gradients = torch.autograd.grad(value, points)
        expected = torch.zeros(len(question.trie), found.shape[1], dtype=found.dtype)
        for path, gradient in zip(question.trie.paths, gradients, strict=True):
            expected.index_add_(0, torch.from_numpy(path), gradient)
        size = expected.abs().max()
        assert torch.allclose(found[at : at + len(expected)], expected, atol=1e-5 * size)
        at += len(expected)


@pytest.mark.sampled(3)
def test_prompts_are_continued_as_each_alone(kind, make):
    """Also those that grow over the threshold, beside longer ones and behind them."""
    words = ("the bird sat on the old tree and sang to a small red boat " * 4).split()
    options = {"until": ["\n\n"], "max_gen_toks": 6}
    lengths = (THRESHOLD - 12, THRESHOLD - 3, THRESHOLD + 1, THRESHOLD + 8)
    requests = [Instance("generate_until", {}, (" ".join(words[-n:]), options), 0) for n in lengths]

    def answers_of(requests, **settings):
        settings |= {"tokenizer": str(MODEL_PATH), "max_length": 64}
        lm = make(pretrained=copied(kind, 452), **settings)
        return lm, lm.generate_until(requests, disable_tqdm=True)

    lm, found = answers_of(requests, attack="none")
    for request, length, text in zip(requests, lengths, found, strict=True):
        ids = torch.tensor([lm.tok_encode(request.args[0])])
        assert ids.shape[1] == length
        alone = copied(kind, 452).generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert lm.tok_decode(alone[0, length:], skip_special_tokens=True) == text
    _, attacked = answers_of(requests, attack="fgsm", epsilon=0.5)
    assert attacked != found
    _, one_by_one = answers_of(requests, attack="fgsm", epsilon=0.5, batch_size=1)
    assert attacked == one_by_one


def test_nothing_is_left_behind(fresh):
    """Neither by what a model has read before, nor in it by an attack."""
    questions = asked()
    model = fresh()
    attacks = Attack("none"), Attack("fgsm", 0.05)
    expected = answers(engine_of(fresh(), *attacks), questions)
    model(torch.tensor([asked()[2].requests[2].inputs * 2]))
    before = {name: b.clone() for name, b in model.named_buffers()}
    state = [dict(vars(m)) for m in model.modules()]
    found = answers(engine_of(model, *attacks), questions)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    assert [vars(m) for m in model.modules()] == state
    assert all(torch.equal(before[name], b) for name, b in model.named_buffers())
