"""Networks of several seeds as one, against torch.nn and against each seed by itself."""

import pytest
import torch
import torch.nn.functional as F

from llm_attack.theory.stacked import StackedMLP, cross_entropy, generators, pick, stack

SIZES = (3, 16, 8, 2)


def test_the_same_as_linear_layers_of_torch():
    network = StackedMLP(SIZES, generators(0, 4), torch.float64)
    x = torch.randn(4, 7, 3, dtype=torch.float64)
    for seed in range(4):
        layers = []
        for weight, bias in zip(network.weights, network.biases, strict=True):
            layer = torch.nn.Linear(*weight.shape[1:]).double()
            layer.load_state_dict({"weight": weight[seed].T, "bias": bias[seed, 0]})
            layers += [layer, torch.nn.Tanh()]
        alone = torch.nn.Sequential(*layers[:-1])
        assert torch.allclose(network(x)[seed], alone(x[seed]), rtol=0, atol=1e-13)


def test_weights_are_drawn_as_by_torch():
    """Uniform up to 1 / sqrt(inputs), biases too."""
    network = StackedMLP((100, 400, 2), generators(0, 2))
    for weight, bias, inputs in zip(network.weights, network.biases, (100, 400), strict=True):
        for part in (weight, bias):
            assert part.abs().max() <= inputs**-0.5
        assert weight.abs().max() > 0.99 * inputs**-0.5
        # of 800 draws or more; the standard error of the mean is 0.02 of the width
        assert abs(weight.mean()) < 0.1 * inputs**-0.5
    assert not torch.equal(network.weights[0][0], network.weights[0][1])


def trained(first, seeds):
    draws = generators(first, seeds)
    network = StackedMLP(SIZES, draws, torch.float64)
    x = stack(draws, lambda g: torch.randn(20, 3, generator=g, dtype=torch.float64))
    labels = (x.sum(-1) > 0).long()
    optimiser = torch.optim.Adam(network.parameters(), lr=0.1)
    for _ in range(5):
        optimiser.zero_grad()
        cross_entropy(network(x), labels).mean(1).sum().backward()
        optimiser.step()
    return network(x)


def test_a_seed_learns_in_company_what_it_learns_alone():
    """But for rounding, of which Adam makes more where a gradient is small."""
    together = trained(3, 3)
    for seed in range(3):
        assert torch.allclose(together[seed], trained(3 + seed, 1)[0], rtol=0, atol=1e-9)


def test_pick():
    x = torch.arange(24).reshape(2, 4, 3)
    index = torch.tensor([[3, 0], [1, 1]])
    expected = torch.stack([torch.stack([x[s, i] for i in index[s]]) for s in range(2)])
    assert torch.equal(pick(x, index), expected)


@pytest.mark.parametrize("classes", (2, 3, 7))
def test_cross_entropy(classes):
    logits = 4 * torch.randn(3, 50, classes, dtype=torch.float64)
    labels = torch.randint(classes, (3, 50))
    expected = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    assert torch.allclose(cross_entropy(logits, labels), expected, rtol=1e-12, atol=1e-14)


def test_the_gradient_is_right_where_the_network_is_sure():
    """p of the label is 1 in float32; the gradient's direction is that of float64."""
    logits = torch.tensor([[[30.0, 1.0, 0.0]]], requires_grad=True)
    cross_entropy(logits, torch.zeros(1, 1, dtype=torch.long)).backward()
    expected = torch.tensor([1.0, 0.0], dtype=torch.float64).softmax(0)
    found = logits.grad[0, 0].double()
    assert torch.allclose(-found[1:] / found[0], expected, rtol=1e-5)
    assert found[0] < 0
