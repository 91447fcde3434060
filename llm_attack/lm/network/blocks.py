"""Recomputes, compiles or skips the model's blocks, one by one.

The model as a whole is not compiled: hooks come and go at the embedding and at the head, and a
compiled graph does not notice them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llm_attack.base.errors import UsageError
from llm_attack.lm.settings import EngineSettings


def prepare(model: PreTrainedModel, settings: EngineSettings, hookpoint: nn.Module) -> None:
    """Sets up recomputation or compilation of the blocks, as `settings` say.

    Raises:
        UsageError: as for `blocks`.
    """
    if settings.gradient_checkpointing:
        for block in blocks(model, "gradient_checkpointing"):
            recompute(block)
    if settings.compile:
        for block in blocks(model, "compile"):
            if hookpoint not in block.modules():  # compiled code would not see the hook
                compiled(block)


def blocks(model: PreTrainedModel, argument: str) -> list[nn.Module]:
    """The model's blocks.

    Raises:
        UsageError: the blocks of this model are not known. The message names `argument`.
    """
    known = known_blocks(model)
    if not known:
        raise UsageError(
            f"{argument}=True: must be False for {type(model).__name__}, because transformers"
            " does not name its blocks"
        )
    return known


def known_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks, if any: the modules that transformers never splits over devices.

    If such modules are inside of each other (Mamba's mixers), only the outermost count.
    """
    candidates = [
        block
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        for names in [getattr(module, "_no_split_modules", None) or ()]
        for block in module.modules()
        if type(block).__name__ in names
    ]
    inside = {module for block in candidates for module in block.modules() if module is not block}
    return [block for block in dict.fromkeys(candidates) if block not in inside]


def recompute(block: nn.Module) -> None:
    """From now on only the input of `block` is kept for the backward pass.

    Unlike the gradient checkpointing of transformers, this works in evaluation mode, without
    dropout. Hooks of modules inside the block act again in the backward pass as they did in the
    forward, even if they are removed by then.
    """
    forward = block.forward

    @functools.wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        inside = [m for m in block.modules() if m is not block and m._forward_hooks]
        hooks = [(module, dict(module._forward_hooks)) for module in inside]
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _again(hooks)),
            **kwargs,
        )

    block.forward = checkpointed


@contextmanager
def _again(hooks: Sequence[tuple[nn.Module, dict[int, Callable[..., Any]]]]) -> Iterator[None]:
    """While the context lasts, the modules have only these forward hooks."""
    now = [dict(module._forward_hooks) for module, _ in hooks]
    try:
        for module, then in hooks:
            _set_hooks(module, then)
        yield
    finally:
        for (module, _), before in zip(hooks, now, strict=True):
            _set_hooks(module, before)


def _set_hooks(module: nn.Module, hooks: dict[int, Callable[..., Any]]) -> None:
    module._forward_hooks.clear()
    module._forward_hooks.update(hooks)


def compiled(block: nn.Module) -> None:
    """From now on `block` runs compiled, for any batch size and length."""
    block.forward = torch.compile(block.forward, dynamic=True)


@dataclass(frozen=True)
class Skip:
    """The blocks before a hookpoint. They need not run if their clean output is known.

    Attributes:
        blocks: the blocks to skip. `below` is the output of the last of them.
        rest: for each block, its output without the hidden states; None if it is not a tuple.
    """

    blocks: tuple[nn.Module, ...]
    rest: tuple[tuple[Any, ...] | None, ...]

    @contextmanager
    def over(self, below: Tensor) -> Iterator[None]:
        """While the context lasts, the blocks return `below`, (B, L, H), and compute nothing."""
        before = [vars(block).get("forward") for block in self.blocks]
        try:
            for block, rest in zip(self.blocks, self.rest, strict=True):
                block.forward = _returns(below if rest is None else (below, *rest))
            yield
        finally:
            for block, forward in zip(self.blocks, before, strict=True):
                if forward is None:
                    vars(block).pop("forward", None)
                else:
                    block.forward = forward


def _returns(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output
