"""Traces: perturbations that reproduce the answers, and shares that sum to the loss's change."""

import functools

import numpy as np
import pytest
import torch
from networks import CPU, asked, exact, network, scorer_of

from llm_attack.attacks import Attack
from llm_attack.lm.engine.engine import Engine, Layout
from llm_attack.lm.engine.nearest import Nearest
from llm_attack.lm.engine.traces import Trace
from llm_attack.lm.losses import LOSSES, ThreatModel
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.packing.positions import of_question

ATTACKS = [Attack("none"), Attack("random", 0.05), Attack("fgsm", 0.05)]
THREATS = {
    "own": ThreatModel(),
    "own, not the first": ThreatModel("continuation", positions="not_first"),
    "shared": ThreatModel(shared=True),
    "choice": ThreatModel("choice", shared=True),
    "margin, of the choices": ThreatModel("margin", shared=True, positions="continuation"),
}
LAYOUTS = {"rows": 0, "trees": 100}
POINTS = 20


@functools.cache
def traced(threat, layout, rows=100, points=POINTS):
    """(questions, answers of each, traces of each attack) of a small network in float64."""
    longest = LAYOUTS[layout]
    engine = Engine(
        scorer_of(network("llama")),
        ATTACKS,
        THREATS[threat],
        CPU,
        Layout(0, longest),
        path_points=points,
    )
    with exact(), frozen(engine.scorer.model):
        parts = [part for _, part in engine.answers(engine.batches(asked(), rows))]
    answered = [a for part in parts for a in part.answered]
    traces = [[t for part in parts for t in part.traces[i]] for i in range(len(ATTACKS))]
    joined = [Trace.joined(of_attack) if of_attack else None for of_attack in traces]
    return [a.question for a in answered], [a.answers for a in answered], joined


def places(questions, positions):
    """For each question: of each of its nodes the row of the trace, or -1."""
    found, end = [], 0
    for question in questions:
        moves = of_question(question, positions)
        found.append(np.where(moves, end + moves.cumsum() - 1, -1))
        end += int(moves.sum())
    return found


def log_probs(request, x):
    """Of each token but the first; `x` in place of the embeddings."""
    with exact():
        logits = network("llama")(inputs_embeds=x[None]).logits[0].log_softmax(-1)
    return logits[torch.arange(len(x)), torch.tensor(request.tokens[1 : len(x) + 1])]


def embedded(request, change=None, rows=None, scale=1.0):
    """The embeddings of a request, with the change of its rows."""
    x = network("llama").get_input_embeddings()(torch.tensor(request.inputs)).detach()
    if change is not None:
        x[rows >= 0] += scale * change[rows[rows >= 0]]
    return x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.sampled(3)
def test_the_changes_give_the_answers_again(threat, layout):
    """Put on the clean embeddings, without a hook: in float64 to the last digits."""
    questions, answers, traces = traced(threat, layout)
    of_questions = places(questions, THREATS[threat].positions)
    assert traces[0] is None
    for i, trace in enumerate(traces[1:], 1):
        assert len(trace.change) == sum(int((rows >= 0).sum()) for rows in of_questions)
        for question, of_attacks, rows in zip(questions, answers, of_questions, strict=True):
            for request, path, (value, _) in zip(
                question.requests, question.trie.paths, of_attacks[i], strict=True
            ):
                x = embedded(request, trace.change, torch.from_numpy(rows[path]))
                again = log_probs(request, x)[-request.n_continuation :].sum().detach()
                assert float(again) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("threat", THREATS)
def test_shares_sum_to_the_change_of_the_loss(threat, layout):
    """Within 1 % of it. The margin has kinks, where the best of the choices is another."""
    questions, _, traces = traced(threat, layout)
    of_questions = places(questions, THREATS[threat].positions)
    for trace in traces[1:]:
        assert trace.loss.shape == (len(questions), 2)
        for rows, (before, after) in zip(of_questions, trace.loss.tolist(), strict=True):
            total = float(trace.share[rows[rows >= 0]].double().sum())
            assert total == pytest.approx(after - before, rel=1e-2, abs=1e-6)


def test_the_loss_is_the_one_that_is_raised():
    questions, _, traces = traced("own", "rows")
    rows = places(questions, "all")
    for question, of_question_, losses in zip(questions, rows, traces[2].loss, strict=True):
        (request,) = question.requests
        row = torch.from_numpy(of_question_)
        for scale, loss in zip((0, 1), losses, strict=True):
            x = embedded(request, traces[2].change, row, scale)
            assert -float(log_probs(request, x).sum().detach()) == pytest.approx(
                float(loss), rel=1e-9
            )


