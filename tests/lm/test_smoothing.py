"""Votes under noise: on a linear model, where the certified radius has a closed form."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from scipy.stats import binom
from torch import nn

from llm_attack.attacks import Attack
from llm_attack.attacks.draws import normal, rehashed
from llm_attack.lm.engine.attacked import AttackedBatch
from llm_attack.lm.engine.clean import Needs, clean_pass
from llm_attack.lm.engine.engine import Engine, Layout
from llm_attack.lm.engine.scoring import Scorer
from llm_attack.lm.engine.smoothing import CERTIFYING, SELECTION, votes
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.packing.pack import pack_rows
from llm_attack.lm.packing.questions import Question, Request
from llm_attack.lm.smoothing import Smoothing
from llm_attack.lm.units import Epsilon, Signal
from llm_attack.stats import least_share
from llm_attack.suite.analysis.certified import radius

WIDTH, VOCABULARY = 6, 16


class Sum(nn.Module):
    """Logits are a linear function of the sum of the embeddings so far.

    Of two choices with one token each, the difference of log-probabilities is then linear in the
    embeddings of the context, with the same weights for each of its tokens.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.float64)
        self.config, self.dtype = SimpleNamespace(), torch.float64

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.head(self.embed(input_ids).cumsum(1)))


MODEL = Sum().requires_grad_(False)
CONTEXTS = [(5, 6, 7), (5, 6, 7, 8, 9), (4,), (9, 9, 9, 9)]
CHOICES = [(1, 2), (3, 1), (2, 3), (2, 1)]


def asked(context, choices):
    """The question whose right choice is the one that the model prefers."""
    found = margin(context, choices)
    requests = [Request((*context, choice), 1) for choice in choices]
    return Question(requests, [[0], [1]], [found > 0, found < 0])


def margin(context, choices):
    """Score of the first choice minus that of the second."""
    first, second = MODEL.head.weight[list(choices)]
    return float((first - second) @ MODEL.embed.weight[list(context)].sum(0))


def distance(context, choices, moving):
    """The exact L2 distance to the boundary if `moving` tokens of the context move together."""
    first, second = MODEL.head.weight[list(choices)]
    return abs(margin(context, choices)) / float((first - second).norm()) / moving**0.5


def batch_of(positions="all", **needs):
    threat = ThreatModel("margin", shared=True, positions=positions)
    questions = [asked(*of) for of in zip(CONTEXTS, CHOICES, strict=True)]
    pack = pack_rows(questions, shared=True, positions=positions)
    scorer = Scorer(MODEL, MODEL.embed, softmax_dtype=torch.float64)
    return AttackedBatch(scorer, pack, threat, clean_pass(scorer, pack, threat, Needs(**needs)))


def smoothing(*sigmas, selection=10, draws=400):
    return Smoothing(tuple(Epsilon(s, "absolute") for s in sigmas), selection, draws)


# Tokens of each context that move.
MOVING = {"all": [3, 5, 1, 4], "not_first": [2, 4, 0, 3], "0:2": [2, 2, 1, 2]}


@pytest.mark.parametrize("positions", MOVING)
@pytest.mark.sampled(3)
def test_the_radius_of_a_linear_margin_is_its_distance(positions):
    """p = Φ(d / sigma): of all tokens that move together, each of which counts once."""
    n, sigmas = 400, (1.0, 3.0)
    batch = batch_of(positions)
    counts = votes(batch, smoothing(*sigmas, selection=1, draws=n))[:, :, CERTIFYING]
    assert (counts.sum(-1) == n).all()
    for i, moving in enumerate(MOVING[positions]):
        right = torch.tensor(batch.pack.questions[i].gold)
        hits = counts[i][:, right].flatten().tolist()
        if not moving:
            assert hits == [n, n]
            continue
        exact = distance(CONTEXTS[i], CHOICES[i], moving)
        for sigma, of_sigma in zip(sigmas, hits, strict=True):
            share = ndtr(exact / sigma)
            low, high = binom.ppf([1e-5, 1 - 1e-5], n, share)
            assert low <= of_sigma <= high
            assert radius(low / n, sigma) <= exact <= radius(min(1, (high + 1) / n), sigma)
            assert radius(least_share(of_sigma, n, 1e-3), sigma) <= exact


