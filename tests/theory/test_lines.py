"""The packet along lines, for networks whose loss on these lines is known."""

import pytest
import torch
import torch.nn.functional as F
from adaptive import uncertainty

from llm_attack.theory.lines import along, principal
from llm_attack.theory.packet import Uncertainty

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(3, 2, 4, generator=DRAW, dtype=torch.float64)
WEIGHT = torch.randn(2, 4, generator=DRAW, dtype=torch.float64)


def score(points):
    return (points * WEIGHT).flatten(-2).sum(-1)


def test_a_linear_loss_along_its_gradient():
    """psi = 1 + k t on [-r, r]: every moment is a polynomial of k r."""
    reach, slope = 0.5, WEIGHT.norm()
    x = X * 0.1
    found = along(lambda points: 5 + score(points), x, 3 * WEIGHT[None], reach)
    k = slope / (5 + score(x))
    norm = 2 * reach + 2 / 3 * k**2 * reach**3
    mean = 4 / 3 * k * reach**3 / norm
    second = (2 / 3 * reach**3 + 2 / 5 * k**2 * reach**5) / norm
    momentum = 2 * k * reach / norm
    expected = {
        "mean_x": mean,
        "dx": (second - mean**2).sqrt(),
        "mean_p": momentum,
        "dp": (2 * k**2 * reach / norm - momentum**2).sqrt(),
    }
    for name, value in expected.items():
        assert getattr(found, name)[:, 0].tolist() == pytest.approx(value.tolist(), rel=1e-9), name


def test_a_logistic_loss_along_any_line():
    """Only the part of a line that lies along the gradient counts; each point has its own lines."""
    lines = torch.randn(3, 2, 2, 4, generator=DRAW, dtype=torch.float64)
    found = along(lambda points: F.softplus(-score(points)), X, lines, 2.0)
    for i in range(3):
        for j in range(2):
            slope = (score(lines[i, j]) / lines[i, j].norm()).item()
            start = score(X[i]).item()
            expected = uncertainty(lambda t, a=start, k=slope: F.softplus(-a - k * t), -2.0, 2.0)
            for name in Uncertainty.__dataclass_fields__:
                value = getattr(found, name)[i, j].item()
                assert value == pytest.approx(getattr(expected, name), rel=1e-7, abs=1e-9), name
    found.check()


def test_dp_by_finite_differences_of_a_network_of_relus():
    layers = [torch.randn(8, 16, generator=DRAW).double(), torch.randn(16, 3, generator=DRAW)]

    def loss(points):
        logits = torch.relu(points.flatten(-2) @ layers[0]) @ layers[1].double()
        return logits.logsumexp(-1) - logits[..., 0]

    found = along(loss, X, WEIGHT[None], 1.0, panels=256)
    t = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    psi = loss(X[:, None] + t[:, None, None] * WEIGHT / WEIGHT.norm())
    slope, middle = psi.diff() / t.diff(), (psi[:, 1:] + psi[:, :-1]) / 2
    norm = middle.square().sum(-1)
    mean = (middle * slope).sum(-1) / norm
    dp = ((slope - mean[:, None] * middle).square().sum(-1) / norm).sqrt()
    assert found.dp[:, 0].tolist() == pytest.approx(dp.tolist(), rel=1e-3)


def test_principal_directions():
    wide = torch.zeros(50, 2, 4)
    wide[:, 0, 1] = torch.randn(50, generator=DRAW) * 9
    wide[:, 1, 3] = torch.randn(50, generator=DRAW)
    first, second = principal(wide, 2)
    assert abs(first[0, 1]) > 0.99 and abs(second[1, 3]) > 0.99
    assert abs((first * second).sum()) < 1e-5


def test_no_direction():
    with pytest.raises(ValueError, match="directions: must not be zero"):
        along(score, X, torch.zeros(1, 2, 4), 1.0)
