"""Data sets: pixels and labels, augmentation, and refused input."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from llm_attack.base.errors import UsageError
from llm_attack.vision import data
from llm_attack.vision.data import Images, augment
from llm_attack.vision.settings import ImageSettings


def load(name, **settings):
    return data.load_dataset(name, ImageSettings(**settings))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """write(pixels, split, label, name): a PNG in an image folder, whose name is returned."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def write(pixels, split="train", label="cat", name="0", suffix="png", mode=None):
        path = tmp_path / "images" / split / label
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels, mode).save(path / f"{name}.{suffix}")
        return f"imagefolder:{tmp_path / 'images'}"

    return write


def both(write, *shape):
    """An image folder of two classes, two images of each in each split; and the pixels."""
    pixels, name = {}, ""
    for i, split in enumerate(("train", "test")):
        for j, label in enumerate(("cat", "dog")):
            for k in range(2):
                pixels[split, j, k] = noise(*shape, seed=100 * i + 10 * j + k)
                name = write(pixels[split, j, k], split, label, str(k))
    return name, pixels


def test_digits():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    got = load("digits")
    assert (len(got.train), len(got.test), got.shape) == (1397, 400, (1, 8))
    assert got.classes == tuple("0123456789")

    def pairs(pixels, labels):
        return sorted((tuple(p.flatten()), label) for p, label in zip(pixels, labels, strict=True))

    pixels = torch.cat((got.train.pixels, got.test.pixels))
    labels = torch.cat((got.train.labels, got.test.labels))
    levels = (pixels.float() * 16 / 255).round().int()  # 0 to 16, as scikit-learn has them
    assert pairs(levels.numpy(), labels.tolist()) == pairs(
        bunch.images.astype(np.int32), bunch.target.tolist()
    )
    assert pixels.max() == 255 and pixels.min() == 0
    again = load("digits", seed=1)
    # another order of the same split
    assert not torch.equal(again.test.pixels, got.test.pixels)
    assert torch.equal(again.test.labels.bincount(), got.test.labels.bincount())
    assert torch.equal(again.test.pixels.sum(), got.test.pixels.sum())


def test_sizes_and_seed():
    whole, part = load("digits", seed=3), load("digits", train_size=50, test_size=20, seed=3)
    assert (len(part.train), len(part.test)) == (50, 20)
    assert torch.equal(part.train.pixels, whole.train.pixels[:50])
    assert torch.equal(part.test.labels, whole.test.labels[:20])
    other = load("digits", train_size=50, seed=4)
    assert not torch.equal(other.train.pixels, part.train.pixels)


@pytest.mark.parametrize("shape", ((28, 28), (32, 32, 3), (12, 12)))
def test_an_image_folder_has_the_pixels_that_were_written(folder, shape):
    name, pixels = both(folder, *shape)
    got = load(name)
    assert got.classes == ("cat", "dog")
    assert got.shape == (3 if len(shape) == 3 else 1, shape[0])
    for split, images in (("train", got.train), ("test", got.test)):
        assert images.pixels.dtype == torch.uint8 and images.labels.dtype == torch.int64
        seen = {
            (int(label), p.permute(1, 2, 0).numpy().tobytes())
            for p, label in zip(images.pixels, images.labels, strict=True)
        }
        wanted = {(j, p.tobytes()) for (s, j, _), p in pixels.items() if s == split}
        assert seen == wanted


def test_splits_as_datasets_writes_them(folder):
    for i in range(10):
        name = folder(noise(8, 8, seed=i), "train", "cat" if i % 2 else "dog", str(i))
    got = load(name, train_split="train[:70%]", test_split="train[70%:]")
    assert (len(got.train), len(got.test)) == (7, 3)


def test_other_images_are_resized_with_a_notice(folder, caplog):
    name, _ = both(folder, 48, 60, 3)
    got = load(name)
    assert got.shape == (3, 32)
    assert "8 images were cut to squares and resized to 32 x 32" in caplog.text
    # cut, not squeezed: a white strip at each side of 2:1 is gone
    wide = np.zeros((40, 60), np.uint8)
    wide[:, :10] = wide[:, 50:] = 255
    folder(wide, "test", "dog", "9")
    assert load(name).test.pixels.shape == (5, 3, 32, 32)


