"""Attacks that choose tokens, on the bundled model: passes, exhaustive swaps, and their answers."""

from dataclasses import replace
from itertools import combinations
from math import ceil

import pytest
import torch
from test_passes import counted, packed, recorded
from test_smoothing import CHOICES, CONTEXTS, MODEL, batch_of, margin

from llm_attack.attacks import Attack, Elements, perturb
from llm_attack.base.errors import UsageError
from llm_attack.harness.requests import encode, questions_of
from llm_attack.lm.engine.clean import Needs
from llm_attack.lm.engine.engine import Engine
from llm_attack.lm.engine.tokens import ids_of, prompt_of, sizes_of
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.packing.pack import pack_rows, pack_trees
from llm_attack.lm.packing.questions import Question, Request
from llm_attack.lm.settings import AttackSettings
from llm_attack.suite.run.cost import Tokens, passes


def settings(attack, **more):
    return AttackSettings(attack, loss="margin", **{"steps": 3, "positions": "3:6", **more})


@pytest.fixture(scope="module")
def asked(build):
    return build("demo_arc_easy", 2).instances


def questions(lm, asked):
    return questions_of(asked, encode(lm, asked), lm.settings)


def changes(computed):
    (found,) = computed.changes
    return found


# -- passes: with so small an epsilon, or so few candidates, nothing ends early --------------------

PASSES = {
    "greedy": settings("token_sparse", epsilon=1e-9),
    "exact": settings("token_sparse", epsilon=1e-9, exact_tokens=2),
    "swap": settings("swap", positions="4:5"),
    "hotflip": settings("hotflip", candidates=5),
    "gcg": settings("gcg", candidates=4, steps=1, swaps=2),
}


@pytest.mark.parametrize("name", PASSES)
def test_passes_are_as_counted_and_as_estimated(name, reused, asked):
    lm = reused()
    lm.use(PASSES[name])
    positions, (attack,) = lm.engine.threat.positions, lm.engine.attacks
    known, n = lm.engine.scorer.vocabulary, 0
    if known is not None:
        assert len(known.allowed) == 452 - 4  # all but the special ones
        n, lm.engine.scorer.vocabulary = 9, replace(known, allowed=known.allowed[:9])
    tokens = Tokens(*sizes_of(questions(lm, asked), positions), n)
    estimated = passes([attack], 3, tokens=tokens)
    pack = packed(lm, asked)
    with frozen(lm.model), counted(lm.engine) as counts:
        computed = lm.engine.compute(pack)
    assert counts == [sum(estimated) - estimated.first, estimated.gradients]
    assert recorded(computed) == [(counts[0], counts[1])]


def test_sizes_of_questions(reused, asked):
    lm = reused()
    lm.use(settings("swap"))
    some = questions(lm, asked)
    longest = max(len(question.trie) for question in some)
    shared = max(len(q.requests[0].tokens) - 1 for q in some)
    assert sizes_of(some, "all") == (longest, shared)
    assert sizes_of(some, "3:6") == (3, 3)


def test_only_tokens_that_all_choices_share_are_swapped():
    """The choices are contexts, which part after two tokens; a third has a token behind that."""
    requests = [Request((5, 6, 7, 9), 1), Request((5, 6, 8, 7, 9), 1)]
    question = Question(requests, [[0], [1]], [True, False])
    assert len(question.trie) == 5
    assert sizes_of([question], "all") == (5, 2) and sizes_of([question], "not_first") == (4, 1)
    for pack in (pack_trees([question]), pack_rows([question], shared=True)):
        shared = prompt_of(pack)
        assert shared.sum() == 2 and sorted(ids_of(pack)[shared].tolist()) == [5, 6]


# -- swaps -----------------------------------------------------------------------------------------


def of_text(question, places):
    """The question with other tokens at some places of its prompt."""

    def written(tokens):
        return tuple(places.get(i, token) for i, token in enumerate(tokens))

    requests = [replace(r, tokens=written(r.tokens)) for r in question.requests]
    return Question(requests, [[i] for i in range(len(requests))], question.gold)


