"""A universal perturbation of images beside that of ART, for the same network, images and epsilon.

ART (1.20) goes through the images and adds the step of an inner attack, here PGD, whenever an image
is still right. It ends at a rate of wrong answers. Ours raises the mean loss of all images. So the
two differ, and what is compared is the share of wrong answers among images that neither has seen.
The loss is the log odds of the wrong classes against the right one, as `loss=choice` of a model.
"""

import random
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from llm_attack.attacks import Attack
from llm_attack.lm.engine.universal import fit

EPSILON, SEEN, TOLERANCE = 0.25, 200, 0.05


class Images:
    """The mean log odds of images, as `fit` asks for it: the table has one row."""

    def __init__(self, network, x, y):
        self.network, self.x, self.y, self.seen = network, x, y, torch.ones(1, dtype=torch.bool)

    def zeros(self):
        return torch.zeros(1, self.x.shape[1])

    def __call__(self, table, slope):
        with torch.enable_grad():
            leaf = table.detach().requires_grad_(True)
            scores = self.network(self.x + leaf)
            right = nn.functional.one_hot(self.y, 10).bool()
            odds = scores.masked_fill(right, -torch.inf).logsumexp(1) - scores[right]
            value = odds.mean()
            (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach(), gradient


@pytest.fixture(scope="module")
def world():
    """A network that knows the digits, and the images for the fit and for the score."""
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimiser = torch.optim.Adam(network.parameters(), 1e-2)
        for _ in range(150):
            optimiser.zero_grad()
            cross_entropy(network(x[:1000]), y[:1000]).backward()
            optimiser.step()
    return network.requires_grad_(False), x[1000:], y[1000:]


def wrong(world, change):
    """The share of wrong answers among images that were not used."""
    network, x, y = world
    return float((network(x[SEEN:] + change).argmax(1) != y[SEEN:]).float().mean())


@pytest.mark.slow
def test_as_strong_as_that_of_art(world):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evasion = pytest.importorskip("art.attacks.evasion")
        estimators = pytest.importorskip("art.estimators.classification")
        network, x, y = world
        classifier = estimators.PyTorchClassifier(network, nn.CrossEntropyLoss(), (64,), 10)
        random.seed(0)
        inner = {"eps": EPSILON, "eps_step": EPSILON / 4, "max_iter": 10, "verbose": False}
        theirs = evasion.UniversalPerturbation(
            *(classifier, "pgd", inner),
            **{"delta": 0.02, "max_iter": 3, "eps": EPSILON, "norm": np.inf, "verbose": False},
        )
        theirs.generate(x[:SEEN].numpy(), y[:SEEN].numpy())
    ours = fit(Attack("bim", EPSILON), Images(network, x[:SEEN], y[:SEEN]), 0, lambda _: None)
    found = torch.from_numpy(np.asarray(theirs.noise, np.float32)).reshape(1, -1)
    assert max(float(found.abs().max()), float(ours.table.abs().max())) <= EPSILON * (1 + 1e-6)
    of_ours, of_theirs = wrong(world, ours.table), wrong(world, found)
    assert of_ours >= of_theirs - TOLERANCE
    noise = EPSILON * torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], (1, 64)))
    assert wrong(world, noise.float()) < min(of_ours, of_theirs) - 0.2