def test_all_images_are_as_the_first(folder):
    name, _ = both(folder, 16, 16)
    folder(noise(20, 20, 3, seed=9), "test", "dog", "9")
    assert load(name).test.pixels.shape == (5, 1, 16, 16)


def test_cutting_keeps_the_middle(folder):
    wide = np.zeros((32, 48), np.uint8)
    wide[:, :8] = wide[:, 40:] = 255
    for split in ("train", "test"):
        name = folder(wide, split, "cat", "0")
        folder(wide, split, "dog", "0")
    assert load(name).train.pixels.max() == 0


@pytest.mark.parametrize("size", ((7, 20), (20, 41)), ids=str)
def test_images_that_are_no_squares_by_far_are_refused(folder, size):
    name, _ = both(folder, 20, 20)
    folder(noise(*size), "test", "dog", "9")
    with pytest.raises(UsageError, match=rf"an image of {size[1]} x {size[0]}: must be at least 8"):
        load(name)


def test_images_of_16_bits_are_refused(folder):
    name, _ = both(folder, 20, 20)
    folder(noise(20, 20).astype(np.uint16) * 256, "test", "dog", "9")
    with pytest.raises(UsageError, match="of 8 bits a channel, not 'I;16'"):
        load(name)


def test_a_file_that_is_no_image(folder, tmp_path):
    name, _ = both(folder, 20, 20)
    (tmp_path / "images" / "test" / "dog" / "9.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="cannot be read"):
        load(name)


def table(tmp_path, split="train", **columns):
    """A parquet file of images (bytes) and other columns; the name to load it by."""
    import datasets

    n = len(next(iter(columns.values())))
    images = [Image.fromarray(noise(8, 8, seed=i)) for i in range(n)]
    made = datasets.Dataset.from_dict({"picture": images, **columns})
    made = made.cast_column("picture", datasets.Image())
    made.to_parquet(tmp_path / "table" / f"{split}.parquet")
    return str(tmp_path / "table")


def test_columns_of_other_names_and_labels_that_are_texts(tmp_path, folder):
    table(tmp_path, "train", kind=["b", "a", "c", "a"], weight=[0.5] * 4)
    name = table(tmp_path, "test", kind=["c", "b"], weight=[0.5] * 2)
    got = load(name, label_column="kind", seed=2)
    assert got.classes == ("a", "b", "c")
    first = {noise(8, 8, seed=i).tobytes(): label for i, label in enumerate((1, 0, 2, 0))}
    for pixels, label in zip(got.train.pixels, got.train.labels, strict=True):
        assert first[pixels.numpy().tobytes()] == label
    assert sorted(got.test.labels.tolist()) == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"label_column": "knd"}, "label-column=knd: must be one of kind, weight; .*'kind'"),
        ({"image_column": "pictur"}, "image-column=pictur: must be one of picture; .*'picture'"),
        ({"image_column": "kind"}, "image-column=kind: must be one of picture"),
        ({"label_column": "weight"}, "label-column='weight': must be a column of class labels"),
        ({}, "label-column=label: must be one of kind, weight"),
        ({"label_column": "kind", "test_split": "tst"}, "test-split=tst: .* did you mean 'test'"),
        ({"label_column": "kind", "train_split": "dev"}, "train-split=dev: must be one of"),
        ({"label_column": "kind", "train_split": "train[:x]"}, r"train-split='train\[:x\]': must"),
        (
            {"label_column": "kind", "test_split": "test[:1%]"},
            r"test-split='test\[:1%\]': .*images",
        ),
    ),
    ids=str,
)
def test_bad_columns_and_splits(tmp_path, folder, options, message):
    table(tmp_path, "train", kind=["b", "a"], weight=[0.5] * 2)
    name = table(tmp_path, "test", kind=["b", "a"], weight=[0.5] * 2)
    with pytest.raises(UsageError, match=message) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)


def test_no_column_of_images(tmp_path, folder):
    import datasets

    for split in ("train", "test"):
        made = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
        made.to_parquet(tmp_path / "table" / f"{split}.parquet")
    with pytest.raises(UsageError, match=r"image-column=None: must be .* has none"):
        load(str(tmp_path / "table"))


