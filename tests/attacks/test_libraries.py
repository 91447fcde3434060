"""Agreement with torchattacks 3.5.1, foolbox 3.3.4 and cleverhans 4.0.0 on the same small CNN.

If definitions differ, the test uses settings for which they coincide:

- step size: torchattacks' `alpha`, cleverhans' `eps_iter` and foolbox' `rel_stepsize` have other
  defaults than ours, epsilon / 4. So the test passes ours to each.
- foolbox' FGSM takes no target. Its BIM with one step of epsilon is OST. torchattacks and
  cleverhans have no name for OST and ILLC, which are FGSM and BIM towards a target.
- the least likely class: torchattacks finds it itself; foolbox and cleverhans get ours.
- cleverhans' BIM is its PGD without a random start. It works only in float32.
- PGD draws its start from torch's generator in each library. The test replaces the draw by ours,
  and checks that the library's first gradient is taken at this point.

Each library rounds sums in another order. So a sign could differ if a gradient is zero except for
rounding. The network is smooth, and no gradient on the way is so small; `ours` checks it.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm_attack.attacks import Attack, Losses, Watch, least_likely, perturb, uniform

from .helpers import TARGETED, keys, rng

# (dtype, epsilon, steps, greatest difference). Three steps end inside the ball. In the last case
# every sum is exact but for the start of PGD, so that nothing may differ at all.
CASES = {
    "float32": (torch.float32, 8 / 255, 10, 1e-6),
    "float32 inside": (torch.float32, 8 / 255, 3, 1e-6),
    "float64": (torch.float64, 8 / 255, 10, 1e-14),
    "float64 inside": (torch.float64, 8 / 255, 3, 1e-14),
    "exact": (torch.float32, 1 / 32, 10, 0.0),
}
LABELS = torch.arange(8)


class Setting:
    """The network, the images and what our attacks and those of a library made of them."""

    def __init__(self, case, name):
        self.dtype, self.epsilon, self.steps, self.most = CASES[case]
        if name == "pgd" and case == "exact":
            self.most = 1e-6  # its start is not on the grid
        self.name, self.attack = name, Attack(name, self.epsilon, steps=self.steps)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(33)
            self.network = nn.Sequential(
                nn.Conv2d(3, 8, 3),
                nn.BatchNorm2d(8),
                nn.Softplus(),
                nn.Conv2d(8, 8, 3, stride=2),
                nn.BatchNorm2d(8),
                nn.Tanh(),
                nn.Flatten(),
                nn.Linear(72, 10),
            )
            for module in (self.network[1], self.network[4]):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        self.network[0].weight.data *= 8  # bent, so that some gradients turn during the steps
        self.network.to(self.dtype).eval().requires_grad_(False)
        x = torch.rand(8, 3, 9, 9, generator=rng(1), dtype=torch.float64) * 1.2 - 0.1
        if case == "exact":
            x = (x * 256).round() / 256
        self.x = x.clamp(0, 1).to(self.dtype)  # some pixels lie on the edges of the box
        self.targets = least_likely(self.network(self.x), LABELS)
        self.draw = self.epsilon * uniform(keys(8), self.x)
        self.points = []  # at which the network was called
        self.network.register_forward_pre_hook(lambda _, args: self.points.append(args[0].detach()))

    @property
    def classes(self):
        return self.targets if self.name in TARGETED else LABELS

    def ours(self):
        def large_enough(slope):
            size = slope.abs().flatten(1)
            assert (size.min(1).values > 1e-5 * size.mean(1)).all()

        def against(classes):
            return lambda p: F.cross_entropy(self.network(p), classes, reduction="none")

        return perturb(
            self.attack,
            self.x,
            Losses(against(LABELS), against(self.targets)),
            bounds=(0, 1),
            keys=keys(8),
            watch=Watch(large_enough),
        )


def torchattacks(at, monkeypatch):
    library = pytest.importorskip(
        "torchattacks", reason="torchattacks is not installed: make attack-libs"
    )
    replace_uniform_(at, monkeypatch)
    options = {"eps": at.epsilon, "alpha": at.epsilon / 4, "steps": at.steps}
    if at.name in ("fgsm", "ost"):
        attack = library.FGSM(at.network, eps=at.epsilon)
    elif at.name == "pgd":
        attack = library.PGD(at.network, **options)
    else:
        attack = library.BIM(at.network, **options)
    if at.name in TARGETED:
        attack.set_mode_targeted_least_likely(quiet=True)
    return attack(at.x, LABELS)


def foolbox(at, monkeypatch):
    library = pytest.importorskip("foolbox", reason="foolbox is not installed: make attack-libs")
    eagerpy = pytest.importorskip("eagerpy", reason="eagerpy is not installed: make attack-libs")

    def uniform(self, shape, low, high):
        assert (shape, low, high) == (at.x.shape, -at.epsilon, at.epsilon)
        return type(self)(at.draw)

    monkeypatch.setattr(eagerpy.PyTorchTensor, "uniform", uniform)
    model = library.PyTorchModel(at.network, bounds=(0, 1), device="cpu")
    wanted = library.criteria.Misclassification(at.classes)
    if at.name in TARGETED:
        wanted = library.criteria.TargetedMisclassification(at.classes)
    attack = {
        "fgsm": lambda: library.attacks.LinfFastGradientAttack(),
        "ost": lambda: library.attacks.LinfBasicIterativeAttack(rel_stepsize=1, steps=1),
        "bim": lambda: library.attacks.LinfBasicIterativeAttack(rel_stepsize=1 / 4, steps=at.steps),
        "illc": lambda: library.attacks.LinfBasicIterativeAttack(
            rel_stepsize=1 / 4, steps=at.steps
        ),
        "pgd": lambda: library.attacks.LinfPGD(rel_stepsize=1 / 4, steps=at.steps),
    }[at.name]()
    return attack(model, at.x, wanted, epsilons=at.epsilon)[0]


def cleverhans(at, monkeypatch):
    reason = "cleverhans is not installed: make attack-libs"
    one = pytest.importorskip("cleverhans.torch.attacks.fast_gradient_method", reason=reason)
    many = pytest.importorskip("cleverhans.torch.attacks.projected_gradient_descent", reason=reason)
    if at.dtype == torch.float64:
        pytest.skip("cleverhans works in float32 alone")
    replace_uniform_(at, monkeypatch)
    options = {
        "norm": np.inf,
        "clip_min": 0.0,
        "clip_max": 1.0,
        "y": at.classes,
        "targeted": at.name in TARGETED,
    }
    if at.name in ("fgsm", "ost"):
        return one.fast_gradient_method(at.network, at.x, at.epsilon, **options)
    return many.projected_gradient_descent(
        at.network,
        at.x,
        at.epsilon,
        at.epsilon / 4,
        at.steps,
        rand_init=at.name == "pgd",
        **options,
    )


def replace_uniform_(at, monkeypatch):
    def uniform_(self, low, high):
        assert (self.shape, low, high) == (at.x.shape, -at.epsilon, at.epsilon)
        return self.copy_(at.draw)

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform_)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ("fgsm", "ost", "bim", "illc", "pgd"))
@pytest.mark.parametrize("library", (torchattacks, foolbox, cleverhans), ids=lambda f: f.__name__)
def test_same_point(library, name, case, monkeypatch, record_property):
    at = Setting(case, name)
    got = at.ours()
    our_points = at.points[:]
    at.points.clear()
    theirs = library(at, monkeypatch)
    difference = (got - theirs).abs().max().item()
    record_property(f"{library.__name__} {name} {case}", difference)
    print(f"\n{library.__name__} {name} {case}: largest difference {difference:.3g}")

    assert theirs.dtype == got.dtype
    assert difference <= at.most
    assert (got - at.x).abs().max() > 0.7 * at.epsilon
    if name == "pgd":
        start = (at.x + at.draw).clamp(0, 1)
        assert (start - at.x).abs().max() > 0.9 * at.epsilon
        assert (our_points[0] - start).abs().max() <= at.most
        assert (at.points[0] - start).abs().max() <= at.most


def test_torchattacks_moves_what_is_outside_of_the_unit_cube():
    """docs/beside.md: embeddings need a wrapper, and nothing says so."""
    torchattacks = pytest.importorskip("torchattacks")
    w = torch.linspace(-1, 1, 12).reshape(3, 4)
    network = torch.nn.Linear(4, 3, bias=False)
    network.weight.data = w
    x = torch.tensor([[-0.9, -0.5, 0.3, 0.6], [-0.2, 0.8, -0.7, 0.1]])
    labels = torch.tensor([0, 2])
    clamped = torchattacks.FGSM(network.eval(), eps=0.05)(x, labels)
    assert clamped.min() == 0 and (clamped[x < -0.05] == 0).all()
    slopes = torch.autograd.functional.jacobian(
        lambda x: torch.nn.functional.cross_entropy(network(x), labels), x
    )
    moved = torchattacks.BIM(network, eps=0.05, alpha=0.05, steps=1)(x, labels) - x
    outside = x < -0.05
    assert torch.allclose(moved[outside], torch.full_like(moved[outside], 0.05))
    assert (slopes[outside] < 0).any() and (slopes[outside] > 0).any()
