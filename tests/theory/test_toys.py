"""The toy with other optimisers and domains: closed forms, verdicts, the command."""

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.theory import toys
from llm_attack.theory.binary import Toy
from llm_attack.theory.settings import PACKETS, ToySettings

SMALL = {"points": 40, "test_points": 200, "width": 8, "seeds": 2, "device": "cpu"}


def known(domain, steepness, **settings):
    """A toy whose border is x1 = 0, of this steepness."""
    toy = Toy(ToySettings(**SMALL, domain=domain, **settings))
    toy.network = lambda x: torch.stack([0 * x[..., 0], steepness * x[..., 0]], -1)
    return toy


@pytest.mark.parametrize("domain", (0.5, 4.0))
def test_the_domain_is_that_of_points_attacks_and_packets(domain):
    toy = known(domain, 8 / domain, epsilon=0.3 * domain)
    for x in (toy.x, toy.test):
        assert 0.9 * domain < x.abs().max() <= domain
    _, robust = toy.accuracies()
    wanted = (toy.test[..., 0].abs() > 0.3 * domain).double().mean(1)
    assert torch.equal(robust, wanted)
    # the same picture, stretched: dx grows with the domain, dp falls, their product stays
    unit = known(1.0, 8.0)
    for predicted in (False, True):
        here, there = toy.relation(predicted), unit.relation(predicted)
        assert here.dx.tolist() == pytest.approx((domain * there.dx).tolist(), rel=1e-6)
        assert here.product.tolist() == pytest.approx(there.product.tolist(), rel=1e-6)
    landscape = toy.landscape()
    assert landscape["x1"].max() == domain == -landscape["x2"].min()


def test_plain_gradient_descent_takes_the_plain_step():
    """One step on all points is weights - rate · gradient of the mean loss."""
    toy = Toy(ToySettings(**SMALL, optimiser="sgd", learning_rate=0.1, batch_size=40))
    before = [weight.detach().clone() for weight in toy.network.parameters()]
    loss = toy.loss(toy.x, (toy.x[..., 0] > 0).long()).mean(1).sum()
    slopes = torch.autograd.grad(loss, list(toy.network.parameters()))
    toy.epoch()
    for old, slope, new in zip(before, slopes, toy.network.parameters(), strict=True):
        assert torch.allclose(new, old - 0.1 * slope, atol=1e-12)


def test_verdicts_are_of_the_change_between_two_epochs():
    rows = []
    for seed, change in enumerate((-0.1, -0.12)):
        for epoch, value in ((10, 0.9), (50, 0.9 + change), (100, 0.95)):
            values = {"clean": 0.9, "robust": 0.5 + epoch / 1000, "stepped": value}
            values |= {f"product_{packet}": 0.1 * epoch for packet in PACKETS}
            at = {"optimiser": "sgd", "batch_size": 10, "domain": 1.0, "epoch": epoch}
            rows.append({**at, "seed": seed, **values})
    found = toys.verdicts(pd.DataFrame(rows)).set_index("accuracy")
    stepped = found.loc["stepped"]
    assert (stepped["epoch_10"], stepped["epoch_50"]) == (0.9, pytest.approx(0.79))
    assert stepped["last"] == pytest.approx(0.95) and stepped["change"] == pytest.approx(-0.11)
    # the standard error is 0.01, and t of one degree of freedom 12.706
    assert stepped["high"] == pytest.approx(-0.11 + 0.12706, abs=1e-5)
    assert list(found["verdict"]) == ["cannot be told", "rises", "cannot be told"]
    assert stepped["product_fixed"] == pytest.approx(10)


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--epochs", "50", "--points", "40", "--test_points", "50", "--seeds", "2"]
    options += ["--domains", "1,2", "--batch_sizes", "40", "--optimisers", "adam", "--width", "4"]
    done = CliRunner().invoke(main, ["reproduce", "toys", *options, "-o", "out"])
    assert done.exit_code == 0, done.output
    files = {"curves.csv", "verdicts.csv", "figure.png", "figure.svg", "run.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    curves = pd.read_csv("out/curves.csv")
    assert len(curves) == 2 * 11 and set(curves["domain"]) == {1, 2}
    assert len(pd.read_csv("out/verdicts.csv")) == 2 * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"optimisers": "adm"}, r"optimisers=adm: .*'adam'"),
        ({"epochs": 49}, r"epochs=49: must be an integer, 50 or more"),
    ),
)
def test_bad_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        toys.run(toys.Settings(**settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()
