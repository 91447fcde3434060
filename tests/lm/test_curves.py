"""The loss at every step: on losses that are linear in the point, it is known."""

import pytest
import torch

from llm_attack.lm.engine.scoring import Scorer
from llm_attack.lm.packing.questions import Question, Request
from llm_attack.lm.settings import AttackSettings

EPSILON = 0.25
ASKED = [Request((5, 6, 7), 1), Request((9, 8, 7, 6), 1), Request((4, 5), 1)]


@pytest.fixture
def linear(exact, monkeypatch):
    """curves(settings...): of each request the clean loss, the L1 norm of its slope, the curves."""
    w = torch.randn(4, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    call = Scorer.__call__

    def scores(self, pack, entries, x=None, below=None):
        x = self.point(pack) if x is None else x
        loss = (x * w[: x.shape[1]] * pack.mask[..., None]).flatten(1).sum(1)
        true = call(self, pack, entries)
        return true._replace(log_prob=-loss[entries.request])

    def curves(*conditions):
        lm = exact(packing="off", loss="continuation")
        lm.trace = True
        lm.use(*conditions)
        lm.engine.scorer.takes_twins = False
        questions = [Question([request], [[i]]) for i, request in enumerate(ASKED)]
        ((_, result),) = lm.engine.answers(lm.engine.batches(questions, 8))
        embed = lm.model.get_input_embeddings()
        rows = []
        for answered in result.answered:
            inputs = answered.question.requests[0].inputs
            slope = w[: len(inputs)]
            clean = float((embed(torch.tensor(inputs)).detach() * slope).sum())
            rows.append((clean, float(slope.abs().sum()), answered.curves))
        return rows

    monkeypatch.setattr(Scorer, "__call__", scores)
    return curves


def settings(name, **more):
    return AttackSettings(name, EPSILON, loss="continuation", **more)


# Of each attack, how far it has come after each step, in epsilons.
WAYS = {
    "fgsm": [0, 1],
    "bim": [0, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1],
    "mifgsm": [0, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1],
    "reversed": [0, -1],
    "apgd": [0, 1, 1, 1, 1, 1, 1],
}


def test_linear_losses_are_what_the_steps_make_them(linear):
    names = ["none", *WAYS]
    for clean, slope, curves in linear(*(settings(name, steps=6) for name in names)):
        assert curves[0] == []
        for name, of_attack in zip(names[1:], curves[1:], strict=True):
            (curve,) = of_attack
            assert (curve.attack, curve.first) == (name, 0)
            expected = [clean + EPSILON * slope * way for way in WAYS[name]]
            assert curve.values[:, 0, 0].tolist() == pytest.approx(expected, rel=1e-12), name
            assert torch.equal(curve.values[..., 1], -curve.values[..., 0])


def test_a_run_of_several_numbers_of_steps(linear):
    """Each has its own last point, and no later one."""
    for clean, slope, curves in linear(*(settings("bim", steps=n) for n in (1, 3, 6))):
        for n, (curve,) in zip((1, 3, 6), curves, strict=True):
            expected = [clean + EPSILON * slope * way for way in WAYS["bim"][: n + 1]]
            assert curve.values[:, 0, 0].tolist() == pytest.approx(expected, rel=1e-12)


def test_what_starts_elsewhere(linear):
    """Noise has only its point. The search has one for each query, and the best is the answer."""
    conditions = [settings("random"), settings("blocks", queries=5), settings("pgd", steps=3)]
    for clean, slope, curves in linear(*conditions):
        (noise,), (search,), (pgd,) = curves
        assert (noise.first, len(noise.values)) == (1, 1)
        assert (search.first, len(search.values)) == (1, 5)
        assert (pgd.first, len(pgd.values)) == (0, 4)
        for curve in (noise, search, pgd):
            assert ((curve.values[..., 0] - clean).abs() <= EPSILON * slope * (1 + 1e-12)).all()
        assert (pgd.values[1:, 0, 0] > pgd.values[:-1, 0, 0]).all()
