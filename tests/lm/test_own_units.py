"""The user's own units: a function of activations gives the size of an epsilon."""

import dataclasses
import re

import pytest
import torch
from click.testing import CliRunner

from llm_attack import Plan, evaluate
from llm_attack.base.errors import UsageError
from llm_attack.base.plugins import name_of
from llm_attack.cli import main
from llm_attack.lm.network.signals import CALIBRATION_TEXT
from llm_attack.lm.settings import AttackSettings
from llm_attack.lm.units import UNITS, Epsilon, register_unit

MEDIAN = "examples.median_norm:median_norm"
LAYER = "model.layers.1"


def rms(activations):
    return activations.square().mean().sqrt()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_example_on_embeddings_of_one_length(make, norm):
    """All coordinates are a quarter in size, so a unit is a quarter; in L2 times the root of d."""
    lm = make(attack="fgsm", epsilon=0.5, epsilon_unit=MEDIAN, norm=norm)
    weight = lm.model.get_input_embeddings().weight.data
    weight.copy_(weight.sign() / 4 + (weight == 0) / 4)
    lm.use(lm.settings)
    expected = 0.5 / 4 * {"linf": 1, "l2": weight.shape[1] ** 0.5}[norm]
    assert lm.attack_info()["epsilon_absolute"] == pytest.approx(expected, rel=1e-12)


def test_the_example_at_a_layer(make):
    """By transformers' own record of the hidden states."""
    lm = make(attack="fgsm", epsilon=0.5, epsilon_unit=MEDIAN, hookpoint=LAYER)
    ids = torch.tensor([lm.tok_encode(CALIBRATION_TEXT)[: lm.max_length]])
    with torch.no_grad():
        states = lm.model.model(input_ids=ids, output_hidden_states=True).hidden_states
    (tokens,) = states[2][:, 1:].double()
    lengths = sorted(tokens.square().sum(-1).sqrt().tolist())
    expected = 0.5 * lengths[(len(lengths) - 1) // 2] / tokens.shape[1] ** 0.5
    assert lm.attack_info()["epsilon_absolute"] == pytest.approx(expected, rel=1e-6)


def test_the_rms_of_ones_own_gives_what_the_built_in_gives(exact, build):
    requests = build("demo_piqa", 3).instances
    given = {"attack": "bim", "epsilon": 0.3, "hookpoint": LAYER, "steps": 3}
    found, expected = (
        exact(epsilon_unit=unit, **given).loglikelihood(requests, disable_tqdm=True)
        for unit in (rms, "rms")
    )
    assert found == expected


def test_several_hookpoints_each_have_their_own():
    given = {"attacks": ["none", "fgsm"], "limit": 2, "device": "cpu", "epsilons": 0.3}
    plan = Plan("demo", "demo_piqa", epsilon_unit=rms, hookpoints="layers", **given)
    result = evaluate(plan, progress="quiet")
    expected = evaluate(dataclasses.replace(plan, epsilon_unit="rms"), progress="quiet")
    sizes, of_rms = (
        [of["epsilon_absolute"] for of in run.run["attacks"].values()] for run in (result, expected)
    )
    assert sizes == pytest.approx(of_rms, rel=1e-12) and len(set(sizes)) >= 4
    at = f"fgsm@0.3{name_of(rms)}@{LAYER}"
    assert result.conditions[at].get("unit_source") == UNITS[name_of(rms)].source


def test_another_source_is_another_run(tmp_path, monkeypatch):
    """The folder is refused, and the conditions of the two are not paired."""
    monkeypatch.setattr("llm_attack.suite.report.figures.draw_all", lambda *_: [])
    given = {"attacks": ["none", "fgsm"], "limit": 2, "device": "cpu", "epsilon_unit": "mine"}

    def register(factor):
        UNITS.pop("mine", None)
        register_unit(lambda activations: factor * rms(activations), "mine")

    register(0.5)
    plan = Plan("demo", "demo_piqa", **given)
    evaluate(plan, output=tmp_path / "a", progress="quiet")
    register(2.0)
    with pytest.raises(UsageError, match=r"sources\.mine: "):
        evaluate(plan, output=tmp_path / "a", progress="quiet")
    evaluate(plan, output=tmp_path / "b", progress="quiet")
    folders = [str(tmp_path / name) for name in "ab"]
    del UNITS["mine"]  # reading needs no function
    done = CliRunner().invoke(main, ["compare", *folders, "-o", str(tmp_path / "c.csv")])
    assert done.exit_code == 0, done.output
    assert "fgsm@0.01mine (unit_source=" in (tmp_path / "c.csv").read_text()
    assert CliRunner().invoke(main, ["report", folders[0]]).exit_code == 0
    assert "FGSM at 0.01 mine: " in (tmp_path / "a" / "report.html").read_text()


def test_the_command(tmp_path, monkeypatch):
    (tmp_path / "my_units.py").write_text("def tenth(activations):\n    return 0.1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llm_attack.suite.report.figures.draw_all", lambda *_: [])
    words = "run --model demo --tasks demo_piqa --attacks fgsm --limit 1 --device cpu --epsilons 3"
    done = CliRunner().invoke(main, [*words.split(), "--epsilon_unit", "my_units:tenth", "-o", "o"])
    assert done.exit_code == 0, done.output
    assert "fgsm@3my_units:tenth,fgsm,embed,0.3," in (tmp_path / "o" / "table.csv").read_text()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda activations: -1.0, "must return a finite number, at least 0, not -1"),
        (lambda activations: float("nan"), "must return a finite number, at least 0, not nan"),
        (lambda activations: activations, r"fails on activations of shape \[\d+, \d+\]"),
        (lambda activations: "x", r"fails on .*ValueError"),
        (lambda activations: activations.wrong, r"fails on .*AttributeError"),
    ],
)
def test_what_is_no_size(make, function, said):
    register_unit(function, "strange")
    with pytest.raises(UsageError, match=f"epsilon_unit=strange: {said}") as refused:
        make(attack="fgsm", epsilon_unit="strange")
    assert "\n" not in str(refused.value)


