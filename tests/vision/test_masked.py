"""Signs of masked gradients, on networks whose loss has a closed form along the gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm_attack.vision.data import Images
from llm_attack.vision.masked import SHARES, gradients

EPSILON = 0.1


def images(n=40):
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(60, 196, (n, 1, 2, 2), generator=draws, dtype=torch.uint8)
    return Images(pixels, torch.zeros(n, dtype=torch.long))


class Lead(nn.Module):
    """Two classes; class 0 leads by a function of the pixels (N, 4)."""

    def __init__(self, lead):
        super().__init__()
        self.lead = lead

    def forward(self, x):
        lead = self.lead(x.flatten(1))
        return torch.stack([lead, torch.zeros_like(lead)], 1)


def test_a_linear_network_keeps_what_its_gradient_promises():
    """The lead falls by epsilon |w|₁ along the step; its gradient has one direction everywhere."""
    w = torch.tensor([3.0, -1.0, 2.0, 0.5])
    found = gradients(Lead(lambda x: x @ w - 2), images(), EPSILON, batch_size=7)
    leads = images().scaled().flatten(1) @ w - 2
    leads = leads[leads > 0].double()
    assert 0 < len(leads) < 40
    for share in SHARES:
        wanted = F.softplus(-(leads - share * EPSILON * 6.5)).mean().item()
        assert found[f"loss_{share:g}"] == pytest.approx(wanted, rel=1e-5)
    assert found["promised"] == pytest.approx(
        (EPSILON * 6.5 * torch.sigmoid(-leads)).mean().item(), rel=1e-5
    )
    assert found["rise"] == pytest.approx(found["loss_1"] - found["loss_0"], rel=1e-5)
    assert found["cosine"] == pytest.approx(1, abs=1e-6)
    assert found["zero"] == found["vanished"] == 0


def test_a_loss_that_the_step_jumps_over_turns_its_gradient_round():
    """The lead is least at c, and within a step of it all images are: beyond it the way is back."""
    x = torch.full((6, 1, 2, 2), 128, dtype=torch.uint8)
    x[3:] = 126
    near = Images(x, torch.zeros(6, dtype=torch.long))
    lead = lambda x: 1 + (x - 127 / 255).square().sum(1)  # noqa: E731
    found = gradients(Lead(lead), near, EPSILON)
    assert found["cosine"] == pytest.approx(-1, abs=1e-5)
    away = F.softplus(torch.tensor(-(1 + 4 * (EPSILON - 1 / 255) ** 2), dtype=torch.float64))
    assert found["loss_1"] == pytest.approx(away.item(), rel=1e-5)
    assert found["rise"] < 0 < found["promised"]


def test_coordinates_without_a_gradient_are_counted():
    found = gradients(Lead(lambda x: 1 + x[:, 0]), images(), EPSILON)
    assert found["zero"] == 0.75 and found["vanished"] == 0
    flat = gradients(Lead(lambda x: 1 + 0 * x[:, 0]), images(), EPSILON)
    assert flat["zero"] == 1 and flat["vanished"] == 1
    assert flat["cosine"] is None and flat["promised"] == 0


def test_a_gradient_that_float32_loses_is_told_from_none():
    """At a lead of 60, 1 - softmax is rounded to zero; our cross-entropy has exp(-60) there."""
    found = gradients(Lead(lambda x: 60 + x[:, 0]), images(), EPSILON)
    assert found["vanished"] == 1 and found["zero"] == 0.75
    assert found["cosine"] == pytest.approx(1, abs=1e-6)


def test_images_that_are_wrong_are_left_out():
    found = gradients(Lead(lambda x: x[:, 0] - 9), images(), EPSILON)
    assert set(found.values()) == {None}
