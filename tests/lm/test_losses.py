"""The losses that attacks raise, computed by hand."""

import math

import numpy as np
import pytest
import torch

from llm_attack.lm.engine.choices import ChoiceScores, sum_by
from llm_attack.lm.engine.clean import BatchLoss
from llm_attack.lm.engine.scoring import Scores
from llm_attack.lm.losses import LOSSES, ThreatModel
from llm_attack.lm.packing.pack import pack_rows
from llm_attack.lm.packing.questions import Question, Request

REQUEST = Request((1, 2), 1)


def question(gold, lengths=(), more=0):
    """One with `more` requests that are no choices."""
    n = len(gold) + more
    return Question([REQUEST] * n, [[i] for i in range(n)], list(gold), list(lengths))


# Requests 0, 1, 2; 3, 4 and 5, which is no choice; 6, 7.
ASKED = [
    question([False, True, False], [1.0, 2.0, 4.0]),
    question([True, False], more=1),
    question([True, True]),
]
SCORES = torch.tensor([-2.0, -6.0, -4.0, -1.0, -3.0, -99.0, -5.0, -7.0], dtype=torch.float64)


def test_sums_by_index():
    """In float64: in float32 what is small beside the sum is lost."""
    values = torch.tensor([-1000.0, 1e-5, 1.0, 1e-5])
    found = sum_by(values, torch.tensor([2, 2, 0, 2]), 4)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([1, 0, -1000 + 2e-5, 0], abs=1e-9)


def test_scores_of_choices_are_a_matrix():
    choices = ChoiceScores(ASKED)
    assert choices.matrix(SCORES).tolist() == [
        [-2.0, -3.0, -1.0],
        [-1.0, -3.0, -math.inf],
        [-5.0, -7.0, -math.inf],
    ]
    assert choices.exists.tolist() == [[True] * 3, [True, True, False], [True, True, False]]
    assert choices.gold.tolist() == [
        [False, True, False],
        [True, False, False],
        [True, True, False],
    ]
    on_meta = ChoiceScores(ASKED, "meta")
    parts = (on_meta.row, on_meta.exists, on_meta.gold, on_meta.length)
    assert all(part.is_meta for part in parts)


def test_margin_by_hand():
    """Log odds of the others against the gold; zero without others."""
    choices = ChoiceScores(ASKED)
    scores = SCORES.clone().requires_grad_()
    found = choices.margin(scores, choices.gold)
    others = math.log(math.exp(-2) + math.exp(-1))
    assert found.tolist() == pytest.approx([others + 3, -2, 0])
    (slope,) = torch.autograd.grad(found.sum(), scores)
    share = 1 / (1 + math.e)
    expected = [share, -1 / 2, (1 - share) / 4, -1, 1, 0, 0, 0]
    assert slope.tolist() == pytest.approx(expected, abs=1e-12)


def test_a_choice_out_of_reach_keeps_a_slope():
    """The least that float64 tells from nothing beside the likeliest."""
    choices = ChoiceScores([question([True, False, False])])
    scores = torch.tensor([0.0, 0.0, -1e4], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(choices.margin(scores, choices.gold).sum(), scores)
    assert slope.tolist() == pytest.approx([-1, 1, 1e-20], rel=1e-12)


def test_the_table_of_losses():
    choices = ChoiceScores(ASKED)
    assert list(LOSSES) == ["sequence", "continuation", "choice", "margin"]
    assert [kind.whole for kind in LOSSES.values()] == [True, False, False, False]
    assert [kind.gold for kind in LOSSES.values()] == [False, False, True, True]
    for name in ("sequence", "continuation"):
        assert torch.equal(LOSSES[name].value(SCORES, None), -SCORES)
    margin = choices.margin(SCORES, choices.gold)
    assert torch.equal(LOSSES["choice"].value(SCORES, choices), margin)
    assert torch.equal(LOSSES["margin"].value(SCORES, choices), choices.gap(SCORES))
    threat = ThreatModel()
    assert (threat.loss, threat.shared, threat.seed) == ("sequence", False, 0)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_gap_is_above_0_where_the_first_of_the_best_is_not_gold(scale):
    """As lm-eval judges `acc` and `acc_norm`: numpy's argmax, and any of several golds."""
    rng = np.random.default_rng(0)
    asked, values, expected = [], [], []
    for _ in range(300):
        n = int(rng.integers(1, 5))
        gold = rng.random(n) < 0.5
        gold[rng.integers(n)] = True
        lengths = rng.integers(1, 3, n).astype(float)
        # few values, so that many are equal
        scores = -scale * rng.integers(1, 3, n) * lengths
        asked.append(question(gold.tolist(), lengths.tolist()))
        values.append(scores)
        expected.append(not gold[int(np.argmax(scores / lengths))])
    gap = ChoiceScores(asked).gap(torch.tensor(np.concatenate(values)))
    assert (gap > 0).tolist() == expected
    assert 0 < sum(expected) < 300 and (gap == torch.finfo(torch.float64).tiny).any()


def test_a_gap_within_rounding_counts_as_right():
    """lm-eval adds up in float32, where it may be the other way round; of equal ones it cannot."""
    asked = Question([Request((1, 2), 1), Request((1, 3), 1)], [[0], [1]], [True, False])
    loss = BatchLoss(pack_rows([asked], shared=True), ThreatModel(loss="margin", shared=True))
    gold = torch.tensor(-10.0)
    step = 10 * torch.finfo(torch.float32).eps

    def wrong(other):
        scores = torch.stack([gold, torch.as_tensor(other)])
        return bool(loss.gap(Scores(scores, torch.ones(2, dtype=torch.bool))) > 0)

    assert not wrong(-10.0)  # the first of equal choices is the answer, and it is the gold
    assert not wrong(-10.0 + 2 * step)
    assert wrong(-10.0 + 6 * step)
