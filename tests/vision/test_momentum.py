"""The dp of a classifier over images, against the packet on an interval and a closed form."""

import pytest
import torch
from adaptive import uncertainty
from torch import nn

from llm_attack.attacks import loss_gradient
from llm_attack.vision.data import Images
from llm_attack.vision.measure import cross_entropy
from llm_attack.vision.momentum import momentum_spread


def test_of_one_pixel_it_is_that_of_the_packet():
    """Every value of a pixel once is nearly the interval from 0 to 1."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    values = ([[9.0], [-5.0]], [-3.0, 4.0], [[1.0, -2.0], [-1.5, 1.0]], [0.5, 0.0])
    for parameter, value in zip(network.parameters(), values, strict=True):
        parameter.data = torch.tensor(value, dtype=torch.float64)
    labels = torch.ones(256, dtype=torch.int64)
    images = Images(torch.arange(256, dtype=torch.uint8).reshape(-1, 1, 1, 1), labels)

    def loss(x):
        return cross_entropy(network(x), labels[: len(x)])

    def psi(x):
        return loss(torch.tensor([[x]], dtype=torch.float64)).item()

    def slope(x):
        return loss_gradient(loss, torch.tensor([[x]], dtype=torch.float64)).item()

    exact = uncertainty(psi, 0, 1, slope).dp
    x = torch.linspace(0, 1, 256, dtype=torch.float64)[:, None]
    ratio = loss_gradient(loss, x).norm() / loss(x).norm()
    assert ratio.item() > 1.1 * exact  # it takes more than the slope's size
    assert momentum_spread(network.float(), images) == pytest.approx(exact, rel=0.01)


def test_linear_scores():
    """Whatever the batches: loss and slope are softplus and sigmoid of the margin."""
    w = torch.tensor([[1.0, -2.0, 0.5, 3.0], [-1.0, 0.5, 2.5, 1.0]], dtype=torch.float64)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    network[1].weight.data = w.float()
    pixels = torch.randint(256, (50, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 2
    margin = (pixels.flatten(1) / 255).double() @ (w[1] - w[0]) * (1 - 2 * labels)
    loss, size = nn.functional.softplus(margin), margin.sigmoid() * (1 - 2 * labels)
    norm = loss.square().mean()
    per_weight = size.square().mean() / norm - ((size * loss).mean() / norm) ** 2
    exact = (w[1] - w[0]).norm() * per_weight.sqrt()
    images = Images(pixels.to(torch.uint8), labels)
    for size in (7, 250):
        assert momentum_spread(network, images, size) == pytest.approx(exact.item(), rel=1e-5)
    assert network[1].weight.requires_grad and network[1].weight.grad is None
