"""Accuracies under attack for classifiers whose answers are known, and their rows."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from llm_attack.attacks import Attack, Losses, deepfool, keys_for, least_likely, perturb, sparsefool
from llm_attack.vision.data import Images
from llm_attack.vision.measure import Examples, attacked, cross_entropy, frozen, measure
from llm_attack.vision.networks import build
from llm_attack.vision.settings import KNOWN

SIX = ("ost", "fgsm", "bim", "illc", "pgd", "sparsefool")
UNBOUNDED = ("deepfool_unbounded", "sparsefool_unbounded")
SEARCHES = ("deepfool", "sparsefool", *UNBOUNDED)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def network(seed=0, name="cnn", **options):
    """At chance: in float64, so that no class is a matter of rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build(
            name, torch.tensor([0.5]), torch.tensor([0.3]), size=8, width=0.25, classes=4, **options
        )
        for parameter in net.parameters():
            parameter.data *= 2
    return net.double()


def images(n=60):
    pixels = torch.randint(0, 256, (n, 1, 8, 8), generator=rng(), dtype=torch.uint8)
    return Images(pixels, torch.randint(0, 4, (n,), generator=rng(1)))


def rows_of(table):
    return {row["condition"]: row for row in table}


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=6), st.integers(0, 5))
def test_cross_entropy_is_torchs(scores, label):
    scores = torch.tensor([scores], dtype=torch.float64)
    label = torch.tensor([label % scores.shape[1]])
    wanted = F.cross_entropy(scores, label, reduction="none")
    assert torch.allclose(cross_entropy(scores, label), wanted, atol=1e-12)


def test_the_gradient_of_cross_entropy_does_not_cancel():
    def slopes(loss, dtype):
        scores = torch.tensor([[20.0, 0.0, -1.0]], dtype=dtype, requires_grad=True)
        return torch.autograd.grad(loss(scores, torch.tensor([0])).sum(), scores)[0]

    exact = slopes(F.cross_entropy, torch.float64)
    assert slopes(F.cross_entropy, torch.float32)[0, 0] == 0  # what it is for
    assert torch.allclose(slopes(cross_entropy, torch.float32).double(), exact, rtol=1e-5)


class Threshold(nn.Module):
    """Two classes of one pixel: the score of class 1 is the pixel - 0.5, scaled; of class 0, 0."""

    def forward(self, x):
        pixel = x.flatten(1)[:, :1]
        return torch.cat((torch.zeros_like(pixel), 5 * (pixel - 0.5)), dim=1)


def test_accuracies_of_a_threshold_are_known():
    """Every attack on a linear classifier moves the pixel by epsilon towards the threshold."""
    values = torch.arange(0, 256, 5)
    pixels = values.to(torch.uint8).reshape(-1, 1, 1, 1)
    labels = (values > 127).long()
    labels[3] = 1 - labels[3]
    net = nn.Sequential(Threshold())
    names = (*SIX, "deepfool", *UNBOUNDED)
    table = rows_of(measure(net, Images(pixels, labels), names, epsilon=0.1, batch_size=7))
    far = ((values / 255 - 0.5).abs() > 0.1) & (values != 15)
    for name in (*SIX, "deepfool"):
        row = table[name]
        assert row["accuracy"] == pytest.approx(far.double().mean().item())
        assert row["images"] == len(values)
        assert row["l0"] == 1
        assert row["fooled"] == pytest.approx(((~far).sum().item() - 1) / (len(values) - 1))
        if name in ("ost", "fgsm", "bim", "illc"):
            assert row["l2"] == row["linf"] == pytest.approx(0.1)
    assert table["none"]["accuracy"] == pytest.approx(1 - 1 / len(values))
    assert table["none"]["fooled"] == 0 and table["none"]["l0"] is None
    for name in UNBOUNDED:
        assert table[name]["accuracy"] == 0 and table[name]["fooled"] == 1
        assert table[name]["linf"] > 0.2
    # the envelope is of the attacks that keep to the amplitude, if there are any
    assert table["lowest"]["accuracy"] == table["fgsm"]["accuracy"]
    alone = rows_of(measure(net, Images(pixels, labels), UNBOUNDED, epsilon=0.1))
    assert alone["lowest"]["accuracy"] == 0
    assert table["highest"]["accuracy"] == table["fgsm"]["accuracy"]
    assert all(row["epsilon"] == 0.1 for row in table.values())
    assert table["fgsm"]["zero_gradient"] == 0


