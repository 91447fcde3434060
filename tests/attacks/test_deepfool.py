"""DeepFool: known nearest boundaries, comparison with other libraries, and edge cases."""

import pytest
import torch
from torch import nn

from llm_attack.attacks import deepfool

from .helpers import rng, same_bits

over_sizes = pytest.mark.parametrize("n", (1, 3, 8))
over_shapes = pytest.mark.parametrize("shape", ((7,), (3, 5, 5), (11, 4)), ids=str)


class Linear:
    """Scores W x + b, the distance to the nearest boundary and the perturbation that leads there.

    Distance: min over k of |f_k - f_0| / |w_k - w_0|, 0 the predicted class.
    """

    def __init__(self, shape, classes=6, dtype=torch.float64, seed=0):
        self.weight = torch.randn(classes, *shape, generator=rng(seed), dtype=dtype)
        self.bias = torch.randn(classes, generator=rng(seed + 1), dtype=dtype)
        self.rows_seen = []

    def __call__(self, x):
        self.rows_seen.append(len(x))
        return x.flatten(1) @ self.weight.flatten(1).T + self.bias

    def nearest(self, x, among=None):
        scores = self(x)
        best = []
        for i, predicted in enumerate(scores.argmax(1).tolist()):
            ways = []
            for k in range(len(self.weight)) if among is None else among[i]:
                if k != predicted:
                    w = self.weight[k] - self.weight[predicted]
                    gap = scores[i, predicted] - scores[i, k]
                    ways.append((gap / w.norm(), gap * w / w.norm() ** 2))
            best.append(min(ways, key=lambda way: way[0]))
        return torch.stack([w[0] for w in best]), torch.stack([w[1] for w in best])


def points(n, shape, dtype=torch.float64):
    return torch.rand(n, *shape, generator=rng(5), dtype=dtype)


