"""Training: it learns, a resumed run is the uninterrupted one, and bad states are refused."""

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llm_attack.base.errors import UsageError
from llm_attack.vision import fig2, stages
from llm_attack.vision.data import load_dataset
from llm_attack.vision.networks import build
from llm_attack.vision.precision import mixed_precision
from llm_attack.vision.settings import RECIPES
from llm_attack.vision.train import by_steps, one_cycle, train

SETTINGS = fig2.Settings(epochs=4, batch_size=32, width=0.25, learning_rate=0.1, crop=1, flip=True)
PLAIN = replace(SETTINGS, crop=0, flip=False)


@pytest.fixture(scope="module")
def images():
    return load_dataset("digits", fig2.Settings(train_size=200)).train


def network(images, name="resnet18", width=0.1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(name, *images.moments(), size=8, width=width)


def run(images, settings=SETTINGS, stop_at=None, **options):
    """Trains; the network and the losses by epoch. Stops, if told, when an epoch is yielded."""
    net, losses = network(images), {}
    for epoch, loss, _ in train(net, images, settings, **options):
        losses[epoch] = loss
        if epoch == stop_at:
            break
    return net, losses


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_it_learns(images):
    net = network(images, "cnn", width=0.5)
    settings = replace(PLAIN, epochs=12, batch_size=10)
    assert [epoch.number for epoch in train(net, images, settings)] == list(range(1, 13))
    assert (net.eval()(images.scaled()).argmax(1) == images.labels).double().mean() > 0.95


def test_an_epoch_is_kept_before_it_is_yielded(images, tmp_path):
    """So that attacks that are stopped cost no training."""
    state, net = tmp_path / "state.pt", network(images)
    for epoch, loss, _ in train(net, images, SETTINGS, state=state):
        kept = torch.load(state, weights_only=True)
        assert (kept["epoch"], kept["loss"]) == (epoch, loss)
        assert all(torch.equal(kept["network"][k], v) for k, v in net.state_dict().items())
    assert epoch == 4 and net.training


def test_the_same_seed_is_the_same_run(images):
    first, losses = run(images)
    again, other_losses = run(images)
    assert same(first, again) and losses == other_losses
    other, _ = run(images, replace(SETTINGS, seed=1))
    assert not same(first, other)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stop_at", (1, 3))
@pytest.mark.sampled(3)
def test_a_resumed_run_is_the_uninterrupted_one(images, tmp_path, stop_at, recipe):
    settings = replace(SETTINGS, recipe=recipe)
    whole, losses = run(images, settings)
    state = tmp_path / "deep" / "state.pt"
    run(images, settings, stop_at=stop_at, state=state)
    # the epoch that was kept is yielded again, for attacks that were stopped
    resumed, later = run(images, settings, state=state)
    assert same(whole, resumed)
    assert later == {epoch: losses[epoch] for epoch in range(stop_at, 5)}
    # a finished run is taken as it is
    finished, last = run(images, settings, state=state)
    assert same(whole, finished) and last == {4: losses[4]}
    assert [p.name for p in state.parent.iterdir()] == ["state.pt"]


def test_the_optimiser_is_as_set(images, tmp_path):
    settings = replace(SETTINGS, weight_decay=0.01, momentum=0.8, epochs=1, batch_size=20)
    run(images, settings, state=tmp_path / "state.pt")
    (group,) = torch.load(tmp_path / "state.pt", weights_only=True)["optimiser"]["param_groups"]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.8, True, 0.01)
    assert group["initial_lr"] == 0.1 and group["lr"] == pytest.approx(0)


def test_the_paper_recipe_is_adam_at_a_constant_rate(images, tmp_path):
    settings = fig2.Settings(recipe="paper", epochs=2, batch_size=20, width=0.25)
    run(images, settings, state=tmp_path / "state.pt")
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    (group,) = kept["optimiser"]["param_groups"]
    assert group["betas"] == (0.9, 0.999) and group["weight_decay"] == 0
    assert group["lr"] == group["initial_lr"] == 1e-3
    assert kept["same"]["recipe"] == "paper" and kept["same"]["label_smoothing"] == 0


