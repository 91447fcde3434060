"""The hookpoint: find a module by name, read its output, put another tensor in its place.

Every function is a context manager that removes its own handle and no other, also when the forward
raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_attack.errors import UsageError, closest


def resolve(model: PreTrainedModel, hookpoint: str | None) -> nn.Module:
    """The module at `hookpoint`, a dotted path of `model.named_modules()`; None: input embedding.

    Raises:
        UsageError: no module has that name.
    """
    if hookpoint is None:
        return model.get_input_embeddings()
    modules = dict(model.named_modules())
    if hookpoint and hookpoint in modules:
        return modules[hookpoint]
    ends = [name for name in modules if name.endswith(f".{hookpoint}")]
    meant = ends[0] if len(ends) == 1 else closest(hookpoint, modules)
    hint = f"; did you mean {meant!r}?" if meant else ""
    raise UsageError(
        f"hookpoint={hookpoint}: must be the dotted path of a module of the model,"
        f" such as {_example(modules)!r}{hint}"
    )


def _example(modules: dict[str, nn.Module]) -> str:
    """A transformer block's path: the first name that ends in a number."""
    return next((name for name in modules if name.rsplit(".", 1)[-1].isdigit()), "model.layers.0")


@contextmanager
def edit_output(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, `module` returns edit(output); of a tuple, its first element is edited."""

    def hook(module: nn.Module, args: tuple, output):
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def edit_input(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, `module` gets edit(x) for its first positional argument x."""

    def hook(module: nn.Module, args: tuple):
        return (edit(args[0]), *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _Stop(Exception):
    """Ends a forward once the hookpoint's output is known."""


def capture(module: nn.Module, forward: Callable[[], object]) -> Tensor:
    """The output of `module` in `forward()`, detached; the forward stops right after it."""
    seen: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        seen.append(output.detach())
        raise _Stop

    with torch.no_grad(), edit_output(module, keep):
        try:
            forward()
        except _Stop:
            return seen[0]
    raise RuntimeError(f"the model's forward never called the module at the hookpoint: {module}")


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of `model` requires a gradient while it lasts; flags are restored after."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
