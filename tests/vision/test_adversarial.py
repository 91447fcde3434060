"""Adversarial training: its inner attacks and losses, against closed forms and a library."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm_attack.attacks import uniform
from llm_attack.vision import fig2
from llm_attack.vision.adversarial import adversarial_examples, divergence, objective
from llm_attack.vision.data import load_dataset
from llm_attack.vision.networks import build
from llm_attack.vision.train import train

PGD = fig2.Settings(train_attack="pgd", train_epsilon=0.1, label_smoothing=0.0)
TRADES = replace(PGD, train_attack="trades")
LABELS = torch.arange(6) % 3


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def pixels(*shape, edge=0.0):
    """Doubles in [edge, 1 - edge]."""
    x = torch.rand(shape, generator=generator(1), dtype=torch.float64)
    return edge + (1 - 2 * edge) * x


@pytest.fixture
def network():
    """Smooth, with statistics of a batch; three classes, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        made = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Linear(64, 3)
        ).double()
    made[0].weight.data *= 4
    made[1].running_mean.normal_(0, 0.1, generator=generator())
    return made


@pytest.mark.parametrize("settings", (PGD, TRADES), ids=lambda s: s.train_attack)
def test_the_examples_are_those_of_torchattacks(network, settings, monkeypatch):
    """And the network is left as it was: its mode, its statistics, no gradient."""
    library = pytest.importorskip(
        "torchattacks", reason="torchattacks is not installed: make attack-libs"
    )
    x = pixels(6, 1, 6, 6, edge=0.01)  # whose start the library of TRADES does not cut
    before = {name: value.clone() for name, value in network.state_dict().items()}
    got = adversarial_examples(network, x, LABELS, settings, generator())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(m.training for m in network.modules())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())

    network.eval()
    with torch.random.fork_rng(devices=[]):
        if settings is PGD:
            keys = torch.randint(-(2**63), 2**63 - 1, (6,), generator=generator())
            monkeypatch.setattr(
                torch.Tensor,
                "uniform_",
                lambda self, low, high: self.copy_(high * uniform(keys, x)),
            )
            theirs = library.PGD(network, eps=0.1, alpha=0.025, steps=7)(x, LABELS)
        else:
            torch.manual_seed(5)
            theirs = library.TPGD(network, eps=0.1, alpha=0.025, steps=10)(x)
    assert (got - theirs).abs().max() < 1e-12
    assert (got - x).abs().amax((1, 2, 3)).min() == pytest.approx(0.1)


@pytest.fixture
def line():
    """Two classes, whose scores are linear, and their difference in the second's favour."""
    w = torch.tensor([[1.0, -2.0, 0.5, 3.0], [-1.0, 0.5, 2.5, 1.0]], dtype=torch.float64)
    made = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, dtype=torch.float64))
    made[1].weight.data = w.clone()
    return made, (w[1] - w[0]).reshape(1, 1, 2, 2)


def test_examples_of_a_linear_network(line):
    """The worst corner of the ball; of trades the one on the side where the start fell."""
    network, w = line
    x, labels = pixels(8, 1, 2, 2, edge=0.2), torch.arange(8) % 2
    side = (1 - 2 * labels).reshape(8, 1, 1, 1)
    got = adversarial_examples(network, x, labels, replace(PGD, train_steps=9), generator())
    assert torch.allclose(got, x + 0.1 * side * w.sign(), atol=1e-12)
    noise = torch.randn(x.shape, generator=generator(), dtype=x.dtype)
    side = (noise * w).sum((1, 2, 3), keepdim=True).sign()
    assert set(side.flatten().tolist()) == {-1, 1}
    got = adversarial_examples(network, x, labels, replace(TRADES, train_steps=9), generator())
    assert torch.allclose(got, x + 0.1 * side * w.sign(), atol=1e-12)
    once = replace(TRADES, train_steps=1, train_step_size=0.01)
    got = adversarial_examples(network, x, labels, once, generator())
    assert torch.allclose(got, x + 0.001 * noise + 0.01 * side * w.sign(), atol=1e-12)


def test_the_loss_that_is_raised_is_that_of_the_training(line):
    """Smoothed labels want no margin above the logarithm of 3: what exceeds it is to grow."""
    network, w = line
    network[1].bias.data = torch.tensor([0.0, 20.0], dtype=torch.float64)
    x = pixels(2, 1, 2, 2, edge=0.2)
    plain = replace(PGD, train_steps=9)
    smooth = replace(plain, label_smoothing=0.5)
    for settings, sides in ((plain, [1, -1]), (smooth, [1, 1])):
        got = adversarial_examples(network, x, torch.tensor([0, 1]), settings, generator())
        side = torch.tensor(sides).reshape(2, 1, 1, 1)
        assert torch.allclose(got, x + 0.1 * side * w.sign(), atol=1e-12)