def test_an_option_goes_before_the_recipe(images, tmp_path):
    settings = fig2.Settings(recipe="paper", schedule="steps", momentum=0.5, epochs=4, width=0.25)
    rates = []
    for _ in train(network(images), images, settings, state=tmp_path / "state.pt"):
        (group,) = torch.load(tmp_path / "state.pt", weights_only=True)["optimiser"]["param_groups"]
        rates.append(group["lr"])
    # the rate of the step that comes next
    assert rates == pytest.approx([1e-3, 1e-4, 1e-5, 1e-5]) and group["betas"] == (0.5, 0.999)


def test_steps_fall_at_half_and_at_three_quarters():
    assert [by_steps(step, steps=8) for step in range(8)] == [1] * 4 + [0.1] * 2 + [0.01] * 2


def test_the_cycle_rises_for_a_quarter_of_the_steps():
    shares = [one_cycle(step, steps=39) for step in range(40)]
    assert shares[0] == pytest.approx(0.1) and shares[9] == 1 and shares[39] == 0
    rises = [b - a for a, b in pairwise(shares)]
    assert rises[:9] == pytest.approx([0.1] * 9) and rises[9:] == pytest.approx([-1 / 30] * 30)


def test_a_state_of_other_settings_is_refused(images, tmp_path):
    state = tmp_path / "state.pt"
    run(images, state=state, stop_at=2)
    kept = state.read_bytes()
    with pytest.raises(UsageError) as caught:
        run(images, replace(SETTINGS, epochs=5, epsilon=0.2), state=state)
    message = str(caught.value)
    assert (
        "belongs to a run with other settings (epsilon=0.2, there None; epochs=5, there 4)"
        in message
    )
    assert state.read_bytes() == kept
    with pytest.raises(UsageError, match="label=other, there "):
        run(images, state=state, label="other")
    # where it runs is no setting
    run(images, replace(SETTINGS, device="cpu"), state=state)


@pytest.mark.parametrize("content", (b"", b"no such file", {"epoch": 1}, [1], nn.Linear(1, 1)))
def test_a_file_that_is_no_state_is_refused(images, tmp_path, content):
    state = tmp_path / "state.pt"
    if isinstance(content, bytes):
        state.write_bytes(content)
    else:
        torch.save(content, state)
    with pytest.raises(UsageError, match=r"output: .*state.pt: must be a file that training wrote"):
        run(images, state=state)


def test_batches_are_no_larger_than_the_data(images):
    _, losses = run(images[:10], replace(SETTINGS, batch_size=64, epochs=1))
    assert list(losses) == [1] and losses[1] > 0


@pytest.mark.parametrize("share", (0.0, 0.2))
def test_the_mean_loss_is_reported(images, share):
    """At a learning rate of zero, the loss is that of the untrained network."""
    settings = replace(
        PLAIN, learning_rate=0.0, momentum=0.0, label_smoothing=share, batch_size=50, epochs=1
    )
    net = network(images, "cnn")
    losses = [epoch.loss for epoch in train(net, images, settings)]
    scores = net(images.scaled()).log_softmax(1)
    own = -scores.gather(1, images.labels[:, None]).mean()
    wanted = (1 - share) * own - share * scores.mean()
    assert losses == [pytest.approx(wanted.item(), rel=1e-5)]


def test_each_image_is_seen_both_ways_in_two_epochs(images, monkeypatch):
    """And half of them are mirrored in the first."""
    seen = []

    def augment(x, generator, *, crop, flip):
        seen.extend(
            (row.numpy().tobytes(), bool(turned)) for row, turned in zip(x, flip, strict=True)
        )
        return x

    monkeypatch.setattr("llm_attack.vision.train.augment", augment)
    settings = replace(SETTINGS, epochs=2, batch_size=50)
    list(train(network(images, "cnn"), images, settings))
    first, second = dict(seen[:200]), dict(seen[200:])
    assert len(first) == 200 and second == {x: not turned for x, turned in first.items()}
    assert 60 < sum(first.values()) < 140
    # at random, about half of them are mirrored again in the second
    seen.clear()
    list(train(network(images, "cnn"), images, replace(settings, mirroring="random")))
    first, second = dict(seen[:200]), dict(seen[200:])
    assert 60 < sum(first.values()) < 140 and 60 < sum(second.values()) < 140
    assert 60 < sum(second[x] == turned for x, turned in first.items()) < 140


