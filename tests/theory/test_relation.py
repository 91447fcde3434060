"""dx · dp of image classifiers: the lines, and the files."""

from collections import OrderedDict

import numpy as np
import pandas as pd
import pytest
import torch
from adaptive import uncertainty
from torch import nn

from llm_attack.base.errors import UsageError
from llm_attack.theory import relation
from llm_attack.theory.relation import DIRECTIONS, Settings, means, relations, run
from llm_attack.vision.data import Images


def test_lines_through_a_point_of_a_linear_network():
    """Along the gradient the loss is softplus of a straight line; along what is orthogonal to it,
    constant: dp is 0, and dx that of a uniform packet.
    """
    weight = torch.tensor([[0.0, 0.0, 0.0], [3.0, 4.0, 0.0]], dtype=torch.float64)
    head = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    head.weight.data = weight
    # spread along the third axis alone, of which the network knows nothing
    points = torch.tensor([[0.1, -0.2, t] for t in (-1.0, 0.0, 1.0)], dtype=torch.float64)
    found = relations(head, points, 1, torch.tensor(0), 0.5, Settings(lines=1))
    assert tuple(found) == DIRECTIONS
    margin = 3 * 0.1 - 4 * 0.2
    expected = uncertainty(lambda t: torch.log1p(torch.exp(margin + 5 * t)), -0.5, 0.5)
    for name in ("dx", "dp", "bound"):
        along = getattr(found["gradient"], name)
        assert along.shape == (1, 1)
        assert along.item() == pytest.approx(getattr(expected, name), rel=1e-7)
    flat = found["principal"]
    assert flat.dp.item() == pytest.approx(0, abs=1e-7)
    assert flat.dx.item() == pytest.approx(0.5 / 3**0.5, rel=1e-9)


def test_random_lines_are_the_images_own():
    head = nn.Linear(4, 3)
    points = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    points[2] = points[1]
    settings = Settings(lines=2)
    one, again = (
        relations(head, points, 1, torch.tensor(0), 1.0, settings)["random"] for _ in "ab"
    )
    other = relations(head, points, 2, torch.tensor(0), 1.0, settings)["random"]
    assert torch.equal(one.dp, again.dp) and one.dp.shape == (1, 2)
    assert not torch.equal(one.dp, other.dp) and one.dp[0, 0] != one.dp[0, 1]


def test_means_are_over_images():
    """Of the means of their lines, with Student's interval."""
    table = pd.DataFrame(
        {"epoch": 1, "block": "pixels", "direction": "random", "right": True}
        | {"image": [0, 0, 1, 1, 2, 2], "dx": 1.0, "dp": [1.0, 3, 4, 4, 5, 7]}
        | {"product": [1.0, 3, 4, 4, 5, 7], "bound": 0.5}
    )
    (row,) = means(table).to_dict("records")
    assert (row["n"], row["dp"], row["bound"]) == (3, 4.0, 0.5)
    half = 4.302653 * np.std([2, 4, 6], ddof=1) / 3**0.5
    assert row["dp_high"] - 4 == pytest.approx(half, rel=1e-6)


def test_right_and_wrong_images():
    """Some of each kind, by what the network says of them."""
    torch.manual_seed(0)
    network = nn.Sequential(OrderedDict(flat=nn.Flatten(), fc=nn.Linear(4, 3)))
    images = Images(torch.randint(256, (30, 1, 2, 2), dtype=torch.uint8), torch.arange(30) % 3)
    rows = pd.DataFrame(relation._of_epoch(0, network, images, Settings(images=4, lines=1)))
    with torch.no_grad():
        right = (network(images.scaled()).argmax(1) == images.labels).tolist()
    assert all(right[row["image"]] == row["right"] for row in rows.to_dict("records"))
    assert rows.groupby("right")["image"].nunique().to_dict() == {True: 4, False: 4}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relation")
    settings = {"dataset": "digits", "width": 0.1, "train_size": 100, "test_size": 60}
    settings |= {"epochs": 1, "images": 2, "lines": 1, "device": "cpu"}
    return run(Settings(**settings), folder), pd.read_csv(folder / "lines.csv"), folder


def test_what_is_written(small):
    result, table, folder = small
    assert {path.name for path in folder.iterdir()} == {"lines.csv", "figure.png", "figure.svg"}
    assert table["epoch"].unique().tolist() == [0, 1]
    blocks = table["block"].unique().tolist()
    assert blocks == ["pixels", "conv1", "conv2", "fc1"]
    assert set(table["direction"]) == set(DIRECTIONS)
    assert result["lines"] == len(table)
    groups = table.groupby(["epoch", "block", "right"])["image"].nunique()
    assert groups.max() == 2


def test_the_relation_holds(small):
    """With the bound of the interval, to the error of the quadrature at a ReLU's jumps."""
    _, table, _ = small
    assert (table["product"] >= table["bound"] - 1e-3).all()
    assert (table["product"] - table["dx"] * table["dp"]).abs().max() < 1e-4
    assert (table["dx"] <= table["reach"]).all()


def test_one_network(tmp_path):
    with pytest.raises(UsageError, match="network='cnn,resnet18': must be one network"):
        run(Settings(network="cnn,resnet18"), tmp_path)
    assert relation.COMMAND.name == "relation"