def answers(lm, some):
    """Log-likelihoods of the choices of each question, without an attack."""
    lm.use(AttackSettings("none", loss="margin"))
    with frozen(lm.model):
        results = [r for _, r in lm.engine.answers(lm.engine.batches(some, 10_000, 20_000))]
    found = {
        id(a.question): [answer[0] for answer in a.answers[0]] for r in results for a in r.answered
    }
    return [found[id(question)] for question in some]


def wrong(scores, gold):
    return not gold[scores.index(max(scores))]


@pytest.mark.slow
def test_every_swap_beside_the_model_on_other_texts(exact, asked):
    """Each swap at three places as a question of its own: the wrong ones, and the shortest."""
    lm = exact()
    lm.use(settings("swap"))
    pack, table = packed(lm, asked), lm.model.get_input_embeddings().weight.detach()
    with frozen(lm.model):
        computed = lm.engine.compute(pack)
    for question, change in zip(pack.questions, changes(computed), strict=True):
        old = question.requests[0].tokens
        swaps = [(p, t) for p in (3, 4, 5) for t in range(4, 452) if t != old[p]]
        scored = answers(lm, [of_text(question, {p: t}) for p, t in swaps])
        bad = [s for s, of in zip(swaps, scored, strict=True) if wrong(of, question.gold)]
        assert sum(change.tried) == len(swaps)
        assert [change.wrong[p] for p in range(len(old) - 1)] == [
            sum(place == p for place, _ in bad) for p in range(len(old) - 1)
        ]
        sizes = {(p, t): float((table[t] - table[old[p]]).abs().max()) for p, t in bad}
        assert bool(bad) == (change.changed is not None)
        if bad:
            ((node, before, after, _, linf),) = change.changed
            assert (node, after) == min(sizes, key=sizes.get) and before == old[node]
            assert linf == pytest.approx(min(sizes.values()), rel=1e-12)


@pytest.mark.parametrize("name", ["hotflip", "gcg"])
@pytest.mark.parametrize("packing", ["tree", "off"])
@pytest.mark.sampled(2)
def test_answers_are_those_of_the_swapped_text(name, packing, exact, asked):
    lm = exact(packing=packing)
    lm.use(settings(name, candidates=8, swaps=2) if name == "gcg" else settings(name, candidates=8))
    pack = packed(lm, asked)
    with frozen(lm.model):
        computed = lm.engine.compute(pack)
    some, found = pack.questions, changes(computed)
    assert any(change.changed for change in found)
    sizes = [sum(r.n_continuation for r in question.requests) for question in some]
    sums = computed.scores[0].log_prob.split(sizes)
    for question, change, of_tokens in zip(some, found, sums, strict=True):
        if change.changed is None:
            continue
        swapped = of_text(question, {c.node: c.new for c in change.changed})
        (expected,) = answers(lm, [swapped])
        ends = of_tokens.split([r.n_continuation for r in question.requests])
        assert [float(end.sum()) for end in ends] == pytest.approx(expected, abs=1e-6)
        assert wrong(expected, question.gold)
        for c in change.changed:
            assert question.requests[0].tokens[c.node] == c.old and 3 <= c.node < 6


def test_the_layout_does_not_matter(exact, asked):
    found = []
    for packing in ("tree", "off"):
        lm = exact(packing=packing)
        lm.use(settings("token_sparse", epsilon="0.5rms", positions="all"))
        with frozen(lm.model):
            found.append(changes(lm.engine.compute(packed(lm, asked))))
    for here, there in zip(*found, strict=True):
        assert here.tokens == there.tokens
        assert here.saliency == pytest.approx(there.saliency, rel=1e-6)
        assert [c.node for c in here.changed] == [c.node for c in there.changed]


# -- the fewest tokens -----------------------------------------------------------------------------


def prepared(lm, asked):
    with frozen(lm.model):
        (batch,) = lm.engine.prepared(packed(lm, asked), Needs(answers=True)).values()
    return batch