def test_a_function_that_changes_what_it_gets(exact):
    """It has a copy: what is measured besides stays, also in float64."""

    def spoils(activations):
        activations.zero_()
        return 0.1

    lm = exact(attack="fgsm", epsilon=1, epsilon_unit=spoils, hookpoint=LAYER)
    assert lm.attack_info()["epsilon_absolute"] == 0.1
    expected = exact(attack="fgsm", hookpoint=LAYER).attack_info()
    assert lm.attack_info()["hookpoint_rms"] == expected["hookpoint_rms"] > 0


@pytest.mark.parametrize("function", [lambda: 1, lambda a, b: 1, lambda *, activations: 1])
def test_a_function_of_other_parameters(function):
    with pytest.raises(UsageError, match="epsilon_unit=strange: must take activations"):
        register_unit(function, "strange")
    assert "strange" not in UNITS


def test_units_whose_names_end_alike():
    """The longest is meant; none may look like a part of a number."""
    for name in ("my_rms", "halfmy_rms"):
        register_unit(rms, name)
        assert Epsilon.parse(f"0.5{name}") == Epsilon(0.5, name)
    for name in ("0", "5rms", "e5", "E10", ".x", "-2"):
        text = f"name={re.escape(repr(name))}: must be a name that begins"
        with pytest.raises(UsageError, match=text):
            register_unit(rms, name)


def test_one_of_the_users_own_in_an_epsilon(tmp_path, monkeypatch):
    """As the command in `run.json` has it, in a process that does not know the unit yet."""
    (tmp_path / "units_of_mine.py").write_text("def size(activations):\n    return 2.0\n")
    monkeypatch.chdir(tmp_path)
    settings = AttackSettings(epsilon="5e-1units_of_mine:size")
    assert settings.epsilon == Epsilon(0.5, "units_of_mine:size")
    assert settings.attack_in_units.condition == "fgsm@0.5units_of_mine:size"


def test_names():
    with pytest.raises(UsageError, match=r"epsilon_unit=nowhere:f: must be package\.module:func"):
        AttackSettings(epsilon_unit="nowhere:f")
    with pytest.raises(UsageError, match=r"epsilon_unit=mrs: must be one of .* mean 'rms'"):
        AttackSettings(epsilon_unit="mrs")
    for name in ("rms", "absolute"):
        with pytest.raises(ValueError, match=f"name={name}: must be a name that no unit has"):
            register_unit(rms, name)
    assert register_unit(rms, "mine") == register_unit(rms, "mine") == "mine"
    assert AttackSettings(epsilon="0.7mine").attack_in_units.condition == "fgsm@0.7mine"
