"""`Nearest` against distances to the whole vocabulary in float64."""

import pytest
import torch
from torch import nn

from llm_attack.lm.engine.diagnostics import ONE_IN
from llm_attack.lm.engine.nearest import Nearest


def brute_force(x, own, matrix, ids, p):
    """Whether no other token is nearer than the own one, and by how much it is decided."""
    distances = torch.cdist(x.double(), matrix.double(), p=p)
    mine = (x.double() - own.double()).norm(p=p, dim=-1)
    distances[torch.arange(len(ids)), ids] = torch.inf
    margin = distances.amin(-1) - mine
    return margin >= 0, margin.abs()


@pytest.mark.parametrize("amplitude", [0.05, 0.3, 0.6, 1.0, 3.0])
@pytest.mark.parametrize("signs", [True, False])
def test_agrees_with_all_distances(amplitude, signs):
    torch.manual_seed(0)
    embedding = nn.Embedding(500, 24)
    # families of tokens, so that some are far nearer to each other than most
    families = torch.randn(50, 24).repeat_interleave(10, 0)
    embedding.weight.data = families + 0.3 * torch.randn(500, 24)
    ids = torch.randint(500, (300,))
    noise = torch.randn(300, 24).sign() if signs else 2 * torch.rand(300, 24) - 1
    own = embedding.weight.data[ids]
    x = own + amplitude * noise
    found = Nearest(embedding, 500).unchanged(x, ids)
    for p, unchanged in ((2, found[0]), (torch.inf, found[1])):
        expected, margin = brute_force(x, own, embedding.weight.data, ids, p)
        clear = margin > 1e-4
        assert clear.float().mean() > 0.97
        assert torch.equal(unchanged[clear], expected[clear])


def test_both_outcomes_occur():
    """What the test above compares is not one and the same answer for every token."""
    torch.manual_seed(0)
    embedding = nn.Embedding(500, 4)
    ids = torch.arange(500)
    x = embedding.weight.data + 0.3 * torch.randn(500, 4).clamp(-1, 1)
    l2, linf = Nearest(embedding, 500).unchanged(x, ids)
    for unchanged in (l2, linf):
        assert 0.1 < unchanged.float().mean() < 0.9
    assert not torch.equal(l2, linf)
    for p, unchanged in ((2, l2), (torch.inf, linf)):
        expected, margin = brute_force(x, embedding.weight.data, embedding.weight.data, ids, p)
        assert torch.equal(unchanged[margin > 1e-4], expected[margin > 1e-4])


def test_equal_embeddings_are_a_tie():
    embedding = nn.Embedding(8, 16)
    embedding.weight.data[1::2] = embedding.weight.data[::2]
    ids = torch.arange(8)
    x = embedding.weight.data + 1e-3
    assert all(unchanged.all() for unchanged in Nearest(embedding, 8).unchanged(x, ids))


def test_a_small_perturbation_is_not_looked_up():
    """The vocabulary is read once per token, not once per perturbation."""
    read = []

    class Counting(nn.Embedding):
        def forward(self, ids):
            read.append(len(ids))
            return super().forward(ids)

    embedding = Counting(1000, 32)
    nearest, ids = Nearest(embedding, 1000), torch.arange(10)
    x = embedding.weight.data[:10] + 0.01
    nearest.unchanged(x, ids)
    assert sum(read) >= 1000
    read.clear()
    nearest.unchanged(x, ids)
    assert sum(read) == 10


@pytest.mark.parametrize("packing", ["tree", "off"])
@pytest.mark.parametrize("context", ["own", "shared"])
def test_in_results(packing, context, build, reused):
    """A thousandth of the RMS is far below the distances of tokens, ten times it is not."""
    loss = {"own": "sequence", "shared": "choice"}[context]
    task = build("demo_arc_easy")
    found = {}
    for epsilon in ("0.001rms", "10rms"):
        lm = reused(attack="random", epsilon=epsilon, loss=loss, packing=packing)
        lm.loglikelihood(task.instances, disable_tqdm=True)
        found[epsilon] = lm.attack_info()
    assert found["0.001rms"]["nearest_token_unchanged"] == 1
    assert found["0.001rms"]["nearest_token_unchanged_linf"] == 1
    assert found["10rms"]["nearest_token_unchanged"] < 0.5
    tokens = lm.diagnostics[0].elements / lm.model.config.hidden_size
    sizes = {of["nearest_token_sample"] for of in found.values()}
    assert len(sizes) == 1 and abs(sizes.pop() - tokens / ONE_IN) < 5 * (tokens / ONE_IN) ** 0.5


@pytest.mark.parametrize("loss", ["sequence", "choice"])
def test_the_sample_does_not_depend_on_the_batch(loss, build, reused):
    """The same tokens in any order, in batches of any size, as trees and as rows."""
    requests, found = build("demo_arc_easy", 6).instances, []
    for batch_size, packing, step in ((8, "tree", 1), (1, "off", -1), (64, "off", 1)):
        how = {"loss": loss, "packing": packing, "batch_size": batch_size}
        lm = reused(attack="random", epsilon="4rms", **how)
        lm.loglikelihood(requests[::step], disable_tqdm=True)
        sums = lm.diagnostics[0]
        found.append((sums.tokens, sums.nearest_l2, sums.nearest_linf))
    assert len(set(found)) == 1
    assert 0 < found[0][1] < found[0][0]


def test_only_of_embeddings(build, reused):
    lm = reused(attack="random", hookpoint="model.layers.0")
    lm.loglikelihood(build("demo_arc_easy").instances, disable_tqdm=True)
    assert lm.attack_info()["nearest_token_unchanged"] is None
    assert lm.attack_info()["nearest_token_sample"] is None
