"""The binary toy: known networks have known accuracies, landscapes and packets."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from adaptive import uncertainty
from scipy.integrate import trapezoid
from scipy.optimize import brentq
from scipy.special import expit

from llm_attack.base.errors import UsageError
from llm_attack.theory.binary import GRID, Toy, labels_of
from llm_attack.theory.fig4 import draw, run, train
from llm_attack.theory.packet import Uncertainty
from llm_attack.theory.settings import PACKETS, ToySettings

SMALL = {"points": 40, "test_points": 200, "width": 8, "epochs": 5, "device": "cpu"}


def toy_with(steepness, shift=0.0, **settings):
    """A toy whose network is a known one: the boundary is at x1 = shift, for every seed."""
    toy = Toy(ToySettings(**{**SMALL, **settings}))
    toy.network = lambda x: torch.stack(
        [torch.zeros_like(x[..., 0]), steepness * (x[..., 0] - shift)], -1
    )
    return toy


def test_points_and_labels():
    toy = Toy(ToySettings(**{**SMALL, "points": 3000}))
    assert toy.x.shape == (5, 3000, 2)
    assert toy.x.dtype == torch.float64
    assert toy.x.abs().max() <= 1
    # uniform: 3,000 draws miss none of ten equal parts
    for seed in range(5):
        for axis in range(2):
            assert torch.histc(toy.x[seed, :, axis], 10, -1, 1).min() > 200
    assert torch.equal(labels_of(toy.x), (toy.x[:, :, 0] > 0).long())
    assert not torch.equal(toy.x[0], toy.x[1])
    assert not torch.equal(toy.x[0, :200], toy.test[0])


@pytest.mark.parametrize("attack", ("fgsm", "ost", "bim", "illc", "pgd"))
def test_accuracies_of_the_true_boundary(attack):
    """Each attack crosses the boundary from where it is within epsilon, and from nowhere else."""
    toy = toy_with(8.0, attack=attack, epsilon=0.3)
    clean, robust = toy.accuracies()
    assert torch.equal(clean, torch.ones(5, dtype=torch.float64))
    assert torch.equal(robust, (toy.test[..., 0].abs() > 0.3).double().mean(1))


def test_accuracies_of_a_boundary_in_the_wrong_place():
    toy = toy_with(8.0, shift=0.25, epsilon=0.1)
    clean, robust = toy.accuracies()
    x1 = toy.test[..., 0]
    assert torch.equal(clean, ((x1 <= 0) | (x1 > 0.25)).double().mean(1))
    assert torch.equal(robust, ((x1 <= 0) | (x1 > 0.35)).double().mean(1))


def test_the_attack_stays_in_the_square():
    seen = []
    toy = toy_with(8.0, epsilon=0.5, attack="bim")
    network = toy.network
    toy.network = lambda x: seen.append(x) or network(x)
    toy.accuracies()
    assert max(x.abs().max() for x in seen) <= 1
    assert max((x - toy.test).abs().max() for x in seen) > 0.4


def test_without_an_attack_the_accuracies_are_equal():
    clean, robust = toy_with(8.0, shift=0.1, attack="none").accuracies()
    assert torch.equal(clean, robust)


@pytest.mark.parametrize("steepness", (2.0, 8.0, 400.0))
def test_the_plain_step_moves_points_across_that_are_nearer_than_it_is_long(steepness):
    """At distance t from the border the gradient is k / (1 + exp(k t)).

    Points cross where t < 0.3 k / (1 + exp(k t)). With a border at 0.3 only points above it cross:
    those below 0 are too far away, and those between are wrong already and move away from it.
    """
    way = brentq(lambda t: t - 0.3 * steepness * expit(-steepness * t), 0, 10, xtol=1e-14)
    assert way < 0.3
    toy = toy_with(steepness)
    assert torch.equal(toy.stepped_accuracy(), (toy.test[..., 0].abs() > way).double().mean(1))
    toy = toy_with(steepness, shift=0.3)
    x1 = toy.test[..., 0]
    assert torch.equal(toy.stepped_accuracy(), ((x1 <= 0) | (x1 > 0.3 + way)).double().mean(1))


@pytest.mark.parametrize("label", (0, 1))
def test_the_packet_is_the_loss_of_one_class(label):
    found = toy_with(6.0, shift=0.2, label=label).relation()
    sign = 1 if label else -1
    loss = lambda x: F.softplus(-sign * 6 * (x - 0.2), threshold=1000)  # noqa: E731
    expected = uncertainty(loss, -1, 1)
    for name in Uncertainty.__dataclass_fields__:
        value = getattr(found, name)
        assert value.shape == (5,)
        assert value.tolist() == pytest.approx([getattr(expected, name)] * 5, abs=1e-8), name


@pytest.mark.parametrize("shift", (0.2, 0.31415))
def test_the_predicted_packet_is_the_loss_of_the_likelier_class(shift):
    """Its derivative jumps at the border, which is found to the last bits."""
    toy = toy_with(6.0, shift=shift)
    assert toy.borders().tolist() == pytest.approx([shift] * 5, abs=1e-14)
    found = toy.relation(predicted=True)
    # by trapezoids on either side of the border
    x = np.concatenate([np.linspace(-1, shift, 100_001), np.linspace(shift, 1, 100_001)])
    side = np.repeat([1.0, -1.0], 100_001)
    psi = np.logaddexp(0, -6 * np.abs(x - shift))
    slope = 6 * side / (1 + np.exp(6 * np.abs(x - shift)))
    norm = trapezoid(psi**2, x)
    mean_x, mean_p = (trapezoid(of, x) / norm for of in (x * psi**2, psi * slope))
    dx = (trapezoid(((x - mean_x) * psi) ** 2, x) / norm) ** 0.5
    dp = (trapezoid((slope - mean_p * psi) ** 2, x) / norm) ** 0.5
    ends = [(end - mean_x) * psi[i] ** 2 / norm for i, end in ((0, -1), (-1, 1))]
    expected = Uncertainty(mean_x, dx, mean_p, dp, 0.5 * abs(1 - ends[1] + ends[0]))
    for name in Uncertainty.__dataclass_fields__:
        wanted = pytest.approx([getattr(expected, name)] * 5, abs=1e-8)
        assert getattr(found, name).tolist() == wanted, name


def test_a_steep_border_makes_a_packet_that_vanishes_at_the_ends():
    """Of exp(-k|x|), which it is then up to the tip: dx = 1/(k sqrt 2), dp = k, product 0.707."""
    found = toy_with(100.0).relation(predicted=True)
    assert found.bound.tolist() == pytest.approx([0.5] * 5, abs=1e-6)
    assert (found.product > 0.5).all() and (found.product < 0.5**0.5).all()
    twice = toy_with(200.0).relation(predicted=True)
    assert twice.dx.tolist() == pytest.approx((found.dx / 2).tolist(), rel=1e-6)
    assert twice.dp.tolist() == pytest.approx((found.dp * 2).tolist(), rel=1e-6)


def test_a_network_that_predicts_one_class_has_no_border():
    toy = toy_with(1.0, shift=2.0)
    assert len(toy.borders()) == 0
    fixed = toy_with(1.0, shift=2.0, label=0).relation()
    assert toy.relation(predicted=True).dp.tolist() == pytest.approx(fixed.dp.tolist(), rel=1e-9)


def test_the_packet_lies_on_the_line_x2_0():
    toy = toy_with(6.0)
    seen = []
    network = toy.network
    toy.network = lambda x: seen.append(x) or network(x)
    toy.relation()
    assert all((x[..., 1] == 0).all() for x in seen)
    assert min(x[..., 0].min() for x in seen) == -1
    assert max(x[..., 0].max() for x in seen) == 1


@pytest.fixture(scope="module")
def small():
    return train(ToySettings(**SMALL, seeds=3))


def test_every_epoch_and_seed_has_a_row(small):
    curves, _ = small
    assert curves.epoch.tolist() == [e for e in range(6) for _ in range(3)]
    assert curves.seed.tolist() == [0, 1, 2] * 6
    assert curves.notna().all(axis=None)
    for packet in PACKETS:
        found = {what: curves[f"{what}_{packet}"] for what in ("dx", "dp", "product", "bound")}
        assert (found["product"] - found["dx"] * found["dp"]).abs().max() < 1e-12
        assert (found["product"] >= found["bound"]).all()


def test_a_seed_in_company_is_that_seed_alone(small):
    curves, _ = small
    alone, _ = train(ToySettings(**SMALL, seeds=1, seed=2))
    ours = curves[curves.seed == 2].reset_index(drop=True)
    pd.testing.assert_frame_equal(ours, alone, rtol=1e-9, atol=1e-9)
    assert ours.dx_fixed.nunique() == 6  # it learns


def test_landscapes(small):
    """After a fifth, two fifths and all epochs; of the first seed; x1 and x2 in their places."""
    _, landscapes = small
    assert landscapes.groupby("epoch").size().to_dict() == dict.fromkeys((1, 2, 5), GRID**2)
    toy = Toy(ToySettings(**SMALL, seeds=3))
    for _ in range(5):
        toy.epoch()
    last = landscapes[landscapes.epoch == 5]
    x = torch.tensor(last[["x1", "x2"]].to_numpy())
    logits = toy.network(x.expand(3, -1, -1))[0]
    expected = F.cross_entropy(logits, torch.ones(len(x), dtype=torch.long), reduction="none")
    assert last.loss.tolist() == pytest.approx(expected.tolist(), abs=1e-9)
    likelier = F.cross_entropy(logits, logits.argmax(-1), reduction="none").tolist()
    for packet, losses in (("fixed", expected.tolist()), ("predicted", likelier)):
        ratio = last[packet] / losses
        assert ratio.max() == pytest.approx(ratio.min(), rel=1e-9)
        square = last.pivot(index="x2", columns="x1", values=packet).to_numpy() ** 2
        area = trapezoid(trapezoid(square, dx=2 / (GRID - 1)), dx=2 / (GRID - 1))
        assert area == pytest.approx(1, rel=1e-9)
    assert sorted(set(last.x1)) == pytest.approx(torch.linspace(-1, 1, GRID).tolist(), abs=1e-6)


def test_batches():
    """An epoch passes over each point once, whatever the batch size."""
    toy = Toy(ToySettings(**SMALL, batch_size=16))
    seen = []
    network = toy.network
    toy.network = lambda x: seen.append(x.detach()) or network(x)
    toy.epoch()
    assert [x.shape[1] for x in seen] == [16, 16, 8]
    for seed in range(5):
        once = torch.cat(seen, 1)[seed]
        assert not torch.equal(once, toy.x[seed])
        assert torch.equal(once[once[:, 0].argsort()], toy.x[seed][toy.x[seed, :, 0].argsort()])


def test_it_learns():
    toy = Toy(ToySettings(**{**SMALL, "learning_rate": 0.01}, seeds=2))
    assert (toy.accuracies()[0] < 0.95).all()
    for _ in range(150):
        toy.epoch()
    assert (toy.accuracies()[0] > 0.95).all()


def test_a_broken_relation_ends_the_run(monkeypatch, tmp_path):
    good = Toy.relation
    calls = []

    def relation(toy, predicted=False):
        calls.append(1)
        found = good(toy, predicted)
        return found if len(calls) < 6 else Uncertainty(0, 1, 0, found.bound - 1e-6, found.bound)

    monkeypatch.setattr(Toy, "relation", relation)
    with pytest.raises(ArithmeticError, match=r"epoch 2, predicted packet: .* below its bound"):
        run(ToySettings(**SMALL), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_written(tmp_path):
    results = run(ToySettings(**SMALL, seeds=2), tmp_path)
    names = ("curves.csv", "figure.png", "figure.svg", "landscapes.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    curves = pd.read_csv(tmp_path / "curves.csv")
    last = curves[curves.epoch == 5]
    for name in ("loss", "clean", "robust", "stepped", *(c for c in curves if c.endswith(PACKETS))):
        assert results["last_epoch"][name] == pytest.approx(last[name].tolist(), rel=1e-4, abs=1e-5)
    for packet, lowest in results["lowest_margin"].items():
        margin = (curves[f"product_{packet}"] - curves[f"bound_{packet}"]).min()
        assert lowest == pytest.approx(margin, abs=1e-5)
    json.dumps(results)


@pytest.mark.slow
def test_the_same_command_gives_the_same_files(tmp_path):
    """And so does drawing anew from the CSV files."""
    settings = ToySettings(**SMALL, seeds=1)
    run(settings, tmp_path / "a")
    (tmp_path / "b").mkdir()
    for name, table in zip(("curves", "landscapes"), train(settings), strict=True):
        digits = {"curves": "%.6g", "landscapes": "%.5g"}[name]
        table.to_csv(tmp_path / "b" / f"{name}.csv", index=False, float_format=digits)
    draw(tmp_path / "b", settings)
    for name in ("curves.csv", "landscapes.csv", "figure.png", "figure.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"epochs": 0}, "epochs=0: must be an integer, 1 or more"),
        ({"seeds": -1}, "seeds=-1: must be an integer, 1 or more"),
        ({"epsilon": -0.1}, "epsilon=-0.1: must be a finite number, at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: must be a finite number, at least 0"),
        ({"label": 2}, "label=2: must be 0 or 1"),
    ),
)
def test_bad_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        ToySettings(**settings)


def test_an_unknown_attack():
    with pytest.raises(UsageError, match=r"attack=fgms: .* did you mean 'fgsm'"):
        train(ToySettings(**SMALL, attack="fgms"))
