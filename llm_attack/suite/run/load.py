"""Loading the model of a plan onto the device of its process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from llm_attack.base.declare import names
from llm_attack.base.device import check_device
from llm_attack.base.loaded import LoadedModel
from llm_attack.harness.model import AttackedHFLM
from llm_attack.lm.settings import AttackSettings, EngineSettings
from llm_attack.suite.plan import Plan
from llm_attack.suite.run import fixed


def load_model(plan: Plan) -> AttackedHFLM:
    """The model, under the plan's first condition.

    Raises:
        UsageError: an argument is not allowed, or there is no such model.
    """
    engine = {name: getattr(plan, name) for name in names(EngineSettings)}
    arguments = {"batch_size": plan.batch_size, **engine, **plan.model_args}
    device = plan.device
    model = plan.model
    if isinstance(model, LoadedModel):
        if model.tokenizer is not None:
            arguments["tokenizer"] = model.tokenizer
        model = model.model
    elif device is not None:
        check_device(device)
    elif "LOCAL_RANK" in os.environ:
        import torch

        if torch.cuda.is_available():
            device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    if device is not None:
        arguments["device"] = device
    first = {name: getattr(plan.conditions[0], name) for name in names(AttackSettings)}
    with nullcontext() if plan.model_args.get("tp_plan") is not None else _alone():
        lm = AttackedHFLM(pretrained=model, **arguments, **first)
    lm.path_points = plan.path_points if plan.save_perturbations else None
    lm.trace = plan.trace
    lm.smoothing = plan.smoothing
    lm.fixed = fixed.load(plan, lm)
    return lm


@contextmanager
def left_as_it_was(model: str) -> Iterator[None]:
    """Restores the blocks of a model that was loaded before the run.

    A run may replace `forward` of blocks, to recompute or to compile them. The code that changes
    modes, hooks and `requires_grad` restores these itself.
    """
    modules = list(model.model.modules()) if isinstance(model, LoadedModel) else []
    forwards = [vars(module).get("forward") for module in modules]
    try:
        yield
    finally:
        for module, forward in zip(modules, forwards, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


@contextmanager
def _alone() -> Iterator[None]:
    """Hides the other processes from accelerate, which would connect to them and wait for all."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