def test_zero_gradients_are_counted():
    class Masked(Threshold):
        def forward(self, x):
            return super().forward(x.flatten(1)[:, :1])

    pixels = torch.full((4, 1, 2, 2), 200, dtype=torch.uint8)
    table = rows_of(
        measure(nn.Sequential(Masked()), Images(pixels, torch.ones(4).long()), SIX, epsilon=0.1)
    )
    for name in SIX:
        assert table[name]["zero_gradient"] == 0.75  # three of four pixels are not looked at


def dlr(net, labels, other, point):
    """Targeted DLR, lowered, of the class that is the `other`-th of those that are not the label's:
    (z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2).
    """
    scores = net(point)
    ranked = scores.sort(dim=1, descending=True).values
    spread = ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2 + 1e-12
    classes = torch.tensor(
        [[k for k in range(scores.shape[1]) if k != gold][other] for gold in labels.tolist()]
    )
    rows = torch.arange(len(labels))
    return (scores[rows, labels] - scores[rows, classes]) / spread


def test_the_attacks_are_those_of_the_package():
    net, data = network().eval().requires_grad_(False), images(20)
    x, keys = data.scaled(), torch.tensor([keys_for(5, [i]) for i in range(20)])
    target = least_likely(net(x), data.labels)
    losses = Losses(
        lambda p: cross_entropy(net(p), data.labels),
        lambda p: cross_entropy(net(p), target),
        [partial(dlr, net, data.labels, other) for other in range(net(x).shape[1] - 1)],
    )
    noise = ("random", "uniform", "gaussian")
    names = (*SEARCHES, *noise, "reversed", "mifgsm", "apgd", "apgdt", "blocks", *SIX[:-1])
    assert set(names) == set(KNOWN)
    found = dict(
        attacked(names, net, Examples(x, data.labels, keys), Attack(epsilon=0.07, steps=4), (0, 1))
    )
    assert list(found) == list(names)
    inside = (x - 0.07).clamp(0, 1), (x + 0.07).clamp(0, 1)
    searched = {
        name + end: search(net, x, labels=data.labels, bounds=bounds)
        for name, search in (("deepfool", deepfool), ("sparsefool", sparsefool))
        for end, bounds in (("", inside), ("_unbounded", (0, 1)))
    }
    for name, point in found.items():
        if name in searched:
            wanted = searched[name]
        else:
            wanted = perturb(Attack(name, 0.07, steps=4), x, losses, bounds=(0, 1), keys=keys)
        if name in ("apgd", "apgdt", "blocks"):  # where nothing on the way was wrong
            same = net(point).argmax(1) == data.labels
            assert torch.equal(point[same], wanted[same]) and same.any()
        else:
            assert torch.equal(point, wanted)
        assert name in UNBOUNDED or name == "gaussian" or (point - x).abs().max() < 0.0701


@pytest.mark.parametrize("name", ("apgd", "blocks"))
def test_of_attacks_that_search_any_wrong_point_counts(name):
    """The greatest loss is where ten classes are nearly equal and the right one is first: below
    1/2 another one is, with a smaller loss.
    """

    def scores(point):
        u = point.flatten(1)
        others = -0.1 - 0.01 * u.expand(-1, 9)
        below = torch.tensor([1.0] + [-9.0] * 8).expand(len(u), -1)
        return torch.cat((0 * u, torch.where(u < 0.5, below, others)), dim=1)

    x, labels = torch.full((6, 1, 1, 1), 0.5), torch.zeros(6).long()
    keys = torch.tensor([keys_for(0, [i]) for i in range(6)])
    attack = Attack(name, 0.1, steps=5, queries=20)
    best = perturb(attack, x, lambda point: cross_entropy(scores(point), labels), keys=keys)
    assert (scores(best).argmax(1) == 0).all()
    like = Attack(epsilon=0.1, steps=5, queries=20)
    ((_, point),) = attacked([name], scores, Examples(x, labels, keys), like, None)
    assert (scores(point).argmax(1) == 1).all()
    assert (point >= 0.4 - 1e-6).all()


