"""Perturbations that were found before: a closed form, sums by hand, and the signs of controls."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_smoothing import CHOICES, CONTEXTS, VOCABULARY, Sum, asked

from llm_attack.attacks import Attack, perturb
from llm_attack.attacks.settings import FIXED, KEPT, RANDOM, SHUFFLED
from llm_attack.lm.engine.engine import Engine, Layout
from llm_attack.lm.engine.fixed import Universal, row_of, with_signs
from llm_attack.lm.engine.moving import moving
from llm_attack.lm.engine.scoring import Scorer
from llm_attack.lm.engine.universal import MeanLoss, fit
from llm_attack.lm.fixed import ALL, POSITION, SHARES, TOKEN
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.packing.questions import Question, Request

EPSILON = 0.3


class Masked(Sum):
    """The same model, which also reads trees: it sums what the mask shows."""

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        if attention_mask is None:
            return super().forward(input_ids)
        seen = (attention_mask[:, 0] == 0).to(self.dtype)
        return SimpleNamespace(logits=self.head(seen @ self.embed(input_ids)))


MODEL = Masked().requires_grad_(False)


def engine_of(trees, positions="all", attacks=(), **more):
    threat = ThreatModel("margin", shared=True, positions=positions)
    scorer = Scorer(MODEL, MODEL.embed, softmax_dtype=torch.float64)
    layout = Layout(longest_tree=10**9 if trees else 0)
    return Engine(scorer, list(attacks), threat, torch.device("cpu"), layout, **more)


def fitted(attack, share, trees=True, positions="all", rows=100):
    engine = engine_of(trees, positions)
    questions = [asked(*pair) for pair in zip(CONTEXTS, CHOICES, strict=True)]
    loss = MeanLoss(engine, engine.batches(questions, rows), share, VOCABULARY)
    return fit(attack, loss, 0, lambda _: None)


def slopes(share, start=0):
    """The gradient of the mean margin: each token moves it by the difference of two weights."""
    n = {TOKEN: VOCABULARY, POSITION: max(map(len, CONTEXTS)), ALL: 1}[share]
    gradient = torch.zeros(n, MODEL.head.weight.shape[1], dtype=torch.float64)
    for context, choices in zip(CONTEXTS, CHOICES, strict=True):
        question = asked(context, choices)
        pair = choices if question.gold[1] else choices[::-1]  # the wrong choice first
        step = MODEL.head.weight[pair[0]] - MODEL.head.weight[pair[1]]
        for position, token in enumerate(context[start:], start):
            gradient[{TOKEN: token, POSITION: position, ALL: 0}[share]] += step / len(CONTEXTS)
    return gradient


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("attack", ["fgsm", "bim", "apgd"])
def test_the_best_of_a_linear_margin_is_the_sign_of_the_mean_gradient(attack, share):
    """In L-infinity it is exact, and the mean loss rises by epsilon times the L1 norm."""
    found = fitted(Attack(attack, EPSILON), share)
    gradient = slopes(share)
    assert torch.equal(found.table, EPSILON * gradient.sign())
    gained = EPSILON * float(gradient.abs().sum())
    assert found.after - found.before == pytest.approx(gained, rel=1e-12)
    assert found.seen.tolist() == (gradient != 0).any(1).tolist()


def test_each_row_has_its_own_ball_in_l2():
    found = fitted(Attack("bim", EPSILON, norm="l2", per_token=True, steps=40), TOKEN)
    gradient = slopes(TOKEN)
    expected = EPSILON * torch.nn.functional.normalize(gradient, dim=1)
    torch.testing.assert_close(found.table, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("trees", "rows"), [(True, 1), (False, 100), (False, 2)])
def test_the_batches_do_not_matter(trees, rows):
    attack = Attack("apgd", EPSILON, steps=3)
    one, other = fitted(attack, TOKEN), fitted(attack, TOKEN, trees, rows=rows)
    assert torch.equal(one.table, other.table) and one.after == pytest.approx(other.after)


def test_positions_that_may_not_move_are_not_fitted():
    found = fitted(Attack("fgsm", EPSILON), TOKEN, positions="not_first")
    assert torch.equal(found.table, EPSILON * slopes(TOKEN, 1).sign())


@pytest.mark.parametrize("trees", [True, False])
@pytest.mark.parametrize("share", SHARES)
def test_a_run_adds_the_row_of_each_token(share, trees):
    """The answers are those of the sum of embeddings and rows, computed by hand."""
    torch.manual_seed(5)
    n = {TOKEN: VOCABULARY, POSITION: 2, ALL: 1}[share]  # later positions stay as they are
    table = torch.randn(n, MODEL.head.weight.shape[1], dtype=torch.float64)
    attack, fixed = Attack("fixed", 1.0), Universal(table, share)
    engine = engine_of(trees, attacks=[Attack("none"), attack], fixed=fixed)
    questions = [asked(*pair) for pair in zip(CONTEXTS, CHOICES, strict=True)]
    for i, question in enumerate(questions):
        question.answers = [[2 * i], [2 * i + 1]]
    found = {}
    for _, result in engine.answers(engine.batches(questions, 100)):
        for part in result.answered:
            found[part.question.answers[0][0] // 2] = [a for a, _ in part.answers[1]]
    for i, (context, choices) in enumerate(zip(CONTEXTS, CHOICES, strict=True)):
        x = MODEL.embed.weight[list(context)].clone()
        for position, token in enumerate(context):
            row = {TOKEN: token, POSITION: position, ALL: 0}[share]
            x[position] += table[row] if row < len(table) else 0
        scores = MODEL.head(x.sum(0)).log_softmax(-1)
        assert found[i] == pytest.approx(scores[list(choices)].tolist(), rel=1e-12)


@pytest.mark.parametrize("trees", [True, False])
def test_rows_in_the_order_of_moving(trees):
    """A token of the second choice has the position that it has in its request."""
    engine = engine_of(trees)
    requests = [Request((5, 6, 1, 2), 2), Request((5, 6, 3, 3, 1), 3)]
    questions = [Question(requests, [[0], [1]], [True, False]), asked((9, 5), (1, 2))]
    (batch,) = engine.batches(questions, 100)
    pack = engine.pack(batch)
    tries = [question.trie for question in pack.questions]
    tokens, depths = (np.concatenate([getattr(t, n) for t in tries]) for n in ("tokens", "depth"))
    assert batch.trees == trees and max(map(len, tries)) == 5
    assert row_of(pack, TOKEN).tolist() == tokens.tolist()
    assert row_of(pack, POSITION).tolist() == depths.tolist() != list(range(len(depths)))
    assert row_of(pack, ALL).tolist() == [0] * len(moving(pack))


@pytest.fixture
def rows():
    torch.manual_seed(1)
    rows = torch.randn(40, 64)
    rows[:, ::5] = 0
    return rows


def test_shuffled_signs_are_those_of_the_row(rows):
    found = with_signs(rows, torch.arange(40), SHUFFLED, 0)
    assert torch.equal(found.abs(), rows.abs())
    assert torch.equal((found > 0).sum(1), (rows > 0).sum(1))
    moved = (found.sign() != rows.sign()).float().mean()
    assert 0.3 < moved < 0.5  # of 51 of 64, half


def test_random_signs_are_fair(rows):
    found = with_signs(rows, torch.arange(40), RANDOM, 0)
    assert torch.equal(found.abs(), rows.abs())
    equal = int((found.sign() == rows.sign())[rows != 0].sum())
    n = int((rows != 0).sum())
    assert abs(equal - n / 2) < 4 * (n / 4) ** 0.5
    assert not torch.equal((found > 0).sum(1), (rows > 0).sum(1))


@pytest.mark.parametrize("kind", [SHUFFLED, RANDOM])
def test_a_draw_depends_on_the_seed_and_the_row(rows, kind):
    numbers = torch.arange(40)
    whole, order = with_signs(rows, numbers, kind, 0), torch.randperm(40)
    assert torch.equal(with_signs(rows[order], numbers[order], kind, 0), whole[order])
    assert not torch.equal(with_signs(rows, numbers, kind, 1), whole)
    same = with_signs(rows[:1].repeat(2, 1), torch.tensor([3, 4]), kind, 0)
    assert not torch.equal(same[0], same[1])


def test_signs_that_are_kept(rows):
    assert with_signs(rows, torch.arange(40), KEPT, 0) is rows


@pytest.mark.parametrize("name", FIXED)
def test_perturb_does_not_have_the_perturbation(name):
    with pytest.raises(ValueError, match="added by the caller"):
        perturb(Attack(name, 0.1), torch.zeros(1, 3), lambda x: x.sum(-1))
