"""Fig. 1, 2 and 5: complete files, recorded settings, bad input refused before any work."""

import io
import itertools
import json
import re
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from llm_attack.base.drawing import new_figure
from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.vision import data, fig1, fig2, fig5, stages
from llm_attack.vision.settings import Amplitude

SIX = ("ost", "fgsm", "bim", "illc", "pgd", "sparsefool")
USUAL = (*SIX, "sparsefool_unbounded")
SMALL = {"width": 0.1, "epochs": 2, "train_size": 128, "test_size": 40, "batch_size": 16}
CONDITIONS = ["none", *USUAL, "lowest", "highest", "all"]


def invoke(*arguments):
    return CliRunner().invoke(main, ["reproduce", *arguments])


def small():
    return [part for key, value in SMALL.items() for part in (f"--{key}", str(value))]


def figures_are_there(folder):
    for suffix in ("png", "svg"):
        assert (folder / f"figure.{suffix}").stat().st_size > 5000
    with Image.open(folder / "figure.png") as image:
        assert min(image.size) > 300
    assert "absolute" not in (folder / "figure.svg").read_text()


def test_three_commands():
    assert [f.COMMAND.name for f in (fig1, fig2, fig5)] == ["fig1", "fig2", "fig5"]


def test_fig2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(
        "fig2", *small(), "--network", "cnn,resnet18", "--epsilon", "8/255", "--subset", "10",
        "--seed", "3", "-o", "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out"
    figures_are_there(folder)
    table = pd.read_csv(folder / "table.csv")
    keys = table[["dataset", "network", "epoch", "condition"]].values.tolist()
    assert keys == [
        ["digits", n, e, c] for n in ("cnn", "resnet18") for e in (1, 2) for c in CONDITIONS
    ]
    whole = table["condition"] == "all"
    assert (table["images"][~whole] == 10).all() and (table["images"][whole] == 40).all()
    assert (table["low"] <= table["accuracy"]).all() and (table["accuracy"] <= table["high"]).all()
    # an attack mends nothing: what was wrong before does not count as right
    assert (table["accuracy"] <= table["before"])[~whole].all()
    assert table["epsilon"].unique() == pytest.approx([8 / 255], rel=1e-5)
    for _, group in table.groupby(["network", "epoch"]):
        accuracy = group.set_index("condition")["accuracy"]
        assert accuracy["lowest"] == accuracy[list(SIX)].min()
        assert accuracy["highest"] == accuracy[list(SIX)].max()

    record = json.loads((folder / "run.json").read_text())
    assert record["settings"]["subset"] == 10 and record["settings"]["train_size"] == 128
    assert record["settings"]["seed"] == 3
    last = table[(table["network"] == "resnet18") & (table["epoch"] == 2)]
    found = record["results"]["digits-resnet18"]
    assert list(found["accuracy"]) == CONDITIONS
    assert list(found["accuracy"].values()) == pytest.approx(last["accuracy"], abs=1e-4)
    assert (found["train_images"], found["test_images"], found["epochs"]) == (128, 40, 2)
    assert found["width"] == SMALL["width"]
    assert found["epsilon"] == 8 / 255 and found["precision"] == "float32"
    assert (table["precision"] == "float32").all()
    assert set(record["seconds"]) == {
        "data", "digits-cnn training", "digits-cnn attacks", "digits-resnet18 training",
        "digits-resnet18 attacks", "all",
    }  # fmt: skip
    assert record["command"].startswith("llm-attack reproduce fig2 --preset quick")
    assert str(tmp_path) not in (folder / "run.json").read_text()
    lines = [x for x in result.output.splitlines() if x.startswith("digits-cnn: epoch 2 of 2")]
    assert len(lines) == 1 and re.search(r"none 0\.\d+, ost 0\.\d+", lines[0])


@pytest.mark.slow
def test_the_same_command_gives_the_same_files(tmp_path):
    """And so does drawing anew from the CSV file."""
    for name in ("one", "two"):
        assert (
            invoke("fig2", *small(), "--network", "cnn", "-o", str(tmp_path / name)).exit_code == 0
        )
    for figure in (tmp_path / "two").glob("figure.*"):
        figure.unlink()
    fig2.draw(tmp_path / "two", SMALL["width"])
    for file in ("table.csv", "figure.png", "figure.svg"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_fig2_resumes(tmp_path, monkeypatch):
    settings = fig2.Settings(**SMALL, subset=5)
    fig2.run(settings, tmp_path / "whole")
    write = stages.measure
    calls = []

    def breaks(*args, **options):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*args, **options)

    monkeypatch.setattr(stages, "measure", breaks)
    with pytest.raises(KeyboardInterrupt):
        fig2.run(settings, tmp_path / "parts")
    assert not (tmp_path / "parts" / "table.csv").exists()
    fig2.run(settings, tmp_path / "parts")
    assert len(calls) == 3  # the first epoch was not measured again
    whole, parts = (tmp_path / x / "table.csv" for x in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_attacks_after_some_epochs(tmp_path, capsys):
    settings = {**SMALL, "epochs": 4, "train_size": 32, "attacks": "fgsm"}
    fig2.run(fig2.Settings(**settings, attacked_epochs=2), tmp_path / "some")
    said = capsys.readouterr().out.splitlines()
    fig2.run(fig2.Settings(**settings), tmp_path / "every")
    some, every = (pd.read_csv(tmp_path / x / "table.csv") for x in ("some", "every"))
    assert list(some["epoch"].unique()) == [1, 4]
    both = every[every["epoch"].isin((1, 4))].reset_index(drop=True)
    pd.testing.assert_frame_equal(some, both)
    assert "more minutes for this network" in said[0] and len(said) == 4
    assert not any("minutes" in line for line in said[1:])


@pytest.mark.parametrize(
    ("n", "epochs"),
    ((None, {1, 2, 3, 4, 5}), (9, {1, 2, 3, 4, 5}), (1, {5}), (2, {1, 5}), (3, {1, 3, 5})),
)
def test_attacked_epochs_are_spread_evenly(n, epochs):
    assert stages.spread(5, n) == epochs
    assert stages.spread(1, n) == {1}


@pytest.mark.slow
def test_fig5(tmp_path):
    options = {**SMALL, "network": "resnet18", "subset": 10, "steps": 2}
    settings = fig5.Settings(**options, at="pool", epsilons=(0.05, 0.1), split_attacks="fgsm,bim")
    results = fig5.run(settings, tmp_path)
    figures_are_there(tmp_path)
    assert "attacked at pool" in (tmp_path / "figure.svg").read_text()
    table = pd.read_csv(tmp_path / "table.csv")
    assert table["epsilon"].values == pytest.approx(0.1 * table["rms"].values, rel=1e-4)
    assert table["rms"].nunique() == 2  # of this epoch's features
    assert list(results["digits-resnet18"]["accuracy"]) == CONDITIONS
    pixels = fig2.run(fig2.Settings(**options), tmp_path / "pixels")
    pixels, features = (x["digits-resnet18"]["accuracy"] for x in (pixels, results))
    assert pixels["none"] == features["none"]  # what is attacked is no part of the training
    splits = pd.read_csv(tmp_path / "splits.csv")
    blocks = ["normalise", "stem", "layer1", "layer2", "layer3", "layer4", "pool"]
    assert splits[["point", "relative", "condition"]].values.tolist() == [
        [point, epsilon, condition]
        for point in ("pixels", *blocks)
        for epsilon in (0.05, 0.1)
        for condition in ("none", "fgsm", "bim")
    ]
    assert splits["epsilon"].values == pytest.approx(splits["relative"] * splits["rms"], rel=1e-4)
    assert splits["before"].nunique() == 1  # the same network and images
    # the split of the curves over epochs, after the last of them, is one of those compared
    one = splits[(splits["point"] == "pool") & (splits["relative"] == 0.1)].set_index("condition")
    last = table[table["epoch"] == 2].set_index("condition")
    for condition in ("none", "fgsm", "bim"):
        columns = last.columns[3:].drop("precision")  # dataset, network and epoch come first
        pd.testing.assert_series_equal(one.loc[condition, columns], last.loc[condition, columns])
    text = (tmp_path / "splits.svg").read_text()
    assert all(word in text for word in ("pixels", *blocks, "ε / RMS", "FGSM", "BIM"))
    drawn = (tmp_path / "splits.png").read_bytes()
    (tmp_path / "splits.png").unlink()
    fig5.draw_splits(tmp_path)
    assert (tmp_path / "splits.png").read_bytes() == drawn


def test_fig1(tmp_path):
    settings = fig1.Settings(**{**SMALL, "width": 0.5, "epochs": 10}, images=2)
    results = fig1.run(settings, tmp_path)
    figures_are_there(tmp_path)
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table["condition"]) == ["none", *USUAL] * 2
    assert table["label"].nunique() == 2  # of two classes
    clean = table[table["condition"] == "none"]
    assert (clean["prediction"] == clean["label"]).all() and (clean["l0"] == 0).all()
    assert table["confidence"].between(0.1, 1).all()
    attacked = table[~table["condition"].isin(("none", "sparsefool", "sparsefool_unbounded"))]
    assert attacked["linf"].values == pytest.approx([0.1] * 10, abs=1e-5)
    assert (table["linf"][table["condition"] == "sparsefool"] < 0.1001).all()
    sparse = table[table["condition"] == "sparsefool_unbounded"]
    assert (sparse["prediction"] != sparse["label"]).all()
    assert (sparse["l0"].values < attacked.groupby("image")["l0"].min().values).all()
    assert set(results["digits-cnn"]["accuracy"]) == {"none", "fgsm", "lowest", "highest", "all"}
    text = (tmp_path / "figure.svg").read_text()
    for word in ("perturbation", "attacked image", "FGSM", "SparseFool", "L∞"):
        assert word in text


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        (fig2.Settings(network="cnn,resnet"), r"network=resnet: .*'resnet18'"),
        (fig2.Settings(attacks="fgsm,spasefool"), r"attacks=spasefool: .*'sparsefool'"),
        (fig2.Settings(attacks="fgsm,none"), r"attacks=none: must be one of random, uniform"),
        (fig2.Settings(dataset="digits,mnst"), r"dataset=mnst: .*'mnist'"),
        (fig2.Settings(epsilon=-0.1), r"epsilon=-0.1: must be a finite number, at least 0"),
        (fig2.Settings(width=0.0), r"width=0.0: must be a number greater than 0"),
        (fig5.Settings(network="cnn"), r"at=layer3: must be one of normalise, conv1, conv2, fc1"),
        (fig5.Settings(network="resnet18", at="layr2"), r"at=layr2: .*'layer"),
        (fig5.Settings(network="resnet18,cnn"), r"at=layer3: must be one of normalise, conv1"),
        (fig5.Settings(split_attacks="fgms"), r"split_attacks=fgms: must be one of .*'fgsm'"),
    ),
    ids=str,
)
def test_bad_settings_are_refused_before_any_work(tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr(stages, "train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(UsageError, match=message) as caught:
        (fig5 if hasattr(settings, "at") else fig2).run(settings, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_settings_of_the_gallery(tmp_path):
    with pytest.raises(UsageError, match="network='cnn,resnet18': must be one name"):
        fig1.run(fig1.Settings(network="cnn,resnet18"), tmp_path / "out")
    with pytest.raises(UsageError, match="images=11: must be at most 10, one for each class"):
        fig1.run(fig1.Settings(images=11), tmp_path / "out")
    # two epochs are too few to know all ten digits
    with pytest.raises(UsageError, match="images=10: the trained network knows images of"):
        fig1.run(fig1.Settings(**SMALL, images=10), tmp_path / "out")
    # its training is kept
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoints"]


@pytest.mark.parametrize(
    "arguments",
    (
        ("fig2", "--epsilon", "eight"),
        ("fig2", "--epsilon", "1/0"),
        ("fig2", "--precision", "float8"),
        ("fig2", "--train-size", "0"),
        ("fig5", "--epsilon-unit", "rsm"),
        ("fig2", "--at", "layer3"),
        ("fig1", "--subset", "5"),
    ),
    ids=" ".join,
)
def test_bad_options(tmp_path, arguments):
    result = invoke(*arguments, "-o", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ("epochs", "batch_size", "steps", "width", "weight_decay"))
def test_settings_out_of_range(field):
    with pytest.raises(UsageError, match=f"{field}=-1"):
        fig2.Settings(**{field: -1})


@pytest.mark.parametrize(("text", "value"), (("8/255", 8 / 255), ("0.1", 0.1), ("1e-3", 1e-3)))
def test_amplitudes_may_be_fractions(text, value):
    assert Amplitude().convert(text, None, None) == value


LONG = (f"imagefolder:{'long_' * 6}", "cnn"), (f"package.module:{'named_' * 6}", "cnn")


@pytest.mark.parametrize(
    "names", (LONG, (("mnist", "cifar10"), ("resnet18", "googlenet"))), ids=("long", "usual")
)
@pytest.mark.sampled(2)
def test_titles_of_neighbours_do_not_overlap(tmp_path, monkeypatch, names):
    columns = {"epoch": 1, "low": 0.4, "high": 0.6, "accuracy": 0.5, "epsilon": 0.0123}
    rows = [
        {"dataset": dataset, "network": network, "condition": condition, **columns}
        for dataset in names[0]
        for network in names[1]
        for condition in ("none", "sparsefool_unbounded", "lowest", "highest", "all")
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
    boxes = []

    @contextmanager
    def looked_at(*arguments, **options):
        with new_figure(*arguments, **options) as figure:
            yield figure
            figure.draw_without_rendering()
            figure.draw_without_rendering()  # the legend has its place from the second on
            boxes.extend(axis.title.get_window_extent().padded(4) for axis in figure.axes)

    monkeypatch.setattr(fig2, "new_figure", looked_at)
    fig2.draw(tmp_path, 0.25)
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@contextmanager
def drawn(monkeypatch, module):
    """The figures that `module` draws in the context, laid out."""
    figures = []

    @contextmanager
    def looked_at(*arguments, **options):
        with new_figure(*arguments, **options) as figure:
            yield figure
            figure.draw_without_rendering()
            figures.append(figure)

    with monkeypatch.context() as patch:
        patch.setattr(module, "new_figure", looked_at)
        yield figures


def rows_of(epochs, accuracy=0.5, low=0.4, high=0.6, epsilon=0.1, rms=1.0):
    """Rows of a network under the usual attacks; each number is of all epochs, or one for each."""
    columns = {"low": low, "accuracy": accuracy, "high": high, "epsilon": epsilon, "rms": rms}
    return pd.concat(
        pd.DataFrame({"epoch": epochs, **columns}).assign(
            dataset="digits", network="cnn", condition=condition
        )
        for condition in ("none", *USUAL, "lowest", "highest", "all")
    )


def seen(figure, line):
    """How many pixels of the figure would differ clearly without the line."""
    pictures = []
    for visible in (True, False):
        line.set_visible(visible)
        with io.BytesIO() as file:
            figure.savefig(file, format="raw", dpi=200)
            pictures.append(np.frombuffer(file.getvalue(), np.uint8).reshape(-1, 4).astype(int))
    line.set_visible(True)
    return int((np.abs(pictures[0] - pictures[1]).max(1) > 50).sum())


@pytest.mark.parametrize("epochs", (2, 30))
@pytest.mark.sampled(2)
def test_curves_can_be_told_apart(tmp_path, monkeypatch, epochs):
    """Also where all coincide: each is thinner than those beneath, with markers of its own.

    An unbounded attack is dashed, in the colour of the bounded one; black is clean alone.
    """
    rows_of(range(1, epochs + 1)).to_csv(tmp_path / "table.csv", index=False)
    with drawn(monkeypatch, fig2) as figures:
        fig2.draw(tmp_path, 1)
    (axis,) = figures[0].axes
    lines = {line.get_label(): line for line in axis.get_lines()}
    looks = {(line.get_color(), line.get_linestyle()) for line in lines.values()}
    assert len(lines) == len(looks) == 8
    bounded, unbounded = lines["SparseFool"], lines["SparseFool, unbounded"]
    assert unbounded.get_color() == bounded.get_color() and unbounded.get_linestyle() == "--"
    assert unbounded.get_marker() != bounded.get_marker()
    colours = [line.get_color() for line in lines.values()]
    assert colours.count(lines["clean"].get_color()) == 1
    for name, line in lines.items():
        assert seen(figures[0], line) > 75, name


@pytest.mark.slow
def test_splits_that_coincide_can_be_told_apart(tmp_path, monkeypatch):
    points = ["pixels", "normalise", "stem", "layer1", "layer2", "layer3", "layer4"]
    columns = {"low": 0.4, "accuracy": 0.5, "high": 0.6, "before": 0.9, "condition": "fgsm"}
    known = {"dataset": "digits", "network": "resnet18", **columns}
    rows = [{"point": p, "relative": x, **known} for p in points for x in (0.01, 0.1)]
    pd.DataFrame(rows).to_csv(tmp_path / "splits.csv", index=False)
    with drawn(monkeypatch, fig5) as figures:
        fig5.draw_splits(tmp_path)
    (axis,) = figures[0].axes
    for line in axis.get_lines()[: len(points)]:
        assert seen(figures[0], line) > 75, line.get_label()


def test_one_epoch_is_no_curve(tmp_path, monkeypatch):
    """A point with its interval for each attack; no axis of epochs around the one."""
    rows_of([12]).to_csv(tmp_path / "table.csv", index=False)
    with drawn(monkeypatch, fig2) as figures:
        fig2.draw(tmp_path, 1, "conv2")
    (axis,) = figures[0].axes
    names = [label.get_text().replace("\n", " ") for label in axis.get_xticklabels()]
    named = ["OST", "FGSM", "BIM", "ILLC", "PGD", "SparseFool", "SparseFool, unbounded"]
    assert names == ["clean", *named]
    bars = [bar.get_segments() for bar in axis.collections]
    assert np.array(bars)[:, 0, :, 1] == pytest.approx(np.array([[0.4, 0.6]] * 8))
    assert np.array(bars)[:, 0, 0, 0].tolist() == axis.get_xticks().tolist()
    assert figures[0].get_supxlabel() == "after epoch 12, attacked at conv2"


@pytest.mark.parametrize(
    ("unit", "epsilon", "rms", "title"),
    (
        ("absolute", [0.1, 0.1], [0.4, 0.5], "ε = 0.1"),
        ("absolute", [8 / 255] * 2, [0.4, 0.5], "ε = 8/255"),
        ("rms", [0.04, 0.05], [0.4, 0.5], "ε = 0.1 RMS"),  # it follows the features
    ),
)
def test_the_amplitude_of_the_title_is_that_of_all_epochs(
    tmp_path, monkeypatch, unit, epsilon, rms, title
):
    rows_of([1, 2], epsilon=epsilon, rms=rms).to_csv(tmp_path / "table.csv", index=False)
    with drawn(monkeypatch, fig2) as figures:
        fig2.draw(tmp_path, 1, "conv2", unit)
    assert figures[0].axes[0].get_title().endswith(title)


def test_presets():
    for presets in (fig1.PRESETS, fig2.PRESETS, fig5.PRESETS):
        assert list(presets) == ["quick", "paper"]
        assert presets["quick"].dataset == "digits"
        assert presets["paper"].epochs == 30 and presets["paper"].width == 1
    assert fig2.PRESETS["paper"].dataset == fig5.PRESETS["paper"].dataset == "mnist,cifar10"
    assert fig2.PRESETS["paper"].network == "cnn,resnet18,googlenet"


def test_epsilon_is_the_papers_unless_given():
    class Shaped:
        def __init__(self, channels):
            self.shape = (channels, 32)

    epsilon = stages.amplitude
    assert epsilon(fig2.Settings(), Shaped(1)) == 0.1
    assert epsilon(fig2.Settings(), Shaped(3)) == 8 / 255
    assert epsilon(fig5.Settings(), Shaped(3), "layer3") == 0.1
    assert epsilon(fig2.Settings(epsilon=0.0), Shaped(3)) == 0


def test_colour_images_are_mirrored_and_grey_ones_are_not(tmp_path, monkeypatch):
    seen, loaded = [], []

    def augment(x, generator, *, crop, flip):
        seen.append((flip is not None, crop))
        return x

    def load(name, settings):
        loaded.append(name)
        channels, size = (3, 32) if name == "colour" else (1, 28)
        images = data.Images(
            torch.zeros(4, channels, size, size, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
        )
        return data.Dataset(name, ("a", "b"), images, images)

    monkeypatch.setattr("llm_attack.vision.train.augment", augment)
    monkeypatch.setattr(data, "load_dataset", load)
    options = {"dataset": "grey,colour", "width": 0.1, "attacks": "fgsm", "epochs": 1}
    fig2.run(fig2.Settings(**options), tmp_path / "one")
    fig2.run(fig2.Settings(**options, network="cnn,resnet18", flip=True, crop=0), tmp_path / "two")
    assert seen == [(False, 3), (True, 4)] + [(True, 0)] * 4
    assert loaded == ["grey", "colour"] * 2  # each once, also for two networks
