"""A prefix that no attack moves is computed once, with the numbers of whole rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ARCHITECTURES, CPU, exact, longest_tree_of, network, scorer_of

from llm_attack.attacks import Attack
from llm_attack.lm.engine.diagnostics import Diagnostics
from llm_attack.lm.engine.engine import BUDGET, Engine, Layout
from llm_attack.lm.engine.hookpoints import scorers
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.packing.prefix import groups, space, start
from llm_attack.lm.packing.questions import Question, Request

EXAMPLES = tuple(range(2, 22))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """So that few questions are worth a batch of their own."""
    monkeypatch.setitem(BUDGET, "cpu", 90)


def asked(gold=True, n=6, examples=EXAMPLES):
    """Questions of three choices behind the same examples; what each has for itself differs."""
    draw = np.random.default_rng(0)
    found = []
    for i in range(n):
        stem = (*draw.integers(2, 60, 3 + i % 3).tolist(),)
        ends = [(*draw.integers(2, 60, 1 + (i + j) % 3).tolist(),) for j in range(3)]
        requests = [
            Request((*examples, *stem, *end), len(end), len(stem) + len(end)) for end in ends
        ]
        found.append(Question(requests, [[0], [1], [2]], [True, False, False] if gold else []))
    return found


ATTACKS = [
    Attack("none"),
    Attack("random", 0.05),
    Attack("fgsm", 0.05),
    Attack("bim", 0.05, steps=3),
    Attack("pgd", 0.05, steps=2, restarts=2),
    Attack("blocks", 0.05, queries=4),
]
THREATS = {
    "own": ThreatModel(positions="question"),
    "shared": ThreatModel(shared=True, positions="question"),
    "choice": ThreatModel("choice", shared=True, positions="question"),
    "l2": ThreatModel("choice", shared=True, positions="question"),
    "continuation": ThreatModel("continuation", positions="continuation"),
}


def answers(name, attacks, threat, prefixes, *, longest_tree=0):
    """By the request's number among those of all questions; diagnostics, and the batches."""
    engine = Engine(
        scorer_of(network(name)), attacks, threat, CPU, Layout(0, longest_tree, prefixes)
    )
    made = asked(gold=threat.shared)
    with exact(), frozen(engine.scorer.model):
        batches = engine.batches(made, 100)
        parts = [part for _, part in engine.answers(batches)]
    found = [a for part in parts for a in part.answered]
    totals = [Diagnostics() for _ in attacks]
    for part in parts:
        for total, sums in zip(totals, part.diagnostics, strict=True):
            total.add(vars(sums))
    of_request = {}
    for answered in found:
        for i, request in enumerate(answered.question.requests):
            of_request[request.tokens] = [of_attack[i] for of_attack in answered.answers]
    alignments = sorted(a.alignment for a in found if a.alignment)
    return of_request, alignments, totals, batches


@pytest.mark.parametrize("longest_tree", [0, 100])
@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.sampled(4)
def test_all_attacks_find_the_same(threat, longest_tree):
    """In float64, in both layouts: answers, alignment, and what diagnostics sum."""
    attacks = ATTACKS
    if threat == "l2":
        attacks = [
            Attack(a.name, a.epsilon, "l2", per_token=True, steps=2, queries=4) for a in ATTACKS
        ]
    how = {"longest_tree": longest_tree}
    whole = answers("llama", attacks, THREATS[threat], False, **how)
    behind = answers("llama", attacks, THREATS[threat], True, **how)
    assert {b.prefix for b in whole[3]} == {0}
    assert all(b.prefix >= len(EXAMPLES) for b in behind[3])
    assert whole[0].keys() == behind[0].keys()
    for key, of_attacks in whole[0].items():
        expected, found = zip(*of_attacks, strict=True), zip(*behind[0][key], strict=True)
        for some, others in zip(expected, found, strict=True):
            assert list(some) == pytest.approx(list(others), rel=1e-9)
    for some, others in zip(whole[1], behind[1], strict=True):
        assert some == pytest.approx(others, rel=1e-7, nan_ok=True)
    for some, others in zip(whole[2], behind[2], strict=True):
        assert vars(some) == pytest.approx(vars(others), rel=1e-9)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.sampled(3)
def test_of_every_architecture(name, caplog):
    """The same answers, or a line that says why each question computes its own."""
    attacks, threat = [Attack("none"), Attack("fgsm", 0.01)], THREATS["shared"]
    how = {"longest_tree": longest_tree_of(name)}
    whole, *_ = answers(name, attacks, threat, False, **how)
    behind, _, _, batches = answers(name, attacks, threat, True, **how)
    for key, of_attacks in whole.items():
        assert [v for v, _ in of_attacks] == pytest.approx([v for v, _ in behind[key]], rel=1e-8)
    assert any(b.prefix for b in batches) != ("prefix: computed for each" in caplog.text)


