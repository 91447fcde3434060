"""Image data sets as tensors on the device. They are decoded once, and augmented in batches.

It knows all data sets that `datasets` loads, and scikit-learn's digits, which need no download.
"""

from __future__ import annotations

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_attack.base.errors import UsageError, closest, invalid
from llm_attack.base.failures import one_line
from llm_attack.vision.settings import ImageSettings

log = logging.getLogger(__name__)

NAMES = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}
_SIZES = range(8, 65, 4)  # sizes of squares that the networks take without resizing
_RESIZED = 32  # new size of other images
_MODES = {"1": "L", "L": "L", "LA": "L"}  # Pillow's modes that are read as grey; others as RGB


@dataclass(frozen=True)
class Images:
    """Pixels (N, C, H, W) as uint8 and labels (N,) as int64, both on the device."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Any) -> Images:
        return Images(self.pixels[rows], self.labels[rows])

    def scaled(self) -> Tensor:
        """The pixels in [0, 1], float32, channels last in memory."""
        return self.pixels.to(memory_format=torch.channels_last).float() / 255

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (C,), of pixels in [0, 1]."""
        values = torch.arange(256, device=self.pixels.device)
        counts = torch.stack([c.flatten().bincount(minlength=256) for c in self.pixels.unbind(1)])
        share = counts.double() / counts.sum(1, keepdim=True)
        mean = (share * values).sum(1)
        variance = (share * (values - mean[:, None]) ** 2).sum(1)
        # constant channels are not scaled
        std = torch.where(variance > 0, variance.sqrt() / 255, 1.0)
        return (mean / 255).float(), std.float()


@dataclass(frozen=True)
class Dataset:
    """Two splits of images of one size, and the names of their classes."""

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images

    @property
    def shape(self) -> tuple[int, int]:
        """Number of channels, and size of the images."""
        return self.train.pixels.shape[1], self.train.pixels.shape[2]


def load_dataset(name: str, settings: ImageSettings) -> Dataset:
    """Loads a data set onto the device, with the splits, sizes and columns of `settings`.

    Args:
        name: `digits` (scikit-learn's), a key of `NAMES`, `imagefolder:PATH`, or any other name
            that `datasets` loads, with its configuration after a colon if it has several.
        settings: the settings. If they ask for fewer images, `seed` draws them.

    Raises:
        UsageError: the data set, a split or a column does not exist, labels are out of range, or
            images cannot be brought to one size.
    """
    if not name:
        raise UsageError("dataset=: must name a data set, such as digits, mnist or cifar10")
    sizes = (settings.train_size, settings.test_size)
    if name == "digits":
        classes, wholes = _digits()
        parts = [x[_drawn(len(x), n, settings.seed)] for x, n in zip(wholes, sizes, strict=True)]
    else:
        tables = _open(name, settings.train_split, settings.test_split)
        image, label = _columns(tables[0], settings.image_column, settings.label_column)
        classes, labels = _labels(tables, label)
        rows = [_drawn(len(x), n, settings.seed) for x, n in zip(tables, sizes, strict=True)]
        pixels = _decoded([x.select(r) for x, r in zip(tables, rows, strict=True)], image)
        parts = [Images(p, y[r]) for p, y, r in zip(pixels, labels, rows, strict=True)]
    device = settings.device or "cpu"
    train, test = (Images(x.pixels.to(device), x.labels.to(device)) for x in parts)
    return Dataset(name, classes, train, test)