@pytest.mark.slow
def test_the_fewest_tokens_beside_all_sets(exact, asked):
    """Every set of up to two tokens of the bundled model's questions, by Auto-PGD on that set."""
    lm = exact()
    lm.use(settings("token_sparse", epsilon="0.3rms", positions="all", exact_tokens=2))
    with frozen(lm.model):
        found = changes(lm.engine.compute(packed(lm, asked)))
        batch, (attack,) = prepared(lm, asked), lm.engine.attacks
        smallest = [99] * len(found)
        inner = Attack("apgd", attack.epsilon, steps=attack.steps)
        most = max(len(question.trie) for question in batch.pack.questions)
        for chosen in [c for n in (1, 2) for c in combinations(range(most), n)]:
            mask = torch.zeros(batch.x.shape[:2], dtype=torch.bool)
            mask[:, list(chosen)] = True
            elements = Elements(mask & batch.mask, batch.examples)
            gap = batch.gap(perturb(inner, batch.x, batch.loss, elements=elements))
            for i, value in enumerate(gap.tolist()):
                if value > 0 and chosen[-1] < len(batch.pack.questions[i].trie):
                    smallest[i] = min(smallest[i], len(chosen))
    counts = [len(change.changed) for change in found]
    assert min(smallest) < 99
    for count, exact_count in zip(counts, smallest, strict=True):
        assert count == exact_count or (exact_count == 99 and count > 2)


def test_tokens_stay_within_epsilon(exact, asked):
    lm = exact()
    lm.use(settings("token_sparse", epsilon="0.3rms", positions="all"))
    with frozen(lm.model):
        computed = lm.engine.compute(packed(lm, asked))
    epsilon = lm.engine.attacks[0].epsilon
    for change in changes(computed):
        assert change.changed and all(c.linf <= epsilon * (1 + 1e-9) for c in change.changed)
        assert all(c.new == -1 and c.rms <= c.linf for c in change.changed)


def test_a_model_whose_margin_is_linear_in_the_embeddings():
    """Every token of a context has the same saliency, so the number of tokens is a quotient."""
    batch = batch_of(answers=True, gradient=True)
    slopes = [abs(MODEL.head.weight[a] - MODEL.head.weight[b]).sum() for a, b in CHOICES]
    margins = [abs(margin(c, o)) for c, o in zip(CONTEXTS, CHOICES, strict=True)]
    epsilon = max(m / float(s) / len(c) for m, s, c in zip(margins, slopes, CONTEXTS, strict=True))
    attack = Attack("token_sparse", epsilon * 1.01, steps=2)
    end = batch.ending(batch.attack(attack))
    found = batch.changes(attack, end.x, end.scores)
    for change, size, slope in zip(found, margins, slopes, strict=True):
        gain = attack.epsilon * float(slope)
        assert change.saliency == pytest.approx([gain] * len(change.tokens), rel=1e-12)
        assert len(change.changed) == ceil(size / gain)
        assert change.tokens[change.changed[0].node] == change.changed[0].old


def test_clean_answers_that_are_wrong_need_no_token(exact, asked):
    lm = exact()
    lm.use(settings("token_sparse", epsilon="0.3rms"), settings("hotflip", candidates=3))
    pack = packed(lm, asked)
    for question in pack.questions:
        right = question.gold.index(True)
        question.gold[:] = [i != right for i in range(len(question.gold))]
        question.gold[right - 1] = False  # the likeliest choice is wrong from the start
    with frozen(lm.model):
        computed = lm.engine.compute(pack)
    for of_attack in computed.changes:
        assert [change.changed for change in of_attack] == [[], []]


# -- settings --------------------------------------------------------------------------------------


def test_settings_that_have_no_meaning_are_refused(reused):
    with pytest.raises(UsageError, match=r"attack=swap: looks for tokens .* loss=sequence"):
        AttackSettings("swap")
    with pytest.raises(UsageError, match=r"epsilon=0\.5: must be left out with attack=gcg"):
        settings("gcg", epsilon=0.5)
    with pytest.raises(UsageError, match="norm=l2: must be linf or l2_token with"):
        settings("token_sparse", norm="l2")
    with pytest.raises(UsageError, match=r"hookpoint=model\.layers\.1: must be left out with"):
        settings("hotflip", hookpoint="model.layers.1")
    assert isinstance(reused().engine, Engine)


def test_swaps_without_tokens_are_refused(make, monkeypatch):
    lm = make()
    monkeypatch.setattr(type(lm.tokenizer), "get_vocab", lambda self: {"<pad>": 3})
    with pytest.raises(UsageError, match="tokenizer: must have tokens that are not special"):
        lm.use(settings("swap"))