def test_memory_and_work_are_those_of_what_is_behind():
    """Tokens that the model reads: the examples once for all batches."""
    read = []
    model = network("llama")
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda module, args: read.append(args[0].shape[1])
    )
    with handle:
        _, _, _, batches = answers("llama", ATTACKS[:1], THREATS["own"], True)
    assert len(batches) > 1
    # the trial: the examples, what is behind them, the same at once; then no row has the examples
    assert [length >= len(EXAMPLES) for length in read[:3]] == [True, False, True]
    assert max(read[3:]) < len(EXAMPLES)


def test_clean_answers_share_all_that_is_not_scored(caplog):
    """Whatever the positions, where nothing is attacked."""
    with_positions = [answers("llama", ATTACKS[:1], ThreatModel(), on) for on in (False, True)]
    assert min(b.prefix for b in with_positions[1][3]) >= len(EXAMPLES)
    for key, ((value, greedy),) in with_positions[0][0].items():
        assert with_positions[1][0][key] == [(pytest.approx(value, rel=1e-9), greedy)]


def test_examples_that_differ(caplog):
    """The log says why nothing is shared."""
    engine = Engine(
        scorer_of(network("llama")), ATTACKS[:2], THREATS["own"], CPU, Layout(prefixes=True)
    )
    made = [Question([Request((*range(i, i + 20), 7, 8, 9), 1, 3)], [[0]]) for i in range(2, 40, 7)]
    assert {b.prefix for b in engine.batches(made, 8, 100)} == {0}
    assert "prefix: computed for each question, because few questions share" in caplog.text


def test_two_sets_of_examples():
    """Of two tasks, say: each question is computed behind its own."""
    found = []
    for prefixes in (False, True):
        engine = Engine(
            scorer_of(network("llama")), ATTACKS[:3], THREATS["own"], CPU, Layout(prefixes=prefixes)
        )
        made = asked() + asked(examples=EXAMPLES[::-1])
        with exact(), frozen(engine.scorer.model):
            batches = engine.batches(made, 100)
            parts = [a for _, part in engine.answers(batches) for a in part.answered]
        if prefixes:
            starts = {b.questions[0].requests[0].tokens[: b.prefix] for b in batches}
            assert len(starts) == 2
        parts.sort(key=lambda a: a.question.requests[0].tokens)
        found.append([value for a in parts for of in a.answers for value, _ in of])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_rows_behind_a_prefix_take_less_space():
    """An eighth of the prefix counts, so that more of them are a batch."""
    assert (space(100, 80), space(100, 0)) == (30, 100)
    *_, whole = answers("llama", ATTACKS[:2], THREATS["own"], False)
    *_, behind = answers("llama", ATTACKS[:2], THREATS["own"], True)
    assert len(behind) < len(whole) / 2


def test_several_hookpoints_behind_a_prefix():
    """One pass for the embedding and a block, and forwards that start at the block."""
    threat, attacks = THREATS["choice"], [Attack("none"), Attack("fgsm", 0.05), Attack("bim", 0.05)]
    found = []
    for prefixes in (False, True):
        with exact():
            many = scorers(scorer_of(network("llama")), [None, "model.layers.0"], CPU)
            assert many[1].skip is not None
            places = [many[0], many[0], many[1]]
            engine = Engine(many[0], attacks, threat, CPU, Layout(0, 100, prefixes), places)
            with frozen(many[0].model):
                batches = engine.batches(asked(), 100)
                parts = [a for _, part in engine.answers(batches) for a in part.answered]
        assert any(b.prefix for b in batches) == prefixes
        parts.sort(key=lambda a: a.question.requests[0].tokens)
        found.append([value for a in parts for of in a.answers for value, _ in of])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_start():
    ends = [Request((1, 2, 3, 4, 5, 6), 2, 3), Request((1, 2, 3, 4, 7), 1, 2)]
    question = Question(ends, [[0], [1]])
    assert start(question, None) == (1, 2, 3)  # the token before a continuation predicts it
    assert start(question, "question") == (1, 2, 3)
    assert start(question, "continuation") == (1, 2, 3)
    assert start(question, "2:") == (1, 2)
    assert start(question, "all") == ()
    assert start(Question(ends[:1], [[0]]), "question") == (1, 2, 3)


@given(st.lists(st.lists(st.integers(0, 2), max_size=6).map(tuple), max_size=12), st.integers(1, 9))
@settings(max_examples=200)
def test_groups(starts, least):
    """Each question once, behind what all of its group begin with; each group saves enough."""
    found = groups(starts, least)
    assert sorted(i for _, members in found for i in members) == list(range(len(starts)))
    for n, members in found[:-1]:
        assert len({starts[i][:n] for i in members}) == 1
        assert all(len(starts[i]) >= n for i in members)
        assert (len(members) - 1) * n >= least
    assert found[-1][0] == 0


def test_groups_take_what_saves_most():
    """Two sets of examples of which the first tokens are the same."""
    sets = [(1, 2, *[k] * 50) for k in (3, 4)]
    starts = [(*sets[i % 2], i) for i in range(20)] + [(1, 2, 9)]
    assert groups(starts, 100) == [
        (52, [*range(0, 20, 2)]),
        (52, [*range(1, 20, 2)]),
        (0, [20]),
    ]
    # also where all of them together would save enough
    assert groups(starts, 10)[:2] == groups(starts, 100)[:2]
