"""An attack changes neither the network, nor the point, nor torch's own state.

The caller is responsible for the forward passes of the closure. In training mode, BatchNorm counts
them, so the test freezes it, as for fine-tuning.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm_attack.attacks import Attack, Elements, Known, Losses, loss_gradient, perturb, perturb_each

from .helpers import (
    ALL_ATTACKS,
    GRADIENT_ATTACKS,
    ITERATIVE,
    MINIMAL,
    bits,
    closures,
    keys,
    rng,
    same_bits,
)

EPS = 0.1
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
LABELS = torch.tensor([0, 1, 2])


def build(training):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
        )
    network.train(training)
    network[1].eval()
    network[4].requires_grad_(False)
    network[4].weight.requires_grad_(True)
    network[0].weight.grad = torch.ones_like(network[0].weight)  # of an unfinished training step
    network[0].register_forward_hook(lambda *_: None)
    network[2].register_forward_pre_hook(lambda *_: None)
    network[4].register_full_backward_hook(lambda *_: None)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _: pytest.fail("a gradient of a parameter was taken"))
    return network


def closure(network, breaks_at=None):
    """The loss of `network`; its call number `breaks_at` raises."""
    calls = []

    def loss(point):
        calls.append(None)
        if len(calls) == breaks_at:
            raise ArithmeticError("broken")
        return F.cross_entropy(network(point), LABELS[: len(point)], reduction="none")

    return loss


def state(network):
    """All that may not differ; tensors as copies of their bits."""
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    return {
        "bits": {name: bits(tensor.detach()).tolist() for name, tensor in tensors.items()},
        "place": {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors.items()},
        "version": {name: tensor._version for name, tensor in tensors.items()},
        "grad": {
            name: None if tensor.grad is None else bits(tensor.grad).tolist()
            for name, tensor in tensors.items()
        },
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "training": [module.training for module in network.modules()],
        "hooks": [
            [(key, id(hook)) for key, hook in getattr(module, kind).items()]
            for module in network.modules()
            for kind in HOOKS
        ],
        "attributes": [sorted(vars(module)) for module in network.modules()],
        "grad mode": torch.is_grad_enabled(),
        "generator": torch.get_rng_state().tolist(),
    }


def point():
    return torch.rand(3, 2, 5, 5, generator=rng(1))


@pytest.mark.parametrize("grad_mode", (True, False), ids=("grad", "no_grad"))
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("name", ALL_ATTACKS)
def test_the_network_is_as_before(name, training, grad_mode):
    network, x = build(training), point()
    loss = closure(network)
    with torch.set_grad_enabled(grad_mode):
        before = state(network)
        options = {"keys": keys(3), "bounds": (0, 1), **closures(name, loss)}
        got = perturb(Attack(name, EPS, steps=3), x, **options)
        assert state(network) == before
    assert got.requires_grad is False
    assert got.grad_fn is None
    # a cross-entropy above 0 is the nearest already
    assert torch.equal(got, x) == (name in ("none", *MINIMAL))


@pytest.mark.parametrize(
    ("name", "breaks_at"), [(n, 1) for n in GRADIENT_ATTACKS] + [(n, 3) for n in ITERATIVE]
)
def test_the_network_is_as_before_when_the_closure_raises(name, breaks_at):
    network, x = build(training=False), point()
    loss = closure(network, breaks_at)
    with torch.no_grad():
        before, clean = state(network), x.clone()
        with pytest.raises(ArithmeticError, match="broken"):
            perturb(Attack(name, EPS), x, keys=keys(3), **closures(name, loss))
        assert state(network) == before
    assert same_bits(x, clean)


@pytest.mark.parametrize("requires_grad", (True, False))
@pytest.mark.parametrize("name", ALL_ATTACKS)
def test_the_point_is_as_before(name, requires_grad):
    x = point().requires_grad_(requires_grad)
    mask, own = torch.rand(3, 2, generator=rng(2)) < 0.7, keys(3)
    slope = torch.ones_like(x)
    given = [tensor.detach().clone() for tensor in (x, own, slope)]
    version = x._version
    loss = closure(build(training=False))
    options = {"keys": own, "elements": Elements(mask), "bounds": (0, 1), **closures(name, loss)}
    got = perturb(Attack(name, EPS, steps=3), x, known=Known(gradient=slope), **options)
    for tensor, copy in zip((x.detach(), own, slope), given, strict=True):
        assert torch.equal(tensor, copy)
    assert (x.requires_grad, x.grad, x._version) == (requires_grad, None, version)
    assert mask.equal(torch.rand(3, 2, generator=rng(2)) < 0.7)
    if name not in ("none", *MINIMAL):
        assert got.data_ptr() != x.data_ptr()


def test_perturb_each_leaves_no_trace_between_attacks():
    network, x = build(training=False), point()
    loss = closure(network)
    before, clean = state(network), x.clone()
    attacks = [Attack(name, EPS, steps=2) for name in ALL_ATTACKS]
    losses = Losses(loss, loss, [lambda point: -loss(point)])
    for _ in perturb_each(attacks, x, losses, keys=keys(3)):
        assert state(network) == before
        assert same_bits(x, clean)


def test_the_gradient_is_that_of_the_point_alone():
    network, x = build(training=False), point()
    before = state(network)
    got = loss_gradient(closure(network), x)
    assert state(network) == before
    reference = x.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(closure(network)(reference).sum(), reference)
    assert torch.equal(got, expected)
    assert got.requires_grad is False


@pytest.mark.parametrize("name", ALL_ATTACKS)
def test_the_result_does_not_hang_on_the_state_of_torch(name):
    """Neither on its generator nor on its gradient mode."""
    loss = closure(build(training=False))
    results = []
    for seed, grad_mode in ((0, True), (1, False)):
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(grad_mode):
            torch.manual_seed(seed)
            results.append(
                perturb(Attack(name, EPS), point(), keys=keys(3), **closures(name, loss))
            )
    assert same_bits(*results)