def augment(
    x: Tensor, generator: torch.Generator, *, crop: int = 0, flip: Tensor | None = None
) -> Tensor:
    """Shifts each image of (N, C, H, W) by up to `crop` pixels, pads with zeros, and mirrors it.

    Args:
        x: the images.
        generator: generator of the draws, on the device of `x`.
        crop: pixels of padding on each side. A random part of the original size is cut out.
        flip: (N,) whether to mirror each image, left to right; None: no image.
    """
    n, _, height, width = x.shape

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n, 1), generator=generator, device=x.device)

    rows = draw(2 * crop + 1) + torch.arange(height, device=x.device)
    columns = draw(2 * crop + 1) + torch.arange(width, device=x.device)
    if flip is not None:
        columns = torch.where(flip[:, None], columns.flip(1), columns)
    padded = torch.nn.functional.pad(x, (crop,) * 4).permute(0, 2, 3, 1)
    images = torch.arange(n, device=x.device)[:, None, None]
    return padded[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _drawn(n: int, size: int | None, seed: int) -> list[int]:
    """`size` numbers from 0 to n - 1, or all, in random order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[:size].tolist()


def _digits() -> tuple[tuple[str, ...], list[Images]]:
    """1,397 and 400 grey images of 8 x 8. The split is ours, and the same in every run."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    pixels = np.rint(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    parts = train_test_split(pixels, labels, test_size=400, stratify=labels, random_state=0)
    train, test, train_labels, test_labels = map(torch.from_numpy, parts)
    return tuple("0123456789"), [Images(train, train_labels), Images(test, test_labels)]


def _open(name: str, train_split: str, test_split: str) -> list[Any]:
    """The two splits as `datasets` reads them."""
    import datasets

    path, _, rest = NAMES.get(name, name).partition(":")
    options = {"data_dir": rest} if path == "imagefolder" else {"name": rest or None}
    try:
        whole = datasets.load_dataset(path, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        known = ["digits", *NAMES, "imagefolder"]
        meant = closest(path, known)
        hint = f"did you mean {meant!r}?" if meant and meant != path else "digits needs no network"
        raise UsageError(
            f"dataset={name}: must be digits, {', '.join(NAMES)}, imagefolder:PATH or another that "
            f"`datasets` loads; {hint} ({one_line(error)})"
        ) from error
    splits = []
    for argument, split in (("train-split", train_split), ("test-split", test_split)):
        base = re.split(r"\W", split)[0]
        if base not in whole:
            raise invalid(argument, split, list(whole))
        wanted = "a split with images, as `datasets` writes it: train[:90%]"
        try:
            parts = whole[base]
            if split != base:
                parts = datasets.load_dataset(path, split=split, **options)
        except ValueError as error:
            raise invalid(argument, split, f"{wanted} ({one_line(error)})") from error
        if not len(parts):
            raise invalid(argument, split, wanted)
        splits.append(parts)
    return splits


def _columns(table: Any, image: str | None, label: str | None) -> tuple[str, str]:
    """The names of the columns of images and labels. The arguments are used if they are given."""
    import datasets

    features = table.features
    images = [k for k, kind in features.items() if isinstance(kind, datasets.Image)]
    named = [k for k, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if image is None and images:
        image = images[0]
    if image not in images:
        raise invalid("image-column", image, images or "a column of images; this data set has none")
    assert image is not None
    if label is None:
        label = named[0] if named else "label"
    if label not in features:
        raise invalid("label-column", label, [k for k in features if k != image])
    return image, label


def _labels(tables: list[Any], column: str) -> tuple[tuple[str, ...], list[Tensor]]:
    """The classes, and each row's class as a number; without class names, the sorted values."""
    import datasets

    kind = tables[0].features[column]
    columns = [table[column][:] for table in tables]
    if isinstance(kind, datasets.ClassLabel):
        names, values = kind.names, list(range(kind.num_classes))
    else:
        if not isinstance(columns[0][0], (int, str)):
            raise invalid("label-column", column, "a column of class labels, integers or texts")
        values = sorted(set(columns[0]))
        names = [str(value) for value in values]
    if len(names) < 2:
        raise UsageError(f"label-column={column}: must have two classes or more")
    number = {value: i for i, value in enumerate(values)}
    for labels in columns:
        for row, value in enumerate(labels):
            if value not in number:
                raise UsageError(
                    f"label-column={column}: row {row} is {value!r}: must be one of the "
                    f"{len(values)} classes of the training images, {values[0]!r} to {values[-1]!r}"
                )
    return tuple(names), [torch.tensor([number[v] for v in labels]) for labels in columns]


def _decoded(tables: list[Any], column: str) -> list[Tensor]:
    """The images of each table as (N, C, size, size) uint8, in the form of the first image."""
    import datasets

    reader = datasets.Image()
    encoded = [t.cast_column(column, datasets.Image(decode=False))[column][:] for t in tables]

    def read(row: dict[str, Any]) -> Any:
        try:
            return reader.decode_example(row)
        except OSError as error:
            raise UsageError(
                f"image-column={column}: an image cannot be read: {one_line(error)}"
            ) from error

    first = read(encoded[0][0])
    mode = _MODES.get(first.mode, "RGB")
    fits = first.width == first.height and first.width in _SIZES
    size = first.width if fits else _RESIZED
    resized = 0

    def decode(row: dict[str, Any]) -> np.ndarray:
        nonlocal resized
        from PIL import ImageOps

        image = read(row)
        short, long = sorted(image.size)
        if short < _SIZES[0] or long > 2 * short:
            shape = f"{image.width} x {image.height}"
            wanted = f"at least {_SIZES[0]} on each side, and at most twice as long as wide"
            raise UsageError(f"image-column={column}: an image of {shape}: must be {wanted}")
        if image.mode.startswith(("I", "F")):
            raise invalid("image-column", column, f"of 8 bits a channel, not {image.mode!r}")
        image = image.convert(mode)
        if image.size != (size, size):
            resized += 1
            image = ImageOps.fit(image, (size, size))
        pixels: np.ndarray = np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)
        return pixels

    def many(rows: list[dict[str, Any]]) -> np.ndarray:
        return np.stack([decode(row) for row in rows])

    with ThreadPoolExecutor() as pool:  # one thread per image would cost as much as decoding
        chunks = [[rows[i : i + 500] for i in range(0, len(rows), 500)] for rows in encoded]
        arrays = [np.concatenate(list(pool.map(many, part))) for part in chunks]
    if resized:
        log.warning("%d images were cut to squares and resized to %d x %d", resized, size, size)
    return [torch.from_numpy(array) for array in arrays]
