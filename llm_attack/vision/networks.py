"""The networks of the image experiments, as chains of named blocks that can be split anywhere.

They are a 4-layer CNN, and ResNet-18 and GoogLeNet in the usual forms for images of 32 x 32, with
no stride and no pooling in the stem. All take pixels in [0, 1] and normalise them, so attacks
perturb pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from llm_attack.base.errors import UsageError, invalid

# Channels that fill a register of AVX2.
_LANES = 8
# The largest width. Beyond it, sizes of weights in bytes exceed 64-bit numbers.
WIDEST = 1000.0


class Normalise(nn.Module):
    """(x - mean) / std per channel. Both are buffers: stored with the weights, but no parameters.

    The output has the memory layout `layout`, whatever the input has.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, layout: torch.memory_format) -> None:
        super().__init__()
        self.layout = layout
        self.register_buffer("mean", mean.reshape(-1, 1, 1))
        self.register_buffer("std", std.reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        # a clone, because with one channel torch cannot tell the layouts apart
        return ((x - self.mean) / self.std).clone(memory_format=self.layout)


def build(
    name: str,
    mean: Tensor,
    std: Tensor,
    *,
    size: int,
    classes: int = 10,
    width: float = 1.0,
) -> nn.Sequential:
    """An untrained network of `NETWORKS`. Torch's generator draws its weights.

    Args:
        name: a key of `NETWORKS`.
        mean: (channels,) mean of the training images.
        std: (channels,) standard deviation of the training images.
        size: height and width of the images: a multiple of 4, at least 8.
        classes: number of classes.
        width: factor on the channels of every layer, which has at least one.

    Returns:
        A chain of named blocks from (N, channels, size, size) in [0, 1] to (N, classes) scores.

    Raises:
        UsageError: there is no such network, or the width is not positive or too large.
    """
    if name not in NETWORKS:
        raise invalid("network", name, NETWORKS)
    if not 0 < width <= WIDEST:
        raise invalid("width", width, f"a number greater than 0, at most {WIDEST:g}")

    def wide(n: int) -> int:
        return max(1, round(n * width))

    blocks = NETWORKS[name](wide, len(mean), size, classes)
    layout = _layout(blocks.values())
    network = OrderedDict({"normalise": Normalise(mean, std, layout), **blocks})
    return nn.Sequential(network).to(memory_format=layout)  # type: ignore[call-overload, no-any-return]


def _layout(blocks: Iterable[nn.Module]) -> torch.memory_format:
    """Channels last, which is faster, unless oneDNN is wrong.

    Its AVX2 kernels for this layout write beyond the end of tensors with fewer channels than a
    register holds, and the process dies (torch 2.13).
    """
    convolutions = (m for block in blocks for m in block.modules() if isinstance(m, nn.Conv2d))
    narrow = min((m.out_channels for m in convolutions), default=_LANES) < _LANES
    avx2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
    return torch.contiguous_format if narrow and avx2 else torch.channels_last


def split(network: nn.Module, at: str) -> tuple[nn.Sequential, nn.Sequential]:
    """(extractor, classifier): the blocks up to and including `at`, and the blocks after it.

    Both share the weights of `network`.

    Raises:
        UsageError: there is no such block, nothing comes after it, or the network is no chain.
    """
    if not isinstance(network, nn.Sequential):
        kind = type(network).__name__
        raise UsageError(
            f"at={at}: the network must be a torch.nn.Sequential of blocks, not {kind}"
        )
    names = [name for name, _ in network.named_children()]
    if at not in names[:-1]:
        raise invalid("at", at, names[:-1])
    blocks, end = OrderedDict(network.named_children()), names.index(at) + 1
    extractor, classifier = list(blocks.items())[:end], list(blocks.items())[end:]
    return nn.Sequential(OrderedDict(extractor)), nn.Sequential(OrderedDict(classifier))


def _cnn(wide: Wide, channels: int, size: int, classes: int) -> Blocks:
    """Two convolutions and two fully connected layers."""
    first, second, hidden = wide(32), wide(64), wide(128)

    def conv(before: int, after: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))

    return {
        "conv1": conv(channels, first),
        "conv2": conv(first, second),
        "fc1": nn.Sequential(nn.Flatten(), nn.Linear(second * (size // 4) ** 2, hidden), nn.ReLU()),
        "fc2": nn.Linear(hidden, classes),
    }


def _conv_bn(
    before: int, after: int, kernel: int, stride: int = 1, bias: bool = False
) -> list[nn.Module]:
    """A convolution that keeps the size, except for its stride, and batch normalisation."""
    conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=bias)
    return [conv, nn.BatchNorm2d(after)]


class _Residual(nn.Module):
    """The basic block of He et al. 2016: two convolutions and a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv_bn(before, after, 3, stride), nn.ReLU(), *_conv_bn(after, after, 3)
        )
        same = stride == 1 and before == after
        self.shortcut = nn.Sequential(*([] if same else _conv_bn(before, after, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _resnet18(wide: Wide, channels: int, size: int, classes: int) -> Blocks:
    """He et al. 2016, for CIFAR-10: a stem of one 3 x 3 convolution, 64 to 512 channels."""
    widths = [wide(n) for n in (64, 64, 128, 256, 512)]
    blocks: Blocks = {"stem": nn.Sequential(*_conv_bn(channels, widths[0], 3), nn.ReLU())}
    for i in range(1, 5):
        blocks[f"layer{i}"] = nn.Sequential(
            _Residual(widths[i - 1], widths[i], stride=1 if i == 1 else 2),
            _Residual(widths[i], widths[i], stride=1),
        )
    return {**blocks, **_head(widths[-1], classes)}


# Channels of the branches of each inception block: 1x1; 3x3 reduced, 3x3; 5x5 reduced, 5x5; pool.
# Table 1 of Szegedy et al. 2015.
_INCEPTION = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}


class _Inception(nn.Module):
    """Four parallel branches. Two convolutions of 3 x 3 replace the one of 5 x 5."""

    def __init__(self, before: int, branches: list[int]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pool = branches

        def chain(*layers: tuple[int, int, int]) -> list[nn.Module]:
            return [part for layer in layers for part in (*_conv_bn(*layer, bias=True), nn.ReLU())]

        self.branches = nn.ModuleList(
            (
                nn.Sequential(*chain((before, one, 1))),
                nn.Sequential(*chain((before, reduce3, 1), (reduce3, three, 3))),
                nn.Sequential(*chain((before, reduce5, 1), (reduce5, five, 3), (five, five, 3))),
                nn.Sequential(nn.MaxPool2d(3, 1, padding=1), *chain((before, pool, 1))),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def _googlenet(wide: Wide, channels: int, size: int, classes: int) -> Blocks:
    """Szegedy et al. 2015, for CIFAR-10: a stem of one 3 x 3 convolution, batch normalisation."""
    before = wide(192)
    blocks: Blocks = {
        "stem": nn.Sequential(*_conv_bn(channels, before, 3, bias=True), nn.ReLU()),
    }
    for name, widths in _INCEPTION.items():
        if name in ("inception4a", "inception5a"):
            blocks[f"pool{int(name[9]) - 1}"] = nn.MaxPool2d(3, 2, padding=1)
        branches = [wide(n) for n in widths]
        blocks[name] = _Inception(before, branches)
        before = sum(branches[i] for i in (0, 2, 4, 5))
    return {**blocks, **_head(before, classes)}


def _head(before: int, classes: int) -> Blocks:
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return {"pool": pool, "fc": nn.Linear(before, classes)}


Wide = Callable[[int], int]
Blocks = dict[str, nn.Module]

NETWORKS: dict[str, Callable[[Wide, int, int, int], Blocks]] = {
    "cnn": _cnn,
    "resnet18": _resnet18,
    "googlenet": _googlenet,
}
