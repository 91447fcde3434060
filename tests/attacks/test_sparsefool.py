"""SparseFool compared with its definition, image by image, and with brute force.

`reference_sparsefool` is the definition, and shares nothing with the package. All tests are in
float64, so the order of sums decides nothing.
"""

import copy
import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from llm_attack.attacks import deepfool, sparsefool
from llm_attack.attacks.boundary import _box, _sparsest

from . import reference_sparsefool as reference
from .helpers import rng, same_bits


def trained(width=24):
    """A network with rectifiers that knows noisy versions of five patterns; and such images."""
    patterns = torch.rand(5, 2, 5, 5, generator=rng(0), dtype=torch.float64)
    labels = torch.arange(200) % 5
    noise = torch.randn(200, 2, 5, 5, generator=rng(1), dtype=torch.float64)
    images = (patterns[labels] + 0.25 * noise).clamp(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(2, 8, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, width),
            nn.ReLU(),
            nn.Linear(width, 5),
        ).double()
    optimiser = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(60):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval().requires_grad_(False), images[:40], labels[:40]


@pytest.fixture(scope="module")
def known():
    return trained()


def l0(change):
    return (change != 0).flatten(1).sum(1)


@pytest.mark.parametrize("options", ({}, {"lambda_": 1.0}, {"overshoot": 0.3}), ids=str)
def test_is_the_published_definition(known, options):
    network, x, labels = known
    assert (network(x).argmax(1) == labels).double().mean() > 0.9
    got = sparsefool(network, x, **options)
    wanted = torch.stack([reference.sparsefool(network, image, **options)[0] for image in x])
    assert torch.allclose(got, wanted, atol=1e-9)
    assert torch.equal(l0(got - x), l0(wanted - x))
    if not options:
        assert (network(got).argmax(1) != network(x).argmax(1)).all()
        assert 1 < l0(got - x).double().median() < 25  # of 50


def test_where_the_hyperplane_lies_the_other_way():
    # A score that turns back behind the boundary: there, the normal points to where x came from.
    def scores(p):
        u, v = p[:, :1], p[:, 1:].sum(1, keepdim=True)
        bump = torch.exp(-(((u - 0.55) / 0.05) ** 2))
        return torch.cat((0 * u, 2 * bump - 1 + 0.01 * v), dim=1)

    x = torch.tensor([[0.5, 0.3, 0.9, 0.5], [0.45, 0.5, 0.5, 0.2], [0.47, 0.1, 0.0, 0.0]]).double()
    behind = 0
    for start in torch.linspace(0.3, 0.5, 30).double():
        x[:, 0] = start
        wanted = [reference.sparsefool(scores, image, steps=3) for image in x]
        behind += sum(was_behind for _, was_behind in wanted)
        got = sparsefool(scores, x, steps=3)
        assert torch.allclose(got, torch.stack([image for image, _ in wanted]), atol=1e-9)
    assert behind > 5


numbers = st.floats(-1, 1).map(lambda v: round(v, 2))
unit = st.floats(0, 1).map(lambda v: round(v, 2))