def test_a_loss_that_is_not_finite_is_said(images, tmp_path):
    settings = replace(PLAIN, learning_rate=1e30)
    state = tmp_path / "state.pt"
    message = r"learning_rate=1e\+30: the loss is (nan|inf) in epoch 1; must be lower"
    with pytest.raises(UsageError, match=message):
        run(images, settings, state=state)
    assert not state.exists()


def test_weights_that_the_last_step_spoils_are_said(images, tmp_path):
    """The loss is that before the step."""
    net, state = network(images, "cnn"), tmp_path / "state.pt"
    net.fc2.bias.register_hook(lambda slope: slope * torch.nan)
    settings = replace(PLAIN, epochs=1, batch_size=len(images))
    message = r"learning_rate=0\.1: weights are not finite after epoch 1; must be lower"
    with pytest.raises(UsageError, match=message):
        list(train(net, images, settings, state=state))
    assert not state.exists()


def test_precision(images):
    seen = []
    net = network(images, "cnn")
    net.fc2.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    for precision in ("float32", "bfloat16"):
        settings = replace(PLAIN, precision=precision, epochs=1, batch_size=200)
        assert [epoch.precision for epoch in train(net, images, settings)] == [precision]
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("instructions", ({}, {"amx_bf16": True}, {"avx512_bf16": True}))
@pytest.mark.parametrize("more", (0, 1))
def test_auto_is_a_rule_of_processor_and_work(images, monkeypatch, instructions, more):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: instructions, raising=False)
    # a linear layer: 2 operations a weight and image forward, twice as many backward
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 512 * 10))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    needed = math.ceil(5e12 / (3 * 2 * 64 * 512 * 10))
    found = mixed_precision("auto", net, images[:1].scaled(), needed - 1 + more)
    assert found == (bool(instructions) and more == 1)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and net.training


@pytest.mark.parametrize(("capability", "mixed"), (((7, 5), False), ((8, 0), True), ((9, 0), True)))
def test_auto_is_a_rule_of_the_gpu(monkeypatch, capability, mixed):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    x = SimpleNamespace(device=torch.device("cuda:1"))
    assert mixed_precision("auto", nn.Linear(1, 1), x, 1) == mixed


def test_precision_as_asked_is_kept(images):
    for precision in ("float32", "bfloat16"):
        given = (precision, nn.Linear(1, 1), images[:1].scaled(), 10**12)
        assert mixed_precision(*given) == (precision == "bfloat16")


def test_a_resumed_run_keeps_its_precision(images, tmp_path, monkeypatch):
    state = tmp_path / "state.pt"
    monkeypatch.setattr("llm_attack.vision.train.mixed_precision", lambda *a: True)
    whole, losses = run(images)
    run(images, stop_at=2, state=state)
    monkeypatch.setattr("llm_attack.vision.train.mixed_precision", lambda *a: False)
    resumed, later = run(images, state=state)
    assert same(whole, resumed) and later[4] == losses[4]


@pytest.mark.slow
def test_bfloat16_learns_as_well_within_the_spread_of_seeds():
    """Accuracy on new images of five seeds each: the means differ by less than the seeds do."""
    data = load_dataset("digits", fig2.Settings())
    found = {}
    for precision in ("float32", "bfloat16"):
        for seed in range(5):
            settings = replace(PLAIN, precision=precision, seed=seed, epochs=8)
            net = stages.untrained(data, "cnn", settings)
            list(train(net, data.train, settings))
            right = net.eval()(data.test.scaled()).argmax(1) == data.test.labels
            found.setdefault(precision, []).append(right.double().mean().item())
    plain, mixed = (torch.tensor(found[name]) for name in ("float32", "bfloat16"))
    assert plain.min() > 0.9
    assert (plain.mean() - mixed.mean()).abs() < max(plain.max() - plain.min(), 0.01)
