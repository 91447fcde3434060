"""Trials of a model before its first batch, which the bundled model passes again and again.

Those of the bundled model are made once in a process. A model that is another in any way, by its
weights, configuration, hooks or modules, is tried as always.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch

FREE = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def remember(patch: Any) -> None:
    """From now on what a trial found is known, until `patch` (of `pytest`) is undone."""
    from llm_attack.harness import model
    from llm_attack.lm.engine import engine
    from llm_attack.lm.engine.stack import Stack

    for module, name, made in (
        (engine, "longest_flat", None),
        (engine, "takes_twins", None),
        (engine, "usable_stack", lambda scorer: Stack.of(scorer.model, scorer.lean)),
        (model, "longest_tree", None),
        (model, "examine", None),
    ):
        patch.setattr(module, name, _once(getattr(module, name), made))


def _once(trial: Any, made: Any) -> Any:
    known: dict[Any, Any] = {}

    def tried(scorer: Any, *given: Any) -> Any:
        key = (*_identity(scorer), repr(given))
        if key in known:
            return known[key] if made is None else made(scorer)
        result = trial(scorer, *given)
        said = getattr(result, "fault", "") or getattr(result, "warning", "")
        if key[0] is not None and result and not said:  # what a model lacks is said each time
            known[key] = result
        return result

    return tried


def _identity(scorer: Any) -> tuple[Any, ...]:
    """All that a trial depends on; (None,) if somebody has put something into the model."""
    model = scorer.model
    if scorer.skip is not None:
        return (None,)
    path, kinds = None, []
    for name, module in model.named_modules():
        known = type(module).__module__.startswith(("torch.", "transformers."))
        hooked = any(getattr(module, hooks) for hooks in FREE)
        compiled = module._compiled_call_impl is not None
        if not known or hooked or compiled or "forward" in vars(module):
            return (None,)
        kinds.append(type(module))
        path = name if module is scorer.hookpoint else path
    weights = 0
    for weight in model.parameters():
        if type(weight.detach()) is not torch.Tensor or weight.device.type != "cpu":
            return (None,)
        content = weight.detach().reshape(-1).contiguous().view(torch.uint8)
        weights = zlib.crc32(content.numpy(), weights)
    how = model.dtype, scorer.autocast, scorer.softmax_dtype, scorer.longest_flat, model.training
    stacked = scorer.stack is not None, scorer.lean is not None
    config = repr(model.config), getattr(model.config, "_attn_implementation", None)
    return weights, *config, path, tuple(kinds), *how, *stacked
