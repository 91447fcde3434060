"""Settings of an attack: refused values, their messages, and values that follow from others."""

from dataclasses import fields
from fractions import Fraction

import pytest
import torch

from llm_attack.attacks import ATTACKS, Attack
from llm_attack.attacks.settings import StepSettings, step_settings
from llm_attack.base.errors import UsageError

from .helpers import ADAPTIVE, ALL_ATTACKS, ITERATIVE, MINIMAL, attacked, rng

NAN, INF = float("nan"), float("inf")


def refused(argument, value):
    with pytest.raises(UsageError) as caught:
        Attack(**{argument: value})
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_table_holds_these_attacks():
    assert tuple(ATTACKS) == ALL_ATTACKS


def test_defaults():
    attack = Attack("bim")
    assert (attack.epsilon, attack.steps, attack.step_size) == (0.01, 10, None)


@pytest.mark.parametrize(
    ("typed", "meant"), (("fsgm", "fgsm"), ("bmi", "bim"), ("randon", "random"), ("pgd ", "pgd"))
)
def test_a_near_miss_is_suggested(typed, meant):
    message = refused("name", typed)
    assert message.startswith(f"attack={typed}: must be one of none, random, uniform, gaussian")
    assert message.endswith(f"did you mean {meant!r}?")


@pytest.mark.parametrize("name", ("cw", "", 3, True))
def test_unknown_name_without_a_suggestion(name):
    message = refused("name", name)
    assert message.startswith(f"attack={name}: must be one of {', '.join(ALL_ATTACKS)}")
    assert "did you mean" not in message


BAD_NUMBERS = (-1, -1e-9, NAN, INF, -INF, "0.1", True, False, 1j, [0.1])


@pytest.mark.parametrize("value", (*BAD_NUMBERS, None), ids=repr)
def test_bad_epsilon(value):
    assert refused("epsilon", value) == f"epsilon={value!r}: must be a finite number, at least 0"


@pytest.mark.parametrize("value", (*BAD_NUMBERS, 0, 0.0, -0.0), ids=repr)
def test_bad_step_size(value):
    expected = f"step_size={value!r}: must be a finite number, greater than 0"
    assert refused("step_size", value) == expected


@pytest.mark.parametrize("value", (*BAD_NUMBERS, None), ids=repr)
def test_bad_decay(value):
    assert refused("decay", value) == f"decay={value!r}: must be a finite number, at least 0"


@pytest.mark.parametrize("value", (0, -1, 1.0, 2.5, NAN, INF, "3", True, False, None), ids=repr)
def test_bad_steps(value):
    assert refused("steps", value) == f"steps={value!r}: must be an integer, 1 or more"


@pytest.mark.parametrize(
    ("argument", "value"),
    (("epsilon", 10**400), ("step_size", 10**400), ("name", ["fgsm"]), ("name", {})),
    ids=("epsilon", "step_size", "list", "dict"),
)
def test_values_that_the_checks_themselves_stumble_over(argument, value):
    refused(argument, value)


@pytest.mark.parametrize("value", (0, 1, 0.0, 1e-300, 1e300, Fraction(1, 3)), ids=repr)
@pytest.mark.parametrize("name", ALL_ATTACKS)
def test_good_values(name, value):
    attack = Attack(name, value, steps=1, step_size=value or None, decay=value)
    assert attack.identity == (name == "none" or value == 0)


def test_settings_do_not_change():
    with pytest.raises(AttributeError):
        Attack().epsilon = 0.2


@pytest.mark.parametrize("name", ALL_ATTACKS)
@pytest.mark.parametrize("step_size", (None, 0.25))
def test_step(name, step_size):
    iterative = name in (*ITERATIVE, *MINIMAL)
    usual = 4.0 if name in (*ADAPTIVE, "critical") else 0.5
    expected = 2.0 if not iterative else usual if step_size is None else 0.25
    assert Attack(name, 2.0, step_size=step_size).step == expected


@pytest.mark.parametrize("name", ALL_ATTACKS)
@pytest.mark.parametrize("epsilon", (0, 0.5))
def test_which_attacks_start_with_the_clean_gradient(name, epsilon):
    expected = name in ("fgsm", "bim", "mifgsm", "reversed", "apgd", "critical") and epsilon > 0
    assert Attack(name, epsilon).uses_clean_gradient == expected


@pytest.mark.parametrize(
    ("attack", "condition"),
    (
        (Attack("none", 0.3), "none"),
        (Attack("fgsm", 0.01), "fgsm@0.01"),
        (Attack("pgd", 0), "pgd@0"),
        (Attack("bim", 1e-5), "bim@1e-05"),
        (Attack("bim", 0.7, label="0.7rms").scaled(0.136), "bim@0.7rms"),
    ),
)
def test_condition(attack, condition):
    assert attack.condition == condition


def test_scaled():
    scaled = Attack("bim", 2.0, steps=3, step_size=0.5)
    assert Attack("bim", 8.0, steps=3, step_size=2.0).scaled(1 / 4) == scaled
    assert Attack("ost", 8.0).scaled(1 / 4) == Attack("ost", 2.0)
    first = Attack("critical", 8.0, first_epsilon=4.0).scaled(1 / 4).first_epsilon
    assert first == 1.0


def test_step_settings():
    attack = Attack("bim", 2.0, steps=3, step_size=0.5, decay=0.9)
    assert step_settings(attack) == {
        **{"steps": 3, "step_size": 0.5, "decay": 0.9, "restarts": 1},
        **{"rounds": 12, "first_epsilon": None, "queries": 100},
        **{"exact_tokens": 0, "candidates": 64},
    }


OTHER = {
    "steps": 2,
    "step_size": 0.013,
    "decay": 0.1,
    "restarts": 4,
    "rounds": 2,
    "first_epsilon": 0.19,
    "queries": 3,
    "exact_tokens": 1,
    "candidates": 5,
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_kind_names_the_settings_that_it_reads(name):
    """Another value leads to other points where the attack reads the setting, and only there."""
    x = torch.randn(6, 8, generator=rng(0), dtype=torch.float64)
    w = torch.randn(8, 8, generator=rng(1), dtype=torch.float64)

    def loss(point):
        return (3 * point @ w).sin().sum(1) - 0.5 + point.square().sum(1) - x.square().sum(1)

    def found(**settings):
        return attacked(Attack(name, 0.2, **settings), x, loss)

    assert OTHER.keys() == {entry.name for entry in fields(StepSettings)}
    plain = found()
    read = {
        setting for setting in OTHER if not torch.equal(found(**{setting: OTHER[setting]}), plain)
    }
    assert read == set(ATTACKS[name].settings)
