"""The fall of robust accuracy at features and pixels: amplitudes, pairs of images, the command."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.stats import ALPHA
from llm_attack.vision import declines, stages
from llm_attack.vision.data import load_dataset
from llm_attack.vision.measure import measure
from llm_attack.vision.rights import right_under

SMALL = {"width": 0.1, "epochs": 3, "train_size": 64, "test_size": 40, "batch_size": 16}


def test_scales_of_channels():
    """Of channels with RMS 1, 2 and 9: the strong one decides the RMS, not the median."""
    signs = torch.randint(2, (50, 1, 4, 4), generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = signs * torch.tensor([1.0, 2.0, 9.0])[:, None, None]
    net = nn.Sequential()
    assert declines.scale_of(net, images, "pixels", "rms") == pytest.approx((86 / 3) ** 0.5)
    assert declines.scale_of(net, images, "pixels", "median") == pytest.approx(2)
    net = nn.Sequential()
    net.add_module("flat", nn.Flatten())
    net.add_module("last", nn.Linear(48, 2))
    assert declines.scale_of(net, images, "flat", "rms") == pytest.approx((86 / 3) ** 0.5)


def test_images_are_right_as_measure_says():
    settings = declines.Settings(width=0.25, epochs=1)
    data = load_dataset("digits", settings)
    net = stages.untrained(data, "cnn", settings)
    for at in (None, "conv2"):
        how = {"epsilon": 0.02, "at": at, "seed": 3}
        rights = right_under(net, data.test[:90], ["fgsm", "pgd"], batch_size=40, **how)
        table = {
            row["condition"]: row for row in measure(net, data.test[:90], ["fgsm", "pgd"], **how)
        }
        assert 0 < table["none"]["accuracy"] < 1
        for name, right in rights.items():
            assert right.double().mean().item() == pytest.approx(table[name]["accuracy"])


def test_declines_pair_the_images():
    """At the pixels one image of four falls; at the block it and another; then t over images."""
    first = torch.tensor([True, True, True, False])
    last = {"pixels": [False, True, True, False], "stem": [False, False, True, False]}
    found = [
        (right, {"point": point, "epsilon": 0.5, "epoch": epoch, "condition": condition})
        for condition in ("none", "fgsm")
        for point in ("pixels", "stem")
        for epoch, right in ((1, first), (4, torch.tensor(last[point])))
    ]
    pixels, stem = declines.declines(found)
    assert (pixels["decline"], stem["decline"], stem["more"]) == (0.25, 0.5, 0.25)
    assert (stem["first"], stem["last"], pixels["verdict"]) == (1, 4, "")
    # of 0, 1, 0, 0: standard error 0.25, and t of three degrees of freedom 3.182
    assert stem["more_low"] == pytest.approx(0.25 - 0.25 * 3.18245, abs=1e-5)
    assert stem["verdict"] == "cannot be told" and ALPHA == 0.05
    many = [(right.repeat(20), row) for right, row in found]
    assert declines.declines(many)[1]["verdict"] == "more"


def test_the_command(tmp_path, monkeypatch):
    """One amplitude a curve: the share of the scale that the point has after the last epoch."""
    monkeypatch.chdir(tmp_path)
    options = [part for key, value in SMALL.items() for part in (f"--{key}", str(value))]
    options += [
        "--attacks",
        "fgsm",
        "--attacked_epochs",
        "2",
        "--points",
        "conv2",
        "--share",
        "1/5",
    ]
    done = CliRunner().invoke(main, ["reproduce", "declines", *options, "-o", "out"])
    assert done.exit_code == 0, done.output
    files = {"curves.csv", "declines.csv", "figure.png", "figure.svg", "run.json", "checkpoints"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    table = pd.read_csv("out/curves.csv")
    assert len(table) == 2 * 2 * 2 and set(table["epoch"]) == {1, 3}
    settings = declines.Settings(**SMALL)
    data = load_dataset("digits", settings)
    net = stages.untrained(data, "cnn", settings)
    state = torch.load("out/checkpoints/digits-cnn.pt", weights_only=True)
    net.load_state_dict(state["network"])
    for point in ("pixels", "conv2"):
        wanted = declines.scale_of(net, data.test.scaled(), point, "rms") / 5
        assert np.allclose(table[table["point"] == point]["epsilon"], wanted, rtol=1e-5)
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert set(record["results"]["digits-cnn"]["epsilon"]) == {"pixels", "conv2"}


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"points": "conv3"}, r"points=conv3: .*'conv2'"),
        ({"attacks": "sparsefool_unbounded"}, r"attacks='sparsefool_unbounded': .*amplitude"),
        ({"load": "somewhere"}, r"load=somewhere: must be a file"),
    ),
    ids=str,
)
def test_bad_settings_are_refused_before_any_work(tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr("llm_attack.vision.train.train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(UsageError, match=message):
        declines.run(declines.Settings(**settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()
