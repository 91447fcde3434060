"""A battery on linear margins, whose distance from the boundary has a closed form."""

import pytest
import torch

from llm_attack.attacks import Attack, Losses, perturb
from llm_attack.attacks.settings import BATTERIES

from .helpers import rng


@pytest.mark.parametrize("version", BATTERIES)
def test_all_nearer_than_epsilon_are_wrong_and_no_other(version):
    w = torch.randn(8, 4, 5, generator=rng(2), dtype=torch.float64)
    x = torch.randn(8, 4, 5, generator=rng(3), dtype=torch.float64)
    share = torch.tensor([0.2, 0.5, 0.9, 0.97, 1.03, 1.2, 3.0, -0.1], dtype=torch.float64)
    for how, dual in (
        ({"norm": "linf"}, w.abs().flatten(1).sum(1)),
        ({"norm": "l2", "per_token": True}, w.norm(dim=2).sum(1)),
    ):
        margin = share * 0.3 * dual

        def gap(point, margin=margin):
            return ((point - x) * w).flatten(1).sum(1) - margin

        losses = Losses(gap, target_losses=[lambda point, gap=gap: -gap(point)], gap=gap)
        got = perturb(Attack(version, 0.3, **how), x, losses, keys=torch.arange(8))
        assert (gap(got) > 0).tolist() == (share < 1).tolist()
        assert torch.equal(got[7], x[7])  # wrong already
        beyond = (share > 1) & (share < 2)  # the greatest loss of the ball
        assert torch.allclose((gap(got) + margin)[beyond], 0.3 * dual[beyond], rtol=1e-3)


def test_a_version_is_never_changed():
    """Another number needs another version, with tests of its own."""
    members = {version: kind.members for version, kind in BATTERIES.items()}
    assert members == {
        "standard-1": (
            ("apgdt", {"steps": 16, "step_size": None, "restarts": 1}),
            ("fmn", {"steps": 50, "step_size": None}),
            ("blocks", {"queries": 100}),
        )
    }
