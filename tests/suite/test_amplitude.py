"""Amplitudes in units of the RMS: their names, their values, and refused ones."""

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from llm_attack.base.errors import UsageError
from llm_attack.lm import units
from llm_attack.lm.settings import AttackSettings
from llm_attack.lm.units import Amplitude, Epsilon, Signal
from llm_attack.suite.evaluate import command
from llm_attack.suite.plan import Plan

SIGNAL = Signal(rms=0.1356, width=576, token_norm=3.1)


@pytest.mark.parametrize(
    "arguments",
    [{"epsilon": "0.7rms"}, {"epsilon": 0.7, "epsilon_unit": "rms"}],
    ids=["suffix", "unit"],
)
def test_named_in_its_unit(arguments):
    resolved = AttackSettings("fgsm", **arguments).resolved(SIGNAL)
    assert resolved.condition == "fgsm@0.7rms"
    assert resolved.epsilon == pytest.approx(0.7 * 0.1356)


def test_absolute_as_before():
    resolved = AttackSettings("fgsm", 0.01).resolved(SIGNAL)
    assert (resolved.condition, resolved.epsilon) == ("fgsm@0.01", 0.01)


@pytest.mark.parametrize("norm", ["linf", "l2", "l2_token"])
@pytest.mark.parametrize(
    ("unit", "of_coordinate"),
    [("rms", 0.1356), ("token_norm", 3.1 / 24), ("neftune", 1 / 24), ("absolute", None)],
)
def test_units(unit, of_coordinate, norm):
    """In L2 one is the norm of a token with that much in all its 576 = 24 squared coordinates."""
    settings = AttackSettings("bim", 0.5, epsilon_unit=unit, norm=norm, step_size=0.1)
    resolved = settings.resolved(SIGNAL)
    one = 1 if of_coordinate is None else of_coordinate * (1 if norm == "linf" else 24)
    assert (resolved.epsilon, resolved.step) == pytest.approx((0.5 * one, 0.1 * one))
    assert resolved.by_size == (unit == "neftune")
    assert resolved.condition.startswith("bim@0.5" + unit * (unit != "absolute"))


def test_both_units_in_one_plan():
    plan = Plan(attacks="none,fgsm", epsilons="0.01,0.7rms")
    assert plan.epsilons == (Epsilon(0.01), Epsilon(0.7, "rms"))
    attacks = [condition.resolved(Signal(0.5, 576, 9.0)) for condition in plan.conditions]
    assert [a.condition for a in attacks] == ["none", "fgsm@0.01", "fgsm@0.7rms"]
    assert [a.epsilon for a in attacks[1:]] == pytest.approx([0.01, 0.35])
    assert "--epsilons 0.01,0.7rms" in " ".join(command(plan, None))


def test_each_epsilon_is_read_once(monkeypatch):
    read, built = [], []
    make = AttackSettings.__post_init__
    monkeypatch.setattr(units, "is_plain", lambda text: (read.append(text), True)[1])
    monkeypatch.setattr(
        AttackSettings, "__post_init__", lambda self: (built.append(self), make(self))[1]
    )
    plan = Plan(loss="choice", epsilons="0.01,0.7rms", critical=True, epsilon_max="1rms")
    assert plan.conditions is plan.conditions
    assert sorted(plan.conditions_at([None]), key=str) == sorted(plan.conditions, key=str)
    # none, three attacks at two epsilons, critical, fmn
    assert len(plan.conditions) == len(built) == 9
    assert read == ["0.01", "0.7", "1"]
    again = replace(plan, seed=1)
    assert again.epsilons == plan.epsilons and len(read) == 3


@pytest.mark.parametrize("number", [0.1234567891, 1e-9, 3.0, 0.7])
def test_an_epsilon_is_stored_as_it_was_typed(number):
    for epsilon in (Epsilon(number), Epsilon(number, "rms"), Epsilon(number, "neftune")):
        assert Epsilon.parse(epsilon.plain) == Epsilon.parse(str(epsilon)) == epsilon
        assert Plan(epsilons=str(epsilon)).epsilons == (epsilon,)


def test_epsilons_of_other_types_are_plain_numbers():
    for given in (np.float32(0.5), np.float64(0.5), Fraction(1, 2), "+0.5", ".5", "5e-1"):
        found = Plan(epsilons=[given]).epsilons[0]
        assert found == Epsilon(0.5) and type(found.number) is float
        assert json.loads(json.dumps(AttackSettings(epsilon=given).epsilon.number)) == 0.5
    assert str(Plan(epsilons="-0").conditions[-1].amplitude) == "0"
    for given in ("0,-0.0", "0.1,1e-1", [Epsilon(0.1, "absolute"), 0.1]):
        with pytest.raises(UsageError, match=r"must give the condition .* only once"):
            Plan(epsilons=given)


@pytest.mark.parametrize("given", [Epsilon(0.1, "foo"), Epsilon("x"), Epsilon(True), "0.1foo:bar"])
def test_an_epsilon_that_is_none(given):
    for what in ({"epsilons": [given]}, {"epsilon_max": given, "attacks": "critical"}):
        with pytest.raises(UsageError, match="epsilon"):
            Plan(loss="choice", **what)


def test_an_absolute_epsilon_is_typed_so():
    """Also in a run whose other epsilons have a unit."""
    plan = Plan(epsilons=[Epsilon(0.1, "absolute"), 0.1], epsilon_unit="rms", attacks="fgsm")
    assert [of.attack_in_units.condition for of in plan.conditions] == ["fgsm@0.1", "fgsm@0.1rms"]
    again = Plan(epsilons=",".join(map(str, plan.plain()["epsilons"])), epsilon_unit="rms")
    assert again.epsilons == plan.epsilons


def test_the_label_of_an_amplitude():
    amplitude = Amplitude(Epsilon(0.70, "rms"), "l2_token", "model.layers.1")
    assert str(amplitude) == "0.7rms-l2_token@model.layers.1"
    assert str(Amplitude(Epsilon(0.01, "absolute"))) == str(Amplitude(Epsilon(0.01))) == "0.01"


def test_a_step_size_is_in_the_unit_of_its_epsilon():
    plan = Plan(attacks="bim", epsilons="0.1,0.7rms", step_size=0.2)
    assert [c.resolved(Signal(0.5, 576, 9.0)).step for c in plan.conditions] == pytest.approx(
        [0.2, 0.1]
    )


def test_one_amplitude_twice_is_refused():
    with pytest.raises(UsageError):
        Plan(attacks="fgsm", epsilons="0.7rms,0.70rms")


@pytest.mark.parametrize("typed", ["0.7rsm", "rms", "0.7 rms x", "-1rms", "nanrms", "infrms"])
def test_refused(typed):
    number = typed in ("-1rms", "nanrms", "infrms")  # a run's list of others is no list of numbers
    for make, says in (
        (lambda: AttackSettings("fgsm", epsilon=typed), "at least 0"),
        (
            lambda: Plan(attacks="fgsm", epsilons=typed).conditions,
            "at least 0" if number else "must be numbers",
        ),
    ):
        with pytest.raises(UsageError) as caught:
            make()
        message = str(caught.value)
        assert message.startswith("epsilon") and says in message
        assert "\n" not in message
