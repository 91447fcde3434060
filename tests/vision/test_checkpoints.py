"""Networks from files and from other people's code."""

import json
import os
import sys

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.vision import checkpoints, fig1, fig2, stages
from llm_attack.vision.data import load_dataset
from llm_attack.vision.settings import shown

SMALL = {"width": 0.1, "epochs": 1, "train_size": 64, "test_size": 30, "batch_size": 16}
SMALL |= {"attacks": "fgsm"}
THEIRS = """
import torch
from torch import nn

def means():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def other():
    return nn.Linear(1, 1)

def blind():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9))

def nothing():
    return nn.Sequential(means(), nn.LogSigmoid(), nn.Threshold(0, float("nan")))

def breaks():
    raise ValueError("no such thing")

number = 3
text = str
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of a trained network, its file, and the results of the training."""
    folder = tmp_path_factory.mktemp("kept")
    settings = fig2.Settings(**SMALL, network="resnet18", save=str(folder / "nets"))
    results = fig2.run(settings, folder / "out")
    return folder, folder / "nets" / "digits-resnet18.safetensors", results


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    (tmp_path / "their_nets.py").write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("their_nets", None)


def linear(images):
    """Ridge regression on the pixels, in closed form: weights (10, 64) and bias (10,)."""
    x = images.scaled().flatten(1).double()
    x = torch.cat((x, torch.ones(len(x), 1)), dim=1)
    wanted = torch.nn.functional.one_hot(images.labels, 10).double()
    w = torch.linalg.solve(x.T @ x + torch.eye(65), x.T @ wanted).float()
    return {"1.weight": w[:64].T.contiguous(), "1.bias": w[64].contiguous()}


def test_a_kept_network_is_attacked_again(kept, tmp_path):
    folder, file, results = kept
    again = fig2.run(fig2.Settings(**{**SMALL, "width": 1.0}, load=str(file)), tmp_path)
    trained = again["digits-resnet18"].pop("trained")
    assert again["digits-resnet18"] == results["digits-resnet18"]
    own = fig2.Settings(**SMALL)
    for name in ("epochs", "batch_size", "train_size", "train_attack", "seed"):
        assert trained[name] == getattr(own, name)
    assert trained["recipe"] == "fast" and trained["label_smoothing"] == 0.1
    assert "digits-resnet18 training" not in again["seconds"]
    first, second = (pd.read_csv(x / "table.csv") for x in (folder / "out", tmp_path))
    pd.testing.assert_frame_equal(first, second)


@pytest.mark.parametrize("figure", ("fig1", "fig2"))
def test_the_record_names_the_network_that_was_loaded(kept, tmp_path, figure):
    """Not that of the preset; and the same command again is the same experiment."""
    options = [
        "--load",
        str(kept[1]),
        "--attacks",
        "fgsm",
        "--test_size",
        "40",
        "-o",
        str(tmp_path),
    ]
    more = {"fig1": ["--images", "1"], "fig2": ["--subset", "5"]}[figure]
    for _ in range(2):
        done = CliRunner().invoke(main, ["reproduce", figure, *options, *more])
        assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "run.json").read_text())
    of = {name: record["settings"][name] for name in ("network", "width", "epochs")}
    assert of == {"network": "resnet18", "width": 0.1, "epochs": 0}
    assert set(record["results"]) == {"digits-resnet18"}


def test_what_a_kept_network_says_of_itself(kept):
    _, file, results = kept
    with safe_open(file, "pt") as content:
        said = json.loads(content.metadata()["llm_attack"])
    assert said["settings"]["width"] == 0.1 and said["settings"]["label_smoothing"] == 0.1
    assert said["network"] == "resnet18" and said["dataset"] == "digits"
    assert said["accuracy"] == results["digits-resnet18"]["accuracy"] and said["epochs"] == 1
    assert checkpoints.read_metadata(str(file)) == said


