"""The networks: parameters (by hand, or known), shapes, normalisation, split."""

import pytest
import torch
from torch import nn

from llm_attack.base.errors import UsageError
from llm_attack.vision.networks import NETWORKS, build, split

GREY, COLOUR = torch.tensor([0.1]), torch.tensor([0.5, 0.4, 0.3])


def network(name, channels=1, size=28, **options):
    mean = {1: GREY, 3: COLOUR}[channels]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(name, mean, mean + 0.1, size=size, **options).eval()


def cnn_parameters(channels, size):
    return (
        (channels * 9 * 32 + 32)
        + (32 * 9 * 64 + 64)
        + (64 * (size // 4) ** 2 * 128 + 128)
        + (128 * 10 + 10)
    )


# In colour, the usual CIFAR-10 forms have 11,173,962 and 6,166,250. Grey images save two thirds of
# the first convolution: 2 x 9 x 64 and 2 x 9 x 192 weights.
PARAMETERS = {
    ("cnn", 1, 28): cnn_parameters(1, 28),
    ("cnn", 3, 32): cnn_parameters(3, 32),
    ("cnn", 1, 8): cnn_parameters(1, 8),
    ("resnet18", 3, 32): 11_173_962,
    ("resnet18", 1, 28): 11_173_962 - 2 * 9 * 64,
    ("resnet18", 1, 8): 11_173_962 - 2 * 9 * 64,
    ("googlenet", 3, 32): 6_166_250,
    ("googlenet", 1, 28): 6_166_250 - 2 * 9 * 192,
    ("googlenet", 1, 8): 6_166_250 - 2 * 9 * 192,
}


@pytest.mark.parametrize(("name", "channels", "size"), PARAMETERS)
def test_parameters_and_shape(name, channels, size):
    net = network(name, channels, size)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name, channels, size]
    assert net(torch.rand(2, channels, size, size)).shape == (2, 10)


def test_the_cnn_has_the_parameters_that_were_counted_by_hand():
    assert cnn_parameters(1, 28) == 320 + 18_496 + 401_536 + 1_290
    assert cnn_parameters(3, 32) == 896 + 18_496 + 524_416 + 1_290


# Channels, height of the output of each block; the strides of the usual forms.
SHAPES = {
    "cnn": {"conv1": (32, 16), "conv2": (64, 8), "fc1": (128,), "fc2": (7,)},
    "resnet18": {
        "stem": (64, 32),
        "layer1": (64, 32),
        "layer2": (128, 16),
        "layer3": (256, 8),
        "layer4": (512, 4),
        "pool": (512,),
        "fc": (7,),
    },
    "googlenet": {
        "stem": (192, 32),
        "inception3a": (256, 32),
        "inception3b": (480, 32),
        "pool3": (480, 16),
        "inception4a": (512, 16),
        "inception4b": (512, 16),
        "inception4c": (512, 16),
        "inception4d": (528, 16),
        "inception4e": (832, 16),
        "pool4": (832, 8),
        "inception5a": (832, 8),
        "inception5b": (1024, 8),
        "pool": (1024,),
        "fc": (7,),
    },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_and_their_outputs(name):
    net = network(name, 3, 32, classes=7)
    x = torch.rand(1, 3, 32, 32)
    assert [k for k, _ in net.named_children()] == ["normalise", *SHAPES[name]]
    for key, block in net.named_children():
        x = block(x)
        if key != "normalise":
            assert x.shape == (1, *SHAPES[name][key][:1], *SHAPES[name][key][1:] * 2)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_pixels_are_normalised_inside(name):
    net, x = network(name, 3, 8), torch.rand(2, 3, 8, 8)
    mean = torch.tensor([0.5, 0.4, 0.3]).reshape(3, 1, 1)
    assert torch.allclose(net.normalise(x), (x - mean) / (mean + 0.1))
    assert torch.allclose(net[1:](net.normalise(x)), net(x))
    assert {"normalise.mean", "normalise.std"} <= set(net.state_dict())


@pytest.mark.parametrize(("width", "factor"), ((0.25, 1 / 4), (2.0, 2)))
def test_width_scales_every_layer(width, factor):
    for name in NETWORKS:
        whole, scaled = network(name, size=8), network(name, size=8, width=width)
        pairs = list(zip(whole.modules(), scaled.modules(), strict=True))
        convs = [(a, b) for a, b in pairs if isinstance(a, nn.Conv2d)]
        assert convs
        for a, b in convs:
            assert b.out_channels == factor * a.out_channels
        assert scaled(torch.rand(1, 1, 8, 8)).shape == (1, 10)
    assert network("resnet18", size=8, width=1e-3)(torch.rand(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize("name", NETWORKS)
def test_split_anywhere_is_the_network(name):
    net, x = network(name, size=8, width=0.1), torch.rand(3, 1, 8, 8)
    blocks = [k for k, _ in net.named_children()]
    for at in blocks[:-1]:
        extractor, classifier = split(net, at)
        assert torch.equal(classifier(extractor(x)), net(x))
        assert [k for k, _ in extractor.named_children()][-1] == at
    shared = {p.data_ptr() for p in net.parameters()}
    assert {p.data_ptr() for p in classifier.parameters()} <= shared


@pytest.mark.parametrize(
    ("at", "end"), (("layer_3", "; did you mean 'layer3'?"), ("fc", "pool"), ("conv1", "pool"))
)
def test_no_such_split_point(at, end):
    with pytest.raises(UsageError) as caught:
        split(network("resnet18", size=8, width=0.1), at)
    message = str(caught.value)
    assert message.startswith(f"at={at}: must be one of normalise, stem, layer1, layer2")
    assert message.endswith(end) and "\n" not in message
    assert "fc" not in message.split("must be")[1]  # nothing comes after it


def test_no_such_network():
    with pytest.raises(UsageError, match=r"network=resnet_18: .* did you mean 'resnet18'"):
        network("resnet_18")


@pytest.mark.parametrize("width", (0, -1, float("nan")))
def test_bad_width(width):
    with pytest.raises(UsageError, match="width="):
        network("cnn", width=width)


def test_residual_blocks_add_their_input():
    net = network("resnet18", size=8, width=0.1)
    for block in (net.layer1[1], net.layer2[0]):
        last = [m for m in block.body if isinstance(m, nn.BatchNorm2d)][-1]
        nn.init.zeros_(last.weight)  # nothing comes out of the convolutions
        x = torch.rand(1, block.body[0].in_channels, 8, 8) - 0.5
        assert torch.equal(block(x), torch.relu(block.shortcut(x)))
        assert (len(block.shortcut) == 0) == (block is net.layer1[1])


def test_inception_branches_stand_side_by_side():
    block = network("googlenet", size=8, width=0.1).inception3a
    x = torch.rand(2, block.branches[0][0].in_channels, 8, 8)
    one, three, five, pool = (branch(x) for branch in block.branches)
    assert torch.equal(block(x), torch.cat((one, three, five, pool), dim=1))
    assert [x.shape[1] for x in (one, three, five, pool)] == [6, 13, 3, 3]
    assert min(x.min() for x in (one, three, five, pool)) == 0  # rectified
    kernels = [[m.kernel_size[0] for m in b if isinstance(m, nn.Conv2d)] for b in block.branches]
    assert kernels == [[1], [1, 3], [1, 3, 3], [1]]


@pytest.mark.parametrize(
    ("processor", "width", "last"),
    [("AVX2", 0.1, False), ("AVX2", 0.25, True), ("AVX512", 0.1, True), ("DEFAULT", 0.1, True)],
)
def test_layout_in_memory(processor, width, last, monkeypatch):
    """Channels last; but not few of them where oneDNN's kernels write beyond their end."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    net = build("resnet18", torch.zeros(1), torch.ones(1), size=8, width=width)
    seen = []
    net[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for form in (torch.channels_last, torch.contiguous_format):
        net(torch.rand(2, 1, 8, 8).to(memory_format=form))
    plain = (64, 64, 8, 1)
    weights = [m.weight for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights[1:4]) == last
    assert all((x.stride() == plain) == (not last) for x in seen)
