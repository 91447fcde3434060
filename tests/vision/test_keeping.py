"""Networks from files and from other people's code."""

import json
import sys

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

from llm_attack.cli import main
from llm_attack.errors import UsageError
from llm_attack.vision import fig1, fig2, keeping, stages
from llm_attack.vision.data import load
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
    assert again["digits-resnet18"] == results["digits-resnet18"]
    assert "digits-resnet18 training" not in again["seconds"]
    first, second = (pd.read_csv(x / "table.csv") for x in (folder / "out", tmp_path))
    pd.testing.assert_frame_equal(first, second)


def test_what_a_kept_network_says_of_itself(kept):
    _, file, results = kept
    with safe_open(file, "pt") as content:
        said = json.loads(content.metadata()["llm_attack"])
    assert said["settings"]["width"] == 0.1 and said["settings"]["label_smoothing"] == 0.1
    assert said["network"] == "resnet18" and said["dataset"] == "digits"
    assert said["accuracy"] == results["digits-resnet18"]["accuracy"] and said["epochs"] == 1
    assert keeping.told(str(file)) == said


@pytest.mark.parametrize("form", ("safetensors", "pt"))
def test_a_network_of_somebody_else(theirs, form):
    """Table and gallery; the accuracy is that of its weights."""
    settings = fig2.Settings(attacks="fgsm,bim")
    images = load("digits", settings)
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
    with pytest.raises(UsageError, match="is of network=their_nets:means, which is not one of cnn"):
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
            "other: must give scores of shape|other: fails on images",
        ),
        ({"network": "their_nets:blind"}, r"must give scores of shape \(2, 10\) .*, not \(2, 9\)"),
        ({"network": "their_nets:nothing"}, "must give finite scores for images of digits"),
        ({"weights": "nowhere"}, "weights=nowhere: must be weights of this network"),
        ({"weights": "their_nets.py"}, "weights=their_nets.py: must be weights"),
        ({"weights": "x.safetensors"}, "weights=x.safetensors: must be weights"),
        ({"load": "nowhere"}, "load=nowhere: must be a file that --save wrote"),
        ({"load": "x.safetensors"}, "load=x.safetensors: must be a file that --save wrote"),
        ({"load": "plain.safetensors"}, "load=plain.safetensors: must be a file that --save wrote"),
        ({"load": "x", "weights": "x"}, "weights=x: must not be given beside load"),
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
        stages.untrained(load("digits", fig1.Settings()), "cnn", fig1.Settings(weights=str(file)))
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
    assert again["digits-resnet18"] == results["digits-resnet18"]
    garbage = tmp_path / "state.pt"
    for content in (b"", b"garbage"):
        garbage.write_bytes(content)
        with pytest.raises(
            UsageError, match=r"state\.pt: must be a file that --save wrote, or of"
        ) as caught:
            keeping.told(str(garbage))
        assert "weights_only" not in str(caught.value)  # no advice to run its code
    torch.save({"same": {}}, garbage)
    with pytest.raises(UsageError, match=r"state\.pt: must be a file"):
        keeping.told(str(garbage))