def test_critical_searches_in_the_ball_of_the_certificate():
    """One ball for a question: the smallest length in L2 is the distance that noise measures."""
    batch = batch_of(answers=True, gradient=True)
    exact = [distance(c, o, len(c)) for c, o in zip(CONTEXTS, CHOICES, strict=True)]
    attack = Attack("critical", 2 * max(exact), norm="l2", steps=5, rounds=20)
    found = batch.ball(attack).length(batch.attack(attack).x - batch.x)
    assert found.tolist() == pytest.approx(exact, rel=3e-3)
    for sigma in (0.5, 2.0):
        counts = votes(batch, smoothing(sigma))[:, 0, CERTIFYING]
        lower = least_share(counts.amax(-1), counts.sum(-1), 1e-3)
        assert (radius(lower, sigma) <= found.numpy() * (1 + 1e-6)).all()


def test_votes_by_hand():
    """Draw by draw from the keys of the tokens; the first ones select."""
    batch, sigmas = batch_of(), (0.7, 4.0)
    counts = votes(batch, smoothing(*sigmas, selection=3, draws=5))
    keys, expected = batch.keys, np.zeros((4, 2, 2, 2), int)
    of_question = batch.examples.index
    for draw in range(8):
        keys = rehashed(keys)
        noise = normal(keys, batch.x)
        for i, choices in enumerate(CHOICES):
            for k, sigma in enumerate(sigmas):
                total = (batch.x + sigma * noise)[of_question == i].sum(0)
                first, second = MODEL.head.weight[list(choices)] @ total
                part = SELECTION if draw < 3 else CERTIFYING
                expected[i, k, part, int(second > first)] += 1
    assert counts.tolist() == expected.tolist()
    assert len({tuple(keys.tolist()), tuple(batch.keys.tolist())}) == 2


def test_the_sigma_is_of_a_coordinate():
    """In every unit the standard deviation of one coordinate, as of `gaussian` in linf."""
    signal = Signal(rms=0.5, width=16, token_norm=3.0)
    given = Smoothing((Epsilon(0.4, "rms"), Epsilon(2.0, "token_norm"), Epsilon(0.1, None)), 1, 2)
    sizes = [sigma.number for sigma in given.resolved(signal).sigmas]
    assert sizes == pytest.approx([0.2, 2 * 3 / 4, 0.1])
    assert given.resolved(signal).total == 3


@pytest.fixture(scope="module")
def of_the_demo(exact, build):
    """Counts of the bundled model by layout: (trees, rows of a batch)."""
    from llm_attack.harness.requests import encode, questions_of

    lm = exact(loss="margin", attack="none")
    task = build("demo_arc_easy", 3)
    questions = questions_of(task.instances, encode(lm, task.instances), lm.settings)
    found = {}
    for trees, rows in ((10**9, 100), (10**9, 1), (0, 5)):
        layout = Layout(longest_tree=trees)
        threat = lm.settings.threat
        noise = smoothing(0.02, 0.05, selection=2, draws=6)
        engine = Engine(
            lm.engine.scorer, [Attack("none")], threat, lm.device, layout, smoothing=noise
        )
        found[trees, rows] = {
            tuple(answered.question.answers[0]): answered.votes
            for _, result in engine.answers(engine.batches(questions, rows))
            for answered in result.answered
        }
    return found


def test_votes_do_not_depend_on_the_batch(of_the_demo):
    first, *others = of_the_demo.values()
    assert len(first) == 3 and all(other == first for other in others)
    # votes differ, so equal ones say something
    assert any(max(part) < 6 for sigmas in first.values() for _, part in sigmas)


def test_every_draw_is_a_vote_for_a_choice(of_the_demo):
    for of_question in of_the_demo[10**9, 1].values():
        assert len(of_question) == 2
        for selection, certifying in of_question:
            assert (sum(selection), sum(certifying)) == (2, 6)
            assert len(selection) == len(certifying) in (3, 4, 5)
