"""Public functions with an argument of a wrong type raise an error that names the argument."""

import functools
import inspect
from pathlib import Path

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from llm_attack import Attack, AttackedHFLM, Plan, evaluate
from llm_attack.base.declare import names
from llm_attack.base.errors import UsageError
from llm_attack.lm.settings import AttackSettings, EngineSettings
from llm_attack.suite import results

VALUES = [
    *(5, 1.5, True, None, [], [5], [None], {}, {"a": 1}, object, object(), b"x", "", -1, [[1]]),
    *(torch.tensor(1.0), torch.ones(3), Path("x"), float("nan"), {1, 2}, (1, 2), 10**400, "١"),
]


class _Reached(BaseException):
    """All arguments were accepted."""


def complaint(call):
    """What a call says of its arguments, in one line; None: nothing."""
    try:
        call()
    except (TypeError, ValueError) as error:
        assert "\n" not in str(error)
        return str(error)
    except _Reached:
        pass
    return None


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_settings_of_other_types(value, monkeypatch):
    @functools.wraps(HFLM.__init__)
    def reached(*_, **__):
        raise _Reached

    monkeypatch.setattr(HFLM, "__init__", reached)
    arguments = [n for n in inspect.signature(HFLM.__init__).parameters if n != "self"][:-1]
    calls = {
        Plan: (names(Plan), {"model": "demo", "tasks": "demo_piqa"}),
        AttackedHFLM: ([*names(AttackSettings), *names(EngineSettings), *arguments], {}),
        Attack: (["epsilon", "norm", "steps", "step_size", "first_epsilon", "queries"], {}),
    }
    refused = 0
    for function, (settings, given) in calls.items():
        for name in settings:
            found = complaint(lambda f=function, g=given, n=name: f(**{**g, n: value}))
            assert found is None or name.rstrip("s") in found, (function, name, found)
            refused += found is not None
    assert refused >= 10


@pytest.mark.parametrize("value", [5, None, [], object()], ids=lambda value: type(value).__name__)
def test_paths_and_plans_of_other_types(value):
    plan = Plan("demo", "demo_piqa", device="cpu")
    with pytest.raises(TypeError, match="plan: must be a Plan, not"):
        evaluate(value)
    if value is not None:
        with pytest.raises(TypeError, match="output: must be a path, not"):
            evaluate(plan, output=value)
    with pytest.raises(UsageError, match=r"progress=.*: must be one of bar, json, quiet"):
        evaluate(plan, progress=value)
    for load in (results.load_frames, results.load):
        with pytest.raises(TypeError, match="folder: must be a path, not"):
            load(value)