def test_the_next_class_is_tried_on_those_that_are_right_still():
    """Of class 0, half are close enough to class 1; nothing is close to class 2."""
    seen = []

    def scores(point):
        seen.append(len(point))
        u = point.flatten(1)
        return torch.cat((0 * u, u - 0.5, u - 9), dim=1)

    x, labels = torch.tensor([0.45, 0.1] * 3).reshape(6, 1, 1, 1), torch.zeros(6).long()
    keys = torch.tensor([keys_for(0, [i]) for i in range(6)])
    like = Attack(epsilon=0.1, steps=5)
    ((_, point),) = attacked(["apgdt"], scores, Examples(x, labels, keys), like, (0, 1))
    assert set(seen) == {6, 3} and seen.count(3) == seen.count(6) - 2  # the clean scores come first
    assert (scores(point).argmax(1) == torch.tensor([1, 0] * 3)).all()
    assert torch.allclose(point.flatten()[1::2], torch.tensor(0.2))  # as far as it goes


@pytest.mark.slow
@pytest.mark.parametrize("way", ("cross-entropy", "targets"))
def test_as_many_images_stay_right_as_under_autoattack(way):
    """APGD-CE and APGD-T of the authors' with a start each, on a network with bent boundaries."""
    reason = "pyautoattack is not installed: make attack-libs"
    theirs = pytest.importorskip("pyautoattack.autopgd_base", reason=reason)
    net, x = network(seed=4).float().eval().requires_grad_(False), images(200).scaled()
    labels = net(x).argmax(1)
    keys = torch.tensor([keys_for(0, [i]) for i in range(len(x))])
    how = {"n_iter": 100, "norm": "Linf", "eps": 0.1, "device": "cpu"}
    plain = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 8, 8)), net)
    if way == "targets":
        name, library = "apgdt", theirs.APGDAttack_targeted(plain, n_target_classes=3, **how)
    else:
        name, library = "apgd", theirs.APGDAttack(plain, loss="ce", **how)
    there = (net(library.perturb(x, labels)).argmax(1) == labels).double().mean()
    like = Attack(epsilon=0.1, steps=100)
    ((_, point),) = attacked([name], net, Examples(x, labels, keys), like, (0, 1))
    here = (net(point).argmax(1) == labels).double().mean()
    assert 0.1 < there < 0.9
    assert here <= there + 0.01


def test_accuracies_do_not_depend_on_the_batch_size():
    net, data = network(), images(30)
    one = measure(net, data, (*SIX, "random"), epsilon=0.05, seed=3, batch_size=30)
    other = measure(net, data, (*SIX, "random"), epsilon=0.05, seed=3, batch_size=7)
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, nan_ok=True)
    assert one != measure(net, data, (*SIX, "random"), epsilon=0.05, seed=4, batch_size=30)


def test_all_attacks_see_the_same_images():
    net, data = network(), images(30)
    table = rows_of(measure(net, data, SIX, epsilon=0.05, subset=11, batch_size=8))
    whole = rows_of(measure(net, data, SIX, epsilon=0.05))
    part = rows_of(measure(net, data[:11], SIX, epsilon=0.05))
    for name in ("none", *SIX, "lowest", "highest"):
        assert table[name] == pytest.approx(part[name])
        assert table[name]["images"] == 11
        assert table[name]["before"] == table["none"]["accuracy"]
    kept = ("accuracy", "low", "high", "images")
    assert [table["all"][k] for k in kept] == [whole["none"][k] for k in kept]
    assert rows_of(measure(net, data, SIX, epsilon=0.05, subset=99)) == whole


def test_robust_accuracy_is_of_images_right_before_and_after():
    """`random` makes some wrong images right, which do not count: image by image."""
    net, data = network(), images(200)
    x, keys = data.scaled(), torch.tensor([keys_for(0, [i]) for i in range(200)])
    names = (*SIX, "random")
    table = rows_of(measure(net, data, names, epsilon=0.2, batch_size=64))
    mended = 0
    with frozen(net):
        before = net(x).argmax(1) == data.labels
        points = dict(
            attacked(names, net, Examples(x, data.labels, keys), Attack(epsilon=0.2), (0, 1))
        )
        for name, point in points.items():
            after = net(point).argmax(1) == data.labels
            mended += int((after & ~before).sum())
            share = (before & after).double().mean().item()
            assert table[name]["accuracy"] == pytest.approx(share)
            lost = 1 - share / before.double().mean().item()
            assert table[name]["fooled"] == pytest.approx(lost)
    assert mended > 0


