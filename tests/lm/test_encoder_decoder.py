"""Encoder-decoder models: hook, gradient, shared contexts, and answers of stock `hf`."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from encoder_decoder import (
    alone,
    asked,
    every,
    longest,
    network,
    packed,
    scorer_of,
    slope_error,
    tokenizer,
)
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from networks import CPU, VOCABULARY, exact, prepared
from unchanged import unchanged

from llm_attack.attacks import Attack
from llm_attack.harness.model import AttackedHFLM
from llm_attack.lm.engine.pair_rows import DecoderRows
from llm_attack.lm.engine.pairs import PairScorer, longest_decoder
from llm_attack.lm.losses import LOSSES, ThreatModel
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.network.pairs import PARTS, embedding_of, part_of
from llm_attack.lm.packing.pack import pack_rows

HOOKPOINTS = [None, "decoder.embed_tokens", "both"]
EPSILON = 0.05


def embedded(model, request):
    """The embeddings that each part reads."""
    tokens = (request.context, request.decoder)
    with torch.no_grad():
        return [
            embedding_of(model, part)(torch.tensor(ids))
            for part, ids in zip(PARTS, tokens, strict=True)
        ]


@every
@pytest.mark.sampled(3)
def test_the_hook_holds_what_each_part_reads(kind):
    """As `inputs_embeds` and `decoder_inputs_embeds`, moved at random; padding has no influence."""
    model = network(kind)
    with torch.no_grad(), exact(), unchanged(model):
        for hookpoint in HOOKPOINTS:
            scorer = scorer_of(kind, hookpoint)
            pack = packed(scorer)
            point = scorer.point(pack)
            noise = torch.randn(point.shape, generator=torch.Generator().manual_seed(0))
            moved = point + 0.1 * noise * pack.moves[..., None]
            found = scorer(pack, pack.scored, moved).log_prob
            for i, request in enumerate(pack.requests):
                n, ends = len(request.context), embedded(model, request)
                parts = [moved[i, :n], moved[i, n : n + len(request.decoder)]]
                clean = [point[i, :n], point[i, n : n + len(request.decoder)]]
                for hooked, part, end in zip(scorer.parts, clean, ends, strict=True):
                    assert torch.equal(part, end if hooked else torch.zeros_like(end))
                given = [
                    x if hooked else None for hooked, x in zip(scorer.parts, parts, strict=True)
                ]
                expected = alone(model, request, *given)
                assert torch.allclose(found[pack.scored.request == i], expected, atol=1e-10)


@every
@pytest.mark.sampled(9)
@pytest.mark.parametrize("hookpoint", HOOKPOINTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_is_a_finite_difference(kind, hookpoint, loss):
    for shared in {True, LOSSES[loss].gold}:
        assert slope_error(kind, hookpoint, loss, shared) < 1e-6


def fgsm(values, points, epsilon=EPSILON):
    """The points that FGSM finds, given the sum that it raises."""
    slopes = torch.autograd.grad(values, points)
    return [(x + epsilon * s.sign()).detach() for x, s in zip(points, slopes, strict=True)]


def attacked(kind, hookpoint, threat):
    """Log-likelihoods of the requests under FGSM, and the requests by question."""
    scorer = scorer_of(kind, hookpoint)
    pack = pack_rows(asked(scorer), shared=threat.shared, whole=LOSSES[threat.loss].whole)
    batch = prepared(scorer, pack, threat)
    found = batch.answers(batch.attack(Attack("fgsm", EPSILON)).x).log_prob
    sums = torch.zeros(len(pack.requests), dtype=found.dtype)
    return sums.index_add(0, pack.scored.request, found), pack.questions


@every
@pytest.mark.sampled(6)
@pytest.mark.parametrize("hookpoint", HOOKPOINTS)
def test_each_request_is_attacked_alone(kind, hookpoint):
    model = network(kind)
    with exact(), frozen(model):
        found, questions = attacked(kind, hookpoint, ThreatModel())
        hooked = scorer_of(kind, hookpoint).parts
        expected = []
        for request in (r for q in questions for r in q.requests):
            ends = embedded(model, request)
            points = [x.requires_grad_() for x, here in zip(ends, hooked, strict=True) if here]
            given = [x if here else None for x, here in zip(ends, hooked, strict=True)]
            moved = iter(fgsm(-alone(model, request, *given).sum(), points))
            given = [next(moved) if here else None for here in hooked]
            expected.append(alone(model, request, *given).sum().detach())
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-9)


@every
@pytest.mark.sampled(4)
@pytest.mark.parametrize("hookpoint", [None, "both"])
@pytest.mark.parametrize("loss", ["choice", "continuation"])
def test_a_perturbation_that_choices_share(kind, hookpoint, loss):
    """The naive form: a vector for each (token, tokens before it), of the encoder and the decoder;
    a decoder's token is shared only behind the same context.
    """
    model = network(kind)
    with exact(), frozen(model):
        found, questions = attacked(kind, hookpoint, ThreatModel(loss, shared=True))
        expected = []
        for question in questions:
            nodes = {}
            for request in question.requests:
                for part, (ids, rows) in enumerate(
                    zip((request.context, request.decoder), embedded(model, request), strict=True)
                ):
                    before = (part, request.context if part else ())
                    for i, row in enumerate(rows):
                        nodes.setdefault((before, ids[: i + 1]), row.clone().requires_grad_())

            def scores(at, question=question):
                of_requests = []
                for request in question.requests:
                    context, decoder = request.context, request.decoder
                    encoder = torch.stack(
                        [at[(0, ()), context[: i + 1]] for i in range(len(context))]
                    )
                    second = None
                    if hookpoint == "both":
                        second = torch.stack(
                            [at[(1, context), decoder[: i + 1]] for i in range(len(decoder))]
                        )
                    of_requests.append(alone(model, request, encoder, second).sum())
                return torch.stack(of_requests)

            values = scores(nodes)
            if loss == "continuation":
                value = -values.sum()
            else:
                value = values[1:].logsumexp(0) - values[0] if len(values) > 1 else None
            if value is not None:
                keys = [key for key in nodes if hookpoint == "both" or key[0][0] == 0]
                moved = fgsm(value, [nodes[key] for key in keys])
                nodes |= dict(zip(keys, moved, strict=True))
            expected.append(scores(nodes).detach())
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-9)


def test_one_row_for_a_context():
    """Of each part, for all choices that share the perturbation; else of each choice."""
    scorer, rows = scorer_of("t5"), []
    handles = [
        part_of(scorer.model, part).register_forward_hook(
            lambda module, args, output: rows.append(len(output.last_hidden_state))
        )
        for part in PARTS
    ]
    try:
        with torch.no_grad():
            for shared, expected in ((True, 4), (False, 5)):
                pack = packed(scorer, shared)
                point = scorer.point(pack)
                rows.clear()
                scorer(pack, pack.scored, point)
                assert rows == [expected, expected]
                rows.clear()
                scorer(pack, pack.scored)
                assert rows == [4, 4]
            scorer.longest_decoder = 5  # the choices of the first question have six tokens
            scorer(pack, pack.scored)
            assert rows[-2:] == [4, 5]
    finally:
        for handle in handles:
            handle.remove()


THREATS = [ThreatModel("choice", shared=True), ThreatModel("continuation", shared=True)]


@every
@pytest.mark.sampled(9)
@pytest.mark.parametrize("hookpoint", HOOKPOINTS)
def test_choices_in_one_row_of_the_decoder(kind, hookpoint):
    """Scores, gradient and attacked scores are those of a row for each."""
    assert longest(kind) > 0
    found = []
    with exact(), frozen(network(kind)):
        for joined in (False, True):
            scorer, values = scorer_of(kind, hookpoint, joined), []
            for threat in (*THREATS, ThreatModel()):
                pack = packed(scorer, threat.shared, threat.loss)
                batch = prepared(scorer, pack, threat)
                moved = batch.attack(Attack("bim", EPSILON, steps=2)).x
                values += [batch.clean.scores.log_prob, batch.clean.gradient, moved]
                values += [batch.answers(moved).log_prob]
            found.append(values)
    for rows, joined in zip(*found, strict=True):
        torch.testing.assert_close(joined, rows, rtol=0, atol=1e-10)


def test_positions_that_the_decoder_counts(monkeypatch, caplog):
    """Along a whole row: the trial notices, so each request has a row."""
    monkeypatch.setattr(DecoderRows, "positions", lambda rows, output: output)
    for kind, expected in (("bart", 0), ("t5", sys.maxsize)):  # T5 knows distances only
        with frozen(network(kind)):
            assert longest_decoder(PairScorer(network(kind), None), CPU) == expected
    assert "decoder: a row for each request, because shared rows give other" in caplog.text


def test_a_start_token_that_is_the_pad_token():
    """Its position is that of padding, and the positions behind it begin again in the same way."""
    model = copy.deepcopy(network("m2m_100"))
    model.config.decoder_start_token_id = model.config.pad_token_id
    with frozen(model):
        assert longest_decoder(PairScorer(model, None), CPU) == longest("m2m_100")


def test_parts_of_a_large_question_are_the_whole():
    scorer = scorer_of("bart", "both")  # which computes all in float64
    with frozen(scorer.model):
        found = []
        for limit in (10**6, 20, 1):
            pack = replace(packed(scorer, shared=True, loss="choice"), limit=limit)
            clean = prepared(scorer, pack, ThreatModel("choice", shared=True)).clean
            found.append((clean.scores.log_prob, clean.gradient))
    for parts in found[1:]:
        for part, whole in zip(parts, found[0], strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-10)


def requests_of(pairs):
    made = []
    for doc, choices in enumerate(pairs):
        for i, pair in enumerate(choices):
            request = Instance("loglikelihood", {}, pair, i)
            request.task_name, request.doc_id = "made up", doc
            made.append(request)
    return made


WORDS = [f"w{i}" for i in range(3, VOCABULARY)]
TEXTS = [
    [(" ".join(WORDS[i : i + 9]), " " + " ".join(WORDS[30 + n : 31 + 2 * n])) for n in range(3)]
    for i in (0, 7, 20)
] + [[("", " w5 w6")], [("w5 w6 ", "w7"), ("w5 w8 ", "w7")], [(" ".join(WORDS), " w4")]]


@every
@pytest.mark.sampled(3)
def test_none_equals_stock(kind):
    """Also where the context is cut. Stock has no padding here: what it pads with is a token to the
    decoder of mBART, and makes texts longer.
    """
    options = {"tokenizer": tokenizer(), "device": "cpu", "softmax_dtype": "float64"}
    options |= {"max_length": 24, "batch_size": 1}
    model = network(kind)
    stock = HFLM(pretrained=model, backend="seq2seq", **options)
    expected = stock.loglikelihood(requests_of(TEXTS), disable_tqdm=True)
    options["batch_size"] = 4
    ours = AttackedHFLM(pretrained=model, attack="none", **options)
    found = ours.loglikelihood(requests_of(TEXTS), disable_tqdm=True)
    # T5 of transformers 4 computes its attention's softmax in float32, whatever the dtype
    close = {"abs": 1e-6, "rel": 1e-6}
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in expected], **close)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    texts = [Instance("loglikelihood_rolling", {}, (" ".join(WORDS[:40]),), 0)]
    found, expected = (lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in (ours, stock))
    assert found == pytest.approx(expected, **close)
    found, expected = (lm.generate_until(prompts("w9"), disable_tqdm=True) for lm in (ours, stock))
    assert found == expected


PROMPTS = ["w5 w6", "w20 w21 w40 w5 w6 w7 w8"]  # of different lengths


def prompts(*until):
    how = {"until": [*until], "max_gen_toks": 4}
    return [Instance("generate_until", {}, (text, how), 0, ("made up", 0, 1)) for text in PROMPTS]


def test_a_text_begins_with_the_start_token():
    """Not with the padding of its prompt."""
    model = network("bart")
    lm = AttackedHFLM(model, attack="none", tokenizer=tokenizer(), device="cpu", max_length=24)
    context = torch.tensor([[0, 0, 5], [5, 6, 7]])
    texts = lm._model_generate(context, 6, ["</s>"], attention_mask=context.ne(0).long())
    assert texts[:, 0].tolist() == [model.config.decoder_start_token_id] * 2


@every
@pytest.mark.sampled(12)
def test_texts_of_attacked_prompts(kind):
    """The attack lowers the likelihood of the text that the model writes without it."""
    model = network(kind)
    options = {"tokenizer": tokenizer(), "device": "cpu", "softmax_dtype": "float64"}
    lm = AttackedHFLM(model, attack="fgsm", epsilon=0.5, max_length=24, batch_size=4, **options)
    expected, elements = [], 0
    with exact(), frozen(model):
        found = lm.generate_until(prompts(), disable_tqdm=True)
        for text in PROMPTS:
            ids = torch.tensor([lm.tok_encode(text)])
            how = {"max_length": ids.shape[1] + 4, "do_sample": False}
            clean = model.generate(ids, **how)[0]
            x = embedding_of(model)(ids).detach().requires_grad_()
            logits = model(inputs_embeds=x, decoder_input_ids=clean[None, :-1]).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, clean[1:], reduction="sum")
            (moved,) = fgsm(loss, [x], 0.5)
            moved = model.generate(inputs_embeds=moved, **how)[0]
            expected.append(tokenizer().decode(moved, skip_special_tokens=True))
            elements += x.numel()
    assert found == expected
    assert lm.diagnostics[0].elements == elements