@given(
    st.lists(st.tuples(unit, numbers), min_size=1, max_size=12, unique_by=lambda t: abs(t[1])),
    st.floats(-3, 3),
)
def test_the_linear_solver_is_the_loop_over_coordinates(coordinates, gap):
    x, normal = torch.tensor(coordinates, dtype=torch.float64).T
    assume(normal.norm() > 0 and abs(gap) > 1e-6)
    normal = normal / normal.norm()
    on_plane = x + gap * normal
    wanted = reference.linear_solver(x, normal, on_plane, 0.0, 1.0)
    as_far = torch.tensor([3 * gap], dtype=torch.float64)
    got = _sparsest(x[None], 3 * normal[None], as_far, _box((0, 1), x[None]))[0]
    assert torch.allclose(got, wanted, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_no_fewer_coordinates_lead_over_the_hyperplane(seed):
    """Where all have as much room, the steepest first is best: no smaller set is enough."""
    x = torch.full((1, 8), 0.5).double()
    normal = torch.randn(1, 8, generator=rng(seed), dtype=torch.float64)
    gap = 0.6 * (normal.abs() * 0.5).sum(1)
    moved = _sparsest(x, normal, gap, _box((0, 1), x))
    assert ((moved - x) * normal).sum() > gap
    few = l0(moved - x).item()
    for chosen in itertools.combinations(range(8), few - 1):
        assert (normal[0, list(chosen)].abs() * 0.5).sum() < gap


def test_without_a_box_one_coordinate_is_enough_for_a_linear_classifier():
    w = torch.tensor([[0.5, -2.0, 1.0], [0.0, 0.0, 0.0]]).double()
    x = torch.tensor([[1.0, -1.0, 2.0], [3.0, 0.0, 0.5]]).double()
    got = sparsefool(lambda p: p @ w.T, x, bounds=None)
    norm = w[0].norm()
    for before, after in zip(x, got, strict=True):
        beyond = 3 * (before @ w[0]) / norm  # three times as far as the boundary
        length = 1.02 * (beyond + 1e-3) / (2.0 / norm)
        assert torch.allclose(after - before, torch.tensor([0.0, length, 0.0]).double())


def test_without_a_box_and_behind_the_hyperplane_nothing_moves():
    x, normal = torch.rand(1, 5, generator=rng(0)), torch.rand(1, 5, generator=rng(1))
    assert same_bits(_sparsest(x, normal, torch.tensor([-1.0]), None), x)


@pytest.mark.parametrize("sizes", ((1,) * 40, (3, 37), (17, 23)), ids=len)
def test_each_example_stops_by_itself(known, sizes):
    network, x, _ = known
    rows = []

    def scores(point):
        rows.append(len(point))
        return network(point)

    together = sparsefool(scores, x)
    cost = sum(rows)
    rows.clear()
    parts = torch.cat([sparsefool(scores, part) for part in x.split(sizes)])
    assert torch.allclose(parts, together, atol=1e-9)
    assert sum(rows) == cost


def test_labels_leave_alone_what_is_wrong_already(known):
    network, x, _ = known
    labels = network(x).argmax(1)
    labels[::3] = (labels[::3] + 1) % 5
    got, all_of_them = sparsefool(network, x, labels=labels), sparsefool(network, x)
    assert same_bits(got[::3], x[::3])
    assert torch.allclose(got[1::3], all_of_them[1::3], atol=1e-9)
    assert not torch.equal(all_of_them[::3], x[::3])


def test_the_box_is_kept(known):
    network, x, _ = known
    got = sparsefool(network, x.clamp(0.2, 0.7), bounds=(0.2, 0.7))
    assert got.min() >= 0.2 and got.max() <= 0.7


def test_an_amplitude_is_a_box_of_each_coordinate(known):
    """Bounds as tensors are the authors' `lb` and `ub`, image by image."""
    network, x = known[0], known[1][:15]
    low, high = (x - 0.15).clamp(min=0), (x + 0.15).clamp(max=1)
    got = sparsefool(network, x, bounds=(low, high))
    wanted = torch.stack(
        [
            reference.sparsefool(network, image, lower.flatten(), upper.flatten())[0]
            for image, lower, upper in zip(x, low, high, strict=True)
        ]
    )
    assert torch.allclose(got, wanted, atol=1e-9)
    assert 0.1 < (got - x).abs().max() <= 0.15 + 1e-12
    # it changes more coordinates, or does not get across at all
    assert l0(got - x).double().mean() > 2 * l0(sparsefool(network, x) - x).double().mean()


@pytest.mark.parametrize("attack", (deepfool, sparsefool))
def test_numbers_and_tensors_are_the_same_bounds(known, attack):
    network, x, _ = known
    box = (torch.zeros(()), torch.ones_like(x[0]))
    assert same_bits(attack(network, x, bounds=box), attack(network, x, bounds=(0, 1)))


def test_a_network_without_gradients_leaves_the_image(known):
    used = []
    x = known[1]
    got = sparsefool(lambda p: p.flatten(1)[:, :3] * 0, x, on_gradient=used.append)
    assert same_bits(got, x)
    # DeepFool's only step and the normal, not twenty searches: from here they would all be the same
    assert [bool((g == 0).all()) for g in used] == [True, True]


def test_at_most_so_many_searches(known):
    network, x, _ = known
    one = sparsefool(network, x, steps=1, lambda_=0.5)
    wanted = torch.stack([reference.sparsefool(network, i, steps=1, lambda_=0.5)[0] for i in x])
    assert torch.allclose(one, wanted, atol=1e-9)
    assert (network(one).argmax(1) == network(x).argmax(1)).any()  # one was not enough for all
    assert same_bits(sparsefool(network, x, steps=0), x)


def test_leaves_no_trace(known):
    network, x, _ = known
    network = copy.deepcopy(network).requires_grad_(True)
    network.zero_grad()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    x = x.clone().requires_grad_(True)
    got = sparsefool(network, x)
    assert not got.requires_grad and x.grad is None
    assert all(p.grad is None for p in network.parameters())
    assert all(same_bits(before[k], v) for k, v in network.state_dict().items())