def test_intervals_are_wilsons():
    net, data = network(), images(60)
    for row in measure(net, data, ("fgsm",), epsilon=0.02, subset=50):
        n, p, z = row["images"], row["accuracy"], 1.959963984540054
        middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        ends = [(middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]
        assert [row["low"], row["high"]] == pytest.approx(ends)


@pytest.mark.parametrize(("at", "unit"), (("conv2", "absolute"), ("fc1", "rms")))
def test_features_are_attacked_without_a_box(at, unit):
    net, data = network(), images(30)
    blocks = dict(net.named_children())
    names = list(blocks)
    extractor = nn.Sequential(*(blocks[k] for k in names[: names.index(at) + 1]))
    classifier = nn.Sequential(*(blocks[k] for k in names[names.index(at) + 1 :]))
    with torch.no_grad():
        features = extractor(data.scaled())
    rms = features.square().mean().sqrt().item()
    epsilon = 0.2 * (rms if unit == "rms" else 1)
    table = rows_of(measure(net, data, ("fgsm", *SEARCHES), epsilon=0.2, at=at, epsilon_unit=unit))
    with frozen(net):
        attacked_features = perturb(
            Attack("fgsm", epsilon), features, lambda p: cross_entropy(classifier(p), data.labels)
        )
        clean = classifier(features).argmax(1) == data.labels
        right = clean & (classifier(attacked_features).argmax(1) == data.labels)
    assert attacked_features.min() < 0  # rectified features have no box either
    assert table["fgsm"]["accuracy"] == pytest.approx(right.double().mean().item())
    assert table["none"]["accuracy"] == pytest.approx(clean.double().mean().item())
    assert table["fgsm"]["epsilon"] == pytest.approx(epsilon)
    assert table["fgsm"]["rms"] == pytest.approx(rms)
    assert table["fgsm"]["linf"] == pytest.approx(epsilon, rel=1e-5)
    # a coordinate a search, and no box that would call for more
    assert table["sparsefool_unbounded"]["l0"] <= 20
    assert table["sparsefool_unbounded"]["fooled"] > 0.9
    # with an amplitude it is a box round the features, in their units
    assert table["sparsefool"]["linf"] == pytest.approx(epsilon, rel=1e-5)
    assert table["deepfool"]["linf"] <= epsilon * (1 + 1e-5)
    assert table["sparsefool_unbounded"]["linf"] > 2 * epsilon


def test_nothing_known_nothing_fooled():
    net, data = network(), images(10)
    with frozen(net), torch.no_grad():
        wrong = (net(data.scaled()).argmax(1) + 1) % 4
    table = rows_of(measure(net, Images(data.pixels, wrong), ("fgsm",), epsilon=0.01))
    assert table["none"]["accuracy"] == 0 and table["fgsm"]["fooled"] is None
    assert table["fgsm"]["l2"] is None and not math.isnan(table["fgsm"]["accuracy"])


@pytest.mark.parametrize("before", (True, False))
def test_convolutions_keep_the_bits_of_float32(before, monkeypatch):
    """While images are attacked; cuDNN's default, TF32, is as it was afterwards."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    net, seen = network(), []
    net.conv1.register_forward_hook(lambda *call: seen.append(torch.backends.cudnn.allow_tf32))
    measure(net, images(4), ("fgsm",), epsilon=0.05)
    assert seen and not any(seen)
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize("name", ("cnn", "resnet18"))
def test_measuring_leaves_no_trace(name):
    net = network(name=name).train()
    net[1].eval()
    net[2].requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    needs = [p.requires_grad for p in net.parameters()]
    measure(net, images(10), SIX, epsilon=0.05, at="conv2" if name == "cnn" else "layer3")
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == needs
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(ArithmeticError), frozen(net):
        assert not any(m.training for m in net.modules())
        assert not any(p.requires_grad for p in net.parameters())
        raise ArithmeticError
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == needs


def test_searches_can_have_fewer_images():
    """Their rows are those of a run of that many images; all others are as they were."""
    net, names, how = network(), ("fgsm", "sparsefool"), {"epsilon": 0.1, "seed": 3}
    whole = rows_of(measure(net, images(), names, subset=40, **how))
    found = rows_of(measure(net, images(), names, subset=40, searched=7, batch_size=5, **how))
    few = rows_of(measure(net, images(), names, subset=7, **how))
    assert found["sparsefool"] == pytest.approx(few["sparsefool"] | {"rms": whole["none"]["rms"]})
    for name in ("none", "fgsm", "all"):
        assert found[name] == pytest.approx(whole[name])
    assert (found["sparsefool"]["images"], found["fgsm"]["images"]) == (7, 40)