def bent():
    """A small network whose boundaries are no planes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Softplus(), nn.Flatten(), nn.Linear(96, 5))
    network[0].weight.data *= 6
    return network.double().eval().requires_grad_(False)


@over_sizes
@over_shapes
def test_linear_classifiers_have_a_closed_form(n, shape):
    scores, x = Linear(shape), points(n, shape)
    distance, r = scores.nearest(x)
    for overshoot in (0.02, 0.5):
        got = deepfool(scores, x, overshoot=overshoot)
        assert torch.allclose(got - x, (1 + overshoot) * r, atol=1e-12)
        assert torch.allclose((got - x).flatten(1).norm(dim=1), (1 + overshoot) * distance)
        assert (scores(got).argmax(1) != scores(x).argmax(1)).all()


def test_only_the_likeliest_classes_are_looked_at():
    scores, x = Linear((20,), classes=9), points(16, (20,))
    likely = scores(x).topk(3, dim=1).indices.tolist()
    r = scores.nearest(x, among=likely)[1]
    assert not torch.allclose(r, scores.nearest(x)[1])  # else the test could not fail
    assert torch.allclose(deepfool(scores, x, classes=3) - x, 1.02 * r, atol=1e-12)


def test_steps_are_at_least_so_long():
    scores = Linear((4,), classes=2)
    x = points(1, (4,))
    x = x + (1 - 1e-9) * scores.nearest(x)[1]  # all but on the boundary
    got = deepfool(scores, x)
    assert (got - x).norm().item() == pytest.approx(1.02e-4)


@pytest.mark.parametrize("library", ("torchattacks", "foolbox"))
def test_as_far_as_other_libraries_on_linear_classifiers(library):
    attacks = pytest.importorskip(library, reason=f"{library} is not installed: make attack-libs")
    network = nn.Sequential(nn.Flatten(), nn.Linear(75, 6))
    linear = Linear((3, 5, 5), dtype=torch.float32)
    network[1].weight.data, network[1].bias.data = linear.weight.flatten(1), linear.bias
    network.eval()
    x = points(8, (3, 5, 5), torch.float32) * 0.5 + 0.25  # the box is not met
    labels = network(x).argmax(1)
    if library == "torchattacks":
        theirs = attacks.DeepFool(network)(x, labels)
    else:
        model = attacks.PyTorchModel(network, bounds=(0, 1), device="cpu")
        theirs = attacks.attacks.L2DeepFoolAttack()(model, x, labels, epsilons=None)[0]
    # foolbox adds 1e-4 to the length of the step
    assert torch.allclose(deepfool(network, x, bounds=(0, 1)), theirs, atol=1e-4)


@pytest.mark.parametrize("bounds", (None, (0.0, 1.0), (0.35, 0.65)))
def test_curved_boundaries_are_reached_and_the_box_is_kept(bounds):
    network, x = bent(), points(12, (2, 6, 6)) * 0.2 + 0.4
    got = deepfool(network, x, bounds=bounds)
    assert (network(got).argmax(1) != network(x).argmax(1)).all()
    if bounds is None:
        halfway = x + (got - x) * (0.97 / 1.02)
        assert (network(halfway).argmax(1) == network(x).argmax(1)).any()
    else:
        assert got.min() >= bounds[0] and got.max() <= bounds[1]
        assert not torch.equal(got, deepfool(network, x)) or bounds == (0.0, 1.0)


def test_each_example_stops_by_itself():
    network, x = bent(), points(12, (2, 6, 6))
    sizes, rows = [], []

    def scores(point):
        rows.append(len(point))
        return network(point)

    together = deepfool(scores, x)
    batched, rows[:] = sum(rows), []
    for i in range(12):
        assert torch.allclose(deepfool(scores, x[i : i + 1])[0], together[i], atol=1e-10)
        sizes.append(sum(rows))
        rows.clear()
    assert sum(sizes) == batched
    assert len(set(sizes)) > 1  # some need more steps than others


def test_in_a_corner_of_the_box_the_search_ends():
    network, x, used = bent(), points(6, (2, 6, 6)), []
    low, high = x - 1e-3, x + 1e-3
    got = deepfool(network, x, bounds=(low, high), steps=500, on_gradient=used.append)
    assert (network(got).argmax(1) == network(x).argmax(1)).all()  # too narrow for all of them
    assert ((got == low) | (got == high)).all()
    assert len(used) < 100


def test_the_search_ends_after_so_many_steps():
    network, x = bent(), points(12, (2, 6, 6))
    seen = []

    def scores(point):
        seen.append(point)
        return network(point)

    got = deepfool(scores, x, steps=1)
    assert len(seen) == 4  # prediction, candidates, linearisation, test
    assert torch.equal(seen[3], got)
    assert (network(got).argmax(1) == network(x).argmax(1)).any()


def test_labels_leave_alone_what_is_wrong_already():
    scores, x = Linear((7,)), points(8, (7,))
    labels = scores(x).argmax(1)
    labels[::2] = (labels[::2] + 1) % 6
    got = deepfool(scores, x, labels=labels)
    assert same_bits(got[::2], x[::2])
    assert torch.allclose(got[1::2], deepfool(scores, x)[1::2], atol=1e-10)
    wrong = (labels + 1) % 6
    assert same_bits(deepfool(scores, x[1::2], labels=wrong[1::2]), x[1::2])


def test_without_a_gradient_nothing_moves():
    used = []
    x = points(3, (4,))
    got = deepfool(lambda p: 0 * p + p.detach(), x, on_gradient=used.append)
    assert same_bits(got, x)
    assert [(g == 0).all().item() for g in used] == [True]


def test_the_gradients_that_were_followed_are_shown():
    scores, x, used = Linear((7,)), points(3, (7,)), []
    got = deepfool(scores, x, on_gradient=used.append)
    (slope,) = used
    assert torch.allclose(
        (got - x) / (got - x).norm(dim=1, keepdim=True), slope / slope.norm(dim=1, keepdim=True)
    )