@pytest.mark.parametrize("bad", ("d", None))
def test_labels_out_of_range(tmp_path, folder, bad):
    table(tmp_path, "train", label=["b", "a", "c"])
    name = table(tmp_path, "test", label=["a", bad])
    with pytest.raises(UsageError, match=f"label-column=label: row 1 is {bad!r}: .* 'a' to 'c'"):
        load(name)


def test_class_labels_out_of_range(tmp_path, folder):
    import datasets

    for split, labels in (("train", [0, 1]), ("test", [0, -1])):
        images = [Image.fromarray(noise(8, 8, seed=i)) for i in range(2)]
        kinds = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])}
        )
        made = datasets.Dataset.from_dict({"image": images, "label": labels}, features=kinds)
        made.to_parquet(tmp_path / "table" / f"{split}.parquet")
    with pytest.raises(UsageError, match=r"label-column=label: row 1 is -1: .* 0 to 1"):
        load(str(tmp_path / "table"))


def test_a_single_class(tmp_path, folder):
    table(tmp_path, "train", label=["a", "a"])
    with pytest.raises(UsageError, match="label-column=label: must have two classes or more"):
        load(table(tmp_path, "test", label=["a"]))


@pytest.mark.parametrize(("name", "meant"), (("mnst", "'mnist'"), ("/no/such/folder", "digits")))
def test_unknown_data_set(name, meant):
    with pytest.raises(UsageError) as caught:
        load(name)
    message = str(caught.value)
    assert message.startswith(f"dataset={name}: must be digits, mnist, cifar10, imagefolder:PATH")
    assert meant in message and "\n" not in message


def test_pixels_in_the_unit_interval_and_their_moments():
    pixels = torch.from_numpy(noise(6, 3, 9, 9))
    pixels[:, 2] = 7
    images = Images(pixels, torch.arange(6))
    x = images.scaled()
    assert torch.equal(x, pixels.float() / 255) and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    mean, std = images.moments()
    assert torch.allclose(mean, x.mean((0, 2, 3)))
    assert torch.allclose(std[:2], x[:, :2].transpose(0, 1).flatten(1).std(1, correction=0))
    assert std[2] == 1  # of a channel that never changes
    assert images[torch.tensor([4, 1])].labels.tolist() == [4, 1]


@pytest.mark.parametrize("flip", (False, True))
@pytest.mark.parametrize("crop", (0, 1, 3))
def test_augmented_images_are_shifted_and_mirrored_ones(crop, flip):
    x = torch.from_numpy(noise(600, 2, 6, 6)) | 1  # no zero but for the padding
    turned = torch.arange(600) % 3 == 0 if flip else None
    got = augment(x, rng(), crop=crop, flip=turned)
    assert got.shape == x.shape and got.dtype == x.dtype
    padded = torch.nn.functional.pad(x, (crop,) * 4)
    seen = set()
    for i, (image, before) in enumerate(zip(got, padded, strict=True)):
        ways = {
            (row, column, mirrored)
            for row in range(2 * crop + 1)
            for column in range(2 * crop + 1)
            for mirrored in (False, True)
            if torch.equal(
                image.flip(2) if mirrored else image,
                before[:, row : row + 6, column : column + 6],
            )
        }
        assert len(ways) == 1 and {way[2] for way in ways} == {flip and i % 3 == 0}
        seen |= ways
    # with 600 images, all ways turn up
    assert len(seen) == (2 * crop + 1) ** 2 * (2 if flip else 1)
    assert torch.equal(augment(x, rng(), crop=crop, flip=turned), got)


def test_mnist_and_cifar10_offline(monkeypatch):
    if "LLM_ATTACK_TEST_DATA" not in os.environ:
        pytest.skip("LLM_ATTACK_TEST_DATA is not set: no offline MNIST and CIFAR-10")
    import datasets

    for name, shape in (("mnist", (1, 28)), ("cifar10", (3, 32))):
        got = load(name, train_size=30, test_size=20)
        assert got.shape == shape and len(got.classes) == 10
        table = datasets.load_dataset(data.NAMES[name], split="test")
        rows = torch.randperm(10_000, generator=rng(0))[:20].tolist()
        column = "image" if name == "mnist" else "img"
        for i, row in enumerate(rows):
            image = np.asarray(table[row][column])
            pixels = got.test.pixels[i].permute(1, 2, 0).numpy().reshape(image.shape)
            assert np.array_equal(pixels, image) and got.test.labels[i] == table[row]["label"]