@pytest.mark.parametrize("form", ("safetensors", "pt"))
@pytest.mark.sampled(2)
def test_a_network_of_somebody_else(theirs, form):
    """Table and gallery; the accuracy is that of its weights."""
    settings = fig2.Settings(attacks="fgsm,bim")
    images = load_dataset("digits", settings)
    weights = linear(images.train)
    (save_file if form == "safetensors" else torch.save)(weights, f"weights.{form}")
    x, labels = images.test.scaled().flatten(1), images.test.labels
    scores = x @ weights["1.weight"].T + weights["1.bias"]
    wanted = (scores.argmax(1) == labels).double().mean().item()
    assert wanted > 0.9
    slope = (scores.softmax(1) - torch.nn.functional.one_hot(labels, 10)) @ weights["1.weight"]
    attacked = (x + 0.1 * slope.sign()).clamp(0, 1)
    after = (attacked @ weights["1.weight"].T + weights["1.bias"]).argmax(1)
    both = (scores.argmax(1) == labels) & (after == labels)
    robust = both[:100].double().mean().item()  # --preset quick has --subset 100
    given = f"--network their_nets:means --weights weights.{form} --attacks fgsm,bim".split()
    for figure in ("fig2", "fig1"):
        done = CliRunner().invoke(main, ["reproduce", figure, *given, "-o", figure])
        assert done.exit_code == 0, done.output
    table = pd.read_csv("fig2/table.csv").set_index("condition")
    assert table.loc["all", "accuracy"] == pytest.approx(wanted)
    assert table.loc["fgsm", "accuracy"] == pytest.approx(robust) and robust < 0.6
    assert (table["epoch"] == 0).all()
    assert (theirs / "fig1" / "figure.png").exists()


def test_a_network_of_somebody_else_is_trained(theirs):
    settings = fig2.Settings(**{**SMALL, "epochs": 3}, network="their_nets:means,cnn", save="nets")
    results = fig2.run(settings, theirs / "out")
    assert list(results) == ["digits-their_nets:means", "digits-cnn", "seconds"]
    assert results["digits-their_nets:means"]["parameters"] == 650
    file = "nets/digits-their_nets_means.safetensors"
    # its code is not run because a file says so
    with pytest.raises(UsageError, match="has network=their_nets:means, which is none of cnn"):
        fig2.run(fig2.Settings(load=file), theirs / "again")
    settings = fig2.Settings(**SMALL, network="their_nets:means", weights=file)
    again = fig2.run(settings, theirs / "again")
    name = "digits-their_nets:means"
    assert again[name]["accuracy"] == results[name]["accuracy"]


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"network": "their_nets:mean"}, "their_nets:mean: must be .*AttributeError"),
        (
            {"network": "their_nest:means"},
            "their_nest:means: must be .*No module named 'their_nest'",
        ),
        ({"network": "their_nets:number"}, "number: must be .*TypeError: 'int'"),
        ({"network": "their_nets:breaks"}, "breaks: must be .*ValueError: no such thing"),
        ({"network": "their_nets:text"}, "text: must return a torch.nn.Module, not str"),
        (
            {"network": "their_nets:other"},
            "other: must return scores of shape|other: fails on images",
        ),
        (
            {"network": "their_nets:blind"},
            r"must return scores of shape \(2, 10\) .*, not \(2, 9\)",
        ),
        ({"network": "their_nets:nothing"}, "must return finite scores for images of digits"),
        ({"weights": "nowhere"}, "weights=nowhere: must be weights of this network"),
        ({"weights": "their_nets.py"}, "weights=their_nets.py: must be weights"),
        ({"weights": "x.safetensors"}, "weights=x.safetensors: must be weights"),
        ({"load": "nowhere"}, "load=nowhere: must be a file that --save wrote"),
        ({"load": "x.safetensors"}, "load=x.safetensors: must be a file that --save wrote"),
        ({"load": "plain.safetensors"}, "load=plain.safetensors: must be a file that --save wrote"),
        ({"load": "x", "weights": "x"}, "weights=x: must not be given with load"),
        ({"network": "cnn,resnet18", "weights": "x"}, "network='cnn,resnet18': must be one name"),
    ),
    ids=str,
)
def test_what_cannot_be_used(theirs, settings, message):
    (theirs / "x.safetensors").write_bytes(b"garbage")
    save_file({"a": torch.zeros(1)}, "plain.safetensors")
    before = sorted(p.name for p in theirs.iterdir() if p.name != "__pycache__")
    with pytest.raises(UsageError, match=message) as caught:
        fig2.run(fig2.Settings(**settings), theirs / "out")
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in theirs.iterdir() if p.name != "__pycache__") == before


