"""A battery gives each question the result of its attacks one after the other."""

import functools

import pytest
import torch
from networks import CPU, exact, network, scorer_of
from test_prefix import asked

from llm_attack.attacks import Attack
from llm_attack.attacks.settings import BATTERIES, Kind
from llm_attack.lm.engine.engine import Engine, Layout
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.network.hook import frozen

THREAT = ThreatModel("margin", shared=True)
MEMBERS = (
    ("apgdt", {"steps": 5, "step_size": None, "restarts": 1}),
    ("fmn", {"steps": 6, "step_size": None}),
    ("blocks", {"queries": 9}),
)
EPSILONS = {"linf": (0.1, 0.4), "l2_token": (0.4, 1.6)}
BALLS = {"linf": {"norm": "linf"}, "l2_token": {"norm": "l2", "per_token": True}}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    kind = Kind(gradient=True, targeted=True, adaptive=True, search=True, members=MEMBERS)
    monkeypatch.setitem(BATTERIES, "short", kind)


def answered(attacks, questions, longest_tree):
    """By the number of the question, and the batches of each call of `Engine.pack`."""
    layout = Layout(longest_tree=longest_tree)
    engine = Engine(scorer_of(network("llama")), attacks, THREAT, CPU, layout)
    packed, pack = [], engine.pack
    engine.pack = lambda batch: packed.append(batch) or pack(batch)
    with exact(), frozen(engine.scorer.model):
        parts = [part for _, part in engine.answers(engine.batches(questions, 100))]
    found = {questions.index(a.question): a for part in parts for a in part.answered}
    return [found[i] for i in range(len(questions))], packed


def values(answers):
    return torch.tensor([value for value, _ in answers], dtype=torch.float64)


@functools.cache
def right(n):
    """Questions whose gold is the model's own answer, but for the last, which is wrong."""
    questions = asked(n=n, examples=())
    clean, _ = answered([Attack("none")], questions, 0)
    for i, (question, whole) in enumerate(zip(questions, clean, strict=True)):
        likeliest = int(values(whole.answers[0]).argmax())
        gold = (likeliest + (i + 1 == n)) % 3
        question.gold = [choice == gold for choice in range(3)]
    return questions


def gap(question, scores):
    """Above 0 where an answer is wrong."""
    gold = torch.tensor(question.gold)
    return scores[~gold].max() - scores[gold].max()


@pytest.mark.parametrize(("ball", "longest_tree"), [("linf", 0), ("l2_token", 100)])
@pytest.mark.sampled(2)
def test_the_first_attack_that_makes_a_question_wrong_counts(ball, longest_tree):
    questions, how = right(12), BALLS[ball]
    names = [name for name, _ in MEMBERS]
    by_member = {}
    for epsilon in EPSILONS[ball]:
        battery = Attack("short", epsilon, **how)
        attacks = [Attack("none"), battery, *battery.members]
        found, packed = answered(attacks, questions, longest_tree)
        for question, whole in zip(questions, found, strict=True):
            clean, kept, *alone = map(values, whole.answers)
            gaps = [gap(question, part) for part in (clean, *alone)]
            broken = [name for name, gap in zip(names, gaps[1:], strict=True) if gap > 0]
            first = None if gaps[0] > 0 else next(iter(broken), None)
            assert whole.broken_by == [None, first, None, None, None]
            by_member[first] = by_member.get(first, 0) + 1
            best = clean if gaps[0] > 0 else alone[names.index(first)] if first else None
            if best is None:  # the lowest margin, or the clean answers
                best = max((clean, *alone), key=lambda part: gap(question, part))
            torch.testing.assert_close(kept, best, rtol=0, atol=1e-9)
        # the clean pass packs all, and each attack of the battery what is left
        tried = [{questions.index(q) for q in batch.questions} for batch in packed]
        alone = [some for some in tried if 11 not in some]
        assert len(alone) == len(tried) - 1
    assert by_member.keys() >= {None, "apgdt", "fmn"}


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.sampled(2)
def test_what_is_found_does_not_depend_on_the_other_questions(ball):
    questions = right(4)
    attacks = [Attack("short", epsilon, **BALLS[ball]) for epsilon in EPSILONS[ball][1:]]
    together, _ = answered(attacks, questions, 100)
    assert {name for a in together for name in a.broken_by} > {None}
    for question, whole in zip(questions, together, strict=True):
        (alone,), _ = answered(attacks, [question], 100)
        assert alone.broken_by == whole.broken_by
        for here, there in zip(alone.answers, whole.answers, strict=True):
            torch.testing.assert_close(values(here), values(there), rtol=0, atol=1e-9)