def test_a_box_of_pixels_and_other_lengths(line):
    network, _ = line
    x, labels = torch.zeros(2, 1, 2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    for settings in (PGD, TRADES):
        short = replace(settings, train_epsilon=0.25, train_steps=1, train_step_size=0.01)
        got = adversarial_examples(network, x, labels, short, generator())
        assert got.min() == 0 and 0 < got.max() <= (0.26 if settings is PGD else 0.02)
    assert (
        adversarial_examples(network, x, labels, replace(PGD, train_attack="none"), generator())
        is x
    )


def test_the_amplitude_is_the_usual_one_unless_given(line):
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    for channels, epsilon in ((1, 0.1), (3, 8 / 255)):
        network[1] = nn.LazyLinear(2)
        x = torch.full((2, channels, 4, 4), 0.5)
        network(x)
        settings = replace(PGD, train_epsilon=None)
        got = adversarial_examples(
            network, x, torch.zeros(2, dtype=torch.int64), settings, generator()
        )
        assert (got - x).abs().max() == pytest.approx(epsilon, rel=1e-5)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("beta", (6.0, 1.5))
def test_losses_and_their_gradients_in_the_weights(network, smoothing, beta):
    """Written out from the papers: of a batch, probabilities and their logarithms."""
    x, point = pixels(6, 1, 6, 6), pixels(6, 1, 6, 6).flip(0)
    wanted = (1 - smoothing) * F.one_hot(LABELS, 3) + smoothing / 3

    def entropy(p):
        return -(wanted * p.log()).sum() / 6

    p, q = network(x).softmax(1), network(point).softmax(1)
    robust = (p * (p.log() - q.log())).sum() / 6
    losses = {
        "none": entropy(p),
        "pgd": entropy(q),
        "trades": entropy(p) + beta * robust,
    }
    for name, expected in losses.items():
        settings = replace(PGD, train_attack=name, label_smoothing=smoothing, trades_beta=beta)
        got = objective(network, x, x if name == "none" else point, LABELS, settings)
        assert got.item() == pytest.approx(expected.item(), rel=1e-6)
        ways = [
            torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
            for loss in (got, expected)
        ]
        for ours, theirs in zip(*ways, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_divergence_of_two_coins():
    """KL of (3/4, 1/4) from (1/2, 1/2), in nats; its gradient at itself is zero."""
    p = torch.tensor([[3.0, 1.0]], dtype=torch.float64).log()
    even = torch.zeros(1, 2, dtype=torch.float64)
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    assert divergence(p, even).item() == pytest.approx(expected.item(), rel=1e-6)
    assert divergence(even, p).item() != pytest.approx(expected.item(), rel=1e-2)


@pytest.fixture(scope="module")
def images():
    return load_dataset("digits", fig2.Settings(train_size=96)).train


def run(images, settings, stop_at=None, seen=None, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build("cnn", *images.moments(), size=8, width=0.25)
    if seen is not None:
        network.fc2.register_forward_hook(
            lambda module, args, output: seen.append((module.training, output.dtype))
        )
    for epoch, *_ in train(network, images, settings, **options):
        if epoch == stop_at:
            break
    return network


@pytest.mark.parametrize("attack", ("pgd", "trades"))
@pytest.mark.sampled(2)
def test_a_resumed_training_draws_the_same_starts(images, tmp_path, attack):
    settings = fig2.Settings(epochs=3, batch_size=32, train_attack=attack, train_steps=2)
    whole = run(images, settings)
    state = tmp_path / "state.pt"
    run(images, settings, stop_at=2, state=state)
    resumed = run(images, settings, state=state)
    clean = run(images, replace(settings, train_attack="none"))
    for a, b, c in zip(whole.parameters(), resumed.parameters(), clean.parameters(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_attacks_are_in_float32_and_in_evaluation_mode(images):
    """Whatever the weights are trained in: a start of 0.001 is lost in bfloat16."""
    attack, step = (False, torch.float32), (True, torch.bfloat16)
    for name, expected in (
        ("none", [step]),
        ("pgd", 7 * [attack] + [step]),
        ("trades", 11 * [attack] + 2 * [step]),
    ):
        seen = []
        settings = fig2.Settings(epochs=1, batch_size=96, train_attack=name, precision="bfloat16")
        run(images, settings, seen=seen)
        assert seen == expected