def test_weights_of_another_network(kept):
    _, file, _ = kept
    with pytest.raises(
        UsageError, match=r"weights=.*: must be weights of this network.*\(RuntimeError: Missing"
    ) as x:
        stages.untrained(
            load_dataset("digits", fig1.Settings()), "cnn", fig1.Settings(weights=str(file))
        )
    assert "\n" not in str(x.value)


@pytest.mark.parametrize(
    ("name", "title"),
    (
        ("cifar10", "CIFAR-10"),
        ("ost", "OST"),
        ("imagefolder:/some/where/cats/", "cats"),
        ("somebody/flowers:small", "flowers:small"),
        ("package.networks:mine", "package.networks:mine"),
        (f"imagefolder:/some/{'where' * 9}", "wherewherewherewherewhe…"),
    ),
)
def test_titles(name, title):
    assert shown(name) == title


def test_a_checkpoint_is_attacked_again(kept, tmp_path):
    folder, _, results = kept
    state = folder / "out" / "checkpoints" / "digits-resnet18.pt"
    again = fig2.run(fig2.Settings(**{**SMALL, "width": 1.0}, load=str(state)), tmp_path / "out")
    again["digits-resnet18"].pop("trained")
    assert again["digits-resnet18"] == results["digits-resnet18"]
    garbage = tmp_path / "state.pt"
    for content in (b"", b"garbage"):
        garbage.write_bytes(content)
        with pytest.raises(
            UsageError, match=r"state\.pt: must be a file that --save wrote, or of"
        ) as caught:
            checkpoints.read_metadata(str(garbage))
        assert "weights_only" not in str(caught.value)  # no advice to run its code
    torch.save({"same": {}}, garbage)
    with pytest.raises(UsageError, match=r"state\.pt: must be a file"):
        checkpoints.read_metadata(str(garbage))


# -- files that say what is not so ---------------------------------------------------------------


@pytest.fixture(scope="module")
def crafted(tmp_path_factory):
    """Writes a file of the weights of a small network that says of itself what it is told."""
    dataset = load_dataset("digits", fig1.Settings())
    network = stages.untrained(dataset, "cnn", fig1.Settings(width=0.1))
    file = tmp_path_factory.mktemp("crafted") / "x.safetensors"

    def write(about):
        text = about if isinstance(about, str) else json.dumps(about)
        weights = {k: value.contiguous() for k, value in network.state_dict().items()}
        save_file(weights, file, {"llm_attack": text})
        return str(file)

    return dataset, write


def used(dataset, file):
    """The network of a file, as figures use it; None where it is refused, in one clear line."""
    try:
        settings = checkpoints.settled(fig1.Settings(load=file))
        return stages.untrained(dataset, settings.network, settings)
    except UsageError as error:
        assert str(error).startswith(f"load={file}: ") and "\n" not in str(error)
        return None


RIGHT = {"network": "cnn", "settings": {"width": 0.1}, "epochs": 3, "precision": "float32"}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def test_the_right_one_is_used(crafted):
    dataset, write = crafted
    assert used(dataset, write(RIGHT)) is not None
    assert used(dataset, write({k: v for k, v in RIGHT.items() if k != "precision"})) is not None