def test_each_share_is_the_integral_of_its_token():
    """Against a sum of Simpson over many more points, from embeddings, request by request."""
    questions, _, traces = traced("own", "rows", points=50)
    n = 200
    weights = torch.tensor([1.0, *[4.0, 2.0] * (n // 2 - 1), 4.0, 1.0], dtype=torch.float64) / 3 / n
    question, row = questions[0], torch.from_numpy(places(questions, "all")[0])
    (request,) = question.requests
    trace, total = traces[2], 0
    for weight, at in zip(weights, torch.linspace(0, 1, n + 1, dtype=torch.float64), strict=True):
        x = embedded(request, trace.change, row, at).requires_grad_()
        (slope,) = torch.autograd.grad(-log_probs(request, x).sum(), x)
        total = total + weight * (slope * trace.change[row]).sum(-1)
    assert trace.share[row].tolist() == pytest.approx(total.tolist(), abs=1e-4)


def test_shares_are_those_of_captum():
    """Which takes 50 points of Gauss and Legendre unless told otherwise, as we do."""
    attr = pytest.importorskip("captum.attr", reason="captum is not installed")
    questions, _, traces = traced("own", "rows", points=50)
    for i, question in enumerate(questions):
        (request,), row = question.requests, torch.from_numpy(places(questions, "all")[i])

        def loss(points, request=request):
            return torch.stack([-log_probs(request, x).sum() for x in points])

        with torch.enable_grad():
            found = attr.IntegratedGradients(loss).attribute(
                embedded(request, traces[2].change, row)[None], embedded(request)[None]
            )
        ours = traces[2].share[row].tolist()
        assert ours == pytest.approx(found[0].sum(-1).tolist(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.sampled(2)
def test_batches_and_layouts_do_not_matter(threat):
    """Of a question in a batch of its own, and of all in one, as rows and as trees."""
    expected = by_tokens(*traced(threat, "rows", 1, 2), threat)
    for layout, rows in (("rows", 100), ("trees", 100), ("trees", 1)):
        found = by_tokens(*traced(threat, layout, rows, 2), threat)
        assert found.keys() == expected.keys()
        for key, parts in expected.items():
            for name, a, b in zip(Trace._fields, parts, found[key], strict=True):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-7), (key, name)


def by_tokens(questions, answers, traces, threat):
    found = {}
    for i, trace in enumerate(traces[1:]):
        for u, rows in enumerate(places(questions, THREATS[threat].positions)):
            row = torch.from_numpy(rows[rows >= 0])
            key = i, tuple(r.tokens for r in questions[u].requests)
            found[key] = *(part[row] for part in trace[:-1]), trace.loss[u]
    return found


def test_norms_are_of_the_changes_and_the_nearest_is_another_token():
    _, _, traces = traced("shared", "trees")
    matrix = network("llama").get_input_embeddings().weight.detach().double()
    order = traced("shared", "trees")[0]
    tokens = torch.cat([torch.from_numpy(q.trie.tokens) for q in order])
    trace = traces[2]
    assert torch.allclose(trace.norm.double(), trace.change.norm(dim=-1))
    distances = torch.cdist(matrix[tokens] + trace.change, matrix)
    distances[torch.arange(len(tokens)), tokens] = torch.inf
    least, nearest = distances.min(-1)
    assert torch.allclose(trace.distance.double(), least, rtol=1e-4)
    assert (trace.nearest == nearest).float().mean() > 0.95  # ties in float32 aside


def test_no_points_no_shares():
    _, _, traces = traced("own", "rows", points=0)
    assert traces[1].share.isnan().all()
    assert torch.equal(traces[1].loss, traced("own", "rows")[2][1].loss)


def test_the_nearest_other_of_a_vocabulary_in_blocks(monkeypatch):
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(500, 24)
    x, ids = torch.randn(40, 24), torch.randint(500, (40,))
    nearest = Nearest(embedding, 500)
    blocks = nearest._others

    def small(x, ids):
        """Blocks of 7 tokens."""
        monkeypatch.setattr(torch.Tensor, "split", lambda self, n: _split(self, 7))
        yield from blocks(x, ids)

    monkeypatch.setattr(nearest, "_others", small)
    _split = torch.Tensor.split
    found, distance = nearest.other(x, ids)
    expected = torch.cdist(x, embedding.weight.detach())
    expected[torch.arange(40), ids] = torch.inf
    assert torch.equal(found, expected.argmin(-1))
    assert torch.allclose(distance, expected.amin(-1), rtol=1e-5)


def test_every_loss_is_tried():
    assert {threat.loss for threat in THREATS.values()} == LOSSES.keys()