@given(st.sampled_from([*RIGHT, "width"]), ANYTHING)
@example("network", ["cnn"])
@example("network", "resnet18")
@example("width", 1e300)
@example("width", 9e4)  # as weights, more than there is memory
@example("width", 10**400)
@example("width", True)
@example("width", float("nan"))
@example("epochs", 1e400)
@example("epochs", 2**70)
@example("precision", ["float32"])
@example("settings", [["width", 0.1]])
def test_what_a_file_says_wrongly(crafted, name, value):
    dataset, write = crafted
    about = {**RIGHT, "settings": {"width": value}} if name == "width" else {**RIGHT, name: value}
    if name == "settings" and isinstance(value, dict):
        name, value = "width", value.get("width")
    fits = {
        "network": lambda: value == "cnn",
        "width": lambda: (
            type(value) in (int, float)
            and 0 < value < 1
            and all(max(1, round(n * value)) == round(n * 0.1) for n in (32, 64, 128))
        ),
        "epochs": lambda: type(value) is int and 0 <= value < 2**31,
        "precision": lambda: value in (None, "float32", "bfloat16"),
        "settings": lambda: False,
    }
    assert (used(dataset, write(about)) is not None) == fits[name]()


@given(ANYTHING | st.text())
@example("[" * 5_000)
def test_files_that_say_anything(crafted, about):
    dataset, write = crafted
    assert used(dataset, write(about)) is None


@given(
    st.sampled_from(["same", "epoch", "mixed", "network", "label", "dataset", "width"]), ANYTHING
)
@example("label", ["digits-cnn"])
@example("dataset", 3)
@example("width", 1e300)
def test_checkpoints_that_say_what_is_not_so(tmp_path_factory, crafted, name, value):
    dataset, _ = crafted
    file = tmp_path_factory.mktemp("state") / "state.pt"
    network = stages.untrained(dataset, "cnn", fig1.Settings(width=0.1)).state_dict()
    same = {"dataset": "digits", "label": "digits-cnn", "width": 0.1}
    state = {"same": same, "epoch": 1, "mixed": False, "network": network}
    (same if name in same else state)[name] = value
    torch.save(state, file)
    used(dataset, str(file))


def test_a_width_that_no_network_can_have():
    dataset = load_dataset("digits", fig1.Settings())
    for width in (1e300, 1e6):
        with pytest.raises(UsageError, match=r"^width=1.*: must be a number .* at most 1000$"):
            stages.untrained(dataset, "cnn", fig1.Settings(width=width))


def test_a_name_that_is_no_text(kept, tmp_path, monkeypatch):
    """A folder whose name is not UTF-8: kept there, once more, and attacked again."""
    monkeypatch.chdir(tmp_path)
    place = os.fsdecode(b"n\xff")
    settings = fig2.Settings(**SMALL, network="cnn", save=f"{place}/nets")
    for _ in range(2):
        results = fig2.run(settings, tmp_path / place / "out")
    for file in ("nets/digits-cnn.safetensors", "out/checkpoints/digits-cnn.pt"):
        again = fig2.run(fig2.Settings(**SMALL, load=f"{place}/{file}"), tmp_path / place / "again")
        assert again["digits-cnn"].pop("trained")["epochs"] == 1
        assert again["digits-cnn"] == results["digits-cnn"]


# -- where networks are kept ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("file", "save=file: must be a folder that can be written"),
        ("file/x", "save=file/x: must be a folder that can be written"),
        ("", "save='': must be a path"),
        ("/proc/x", "save=/proc/x: must be a folder that can be written"),
        ("gone", "save=gone: must be a folder or file that can be made"),
        ("theirs", "save=theirs: digits-cnn.safetensors in this folder was not written by --save"),
        (
            "none/../theirs",
            "save=theirs: digits-cnn.safetensors in this folder was not written by --save",
        ),
    ],
)
def test_a_place_to_save_is_tried_before_the_training(tmp_path, monkeypatch, place, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "train", None)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "theirs").mkdir()
    save_file({"a": torch.zeros(1)}, "theirs/digits-cnn.safetensors")
    (tmp_path / "gone").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    words = [
        "--network",
        "resnet18,cnn",
        "--width",
        "0.1",
        "--epochs",
        "1",
        "--save",
        place,
        "-o",
        "out",
    ]
    done = CliRunner().invoke(main, ["reproduce", "fig2", *words])
    assert done.exit_code == 2 and done.stderr.startswith(f"error: {says}"), done.output
    assert sorted(tmp_path.rglob("*")) == before
