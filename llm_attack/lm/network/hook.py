"""The hookpoint: finds a module by name, reads its output, and replaces it by another tensor.

Every function removes its own handles and no others, even if the forward raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_attack.base.errors import UsageError, closest, did_you_mean
from llm_attack.lm.network.pairs import embedding_of, is_pair, places, read


def resolve(model: PreTrainedModel, hookpoint: str | None) -> nn.Module:
    """The module at `hookpoint`, a dotted path of `model.named_modules()`; None: input embedding.

    Raises:
        UsageError: no module has that name.
    """
    if hookpoint is None:
        return embedding_of(model)
    if is_pair(model):
        for module in places(model, hookpoint).values():
            return module
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if hookpoint and hookpoint in modules and not is_pair(model):
        return modules[hookpoint]
    ends = [name for name in modules if name.endswith(f".{hookpoint}")]
    meant = ends[0] if len(ends) == 1 else closest(hookpoint, modules)
    raise _refused(hookpoint, modules, meant)


def vocabulary_of(model: PreTrainedModel) -> int:
    """The number of tokens that have an embedding."""
    embedding: Any = embedding_of(model)
    return int(getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])


def try_out(model: PreTrainedModel, hookpoints: Iterable[str], input_ids: Tensor) -> None:
    """Tries in a forward over some of `input_ids`, (1, L), if the hookpoints can be perturbed.

    Raises:
        UsageError: the module at one of `hookpoints` does not run once before the head, or its
            output is not of shape (batch, sequence, hidden). The message names the nearest module
            that would do.
    """
    rows = input_ids[:, :6].repeat(2, 1)  # two rows: some modules have one output for all rows
    given = {name: resolve(model, name) for name in hookpoints}
    fault_of = faults(model, given, rows)
    hookpoint = next((name for name in given if fault_of.get(name, "does not run")), None)
    if hookpoint is None:
        return
    modules = dict(model.named_modules())
    good = [
        name
        for name, fault in faults(model, modules, rows).items()
        if not fault or name == hookpoint
    ]
    before = good[: good.index(hookpoint)] if hookpoint in good else []
    meant = before[-1] if before else closest(hookpoint, {*good} - {hookpoint})
    fault = fault_of.get(hookpoint, "does not run")
    raise _refused(hookpoint, modules, meant, f"; this module {fault}")


def faults(
    model: PreTrainedModel, modules: dict[str, nn.Module], input_ids: Tensor
) -> dict[str, str]:
    """For each module, why it cannot be a hookpoint, if there is a reason, in the order of outputs.

    A forward over `input_ids`, (B, L), shows this. Modules that do not run are missing.
    """
    fault_of: dict[str, str] = {}
    runs = dict.fromkeys(modules, 0)
    gathered = False

    def gather(*_: object) -> None:
        nonlocal gathered
        gathered = True

    def hook_of(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            runs[name] += 1
            first = output[0] if isinstance(output, tuple) and output else output
            if runs[name] > 1:
                fault_of[name] = f"runs {runs[name]} times"
            elif gathered:
                fault_of[name] = "is the head, or runs after it"
            elif not isinstance(first, Tensor):
                fault_of[name] = f"returns a {type(first).__name__}"
            elif first.dim() != 3 or first.shape[:2] != input_ids.shape:
                fault_of[name] = (
                    f"returns shape {tuple(first.shape)} for {tuple(input_ids.shape)} tokens"
                )
            else:
                fault_of[name] = ""

        return look

    head = model.get_output_embeddings()
    handles = [] if head is None else [head.register_forward_pre_hook(gather)]
    handles += [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            read(model, input_ids)
    finally:
        for handle in handles:
            handle.remove()
    return fault_of


def _refused(
    hookpoint: str, modules: dict[str, nn.Module], meant: str | None, reason: str = ""
) -> UsageError:
    # a transformer block's path: the first name that ends in a number
    ends = (name for name in modules if name.rsplit(".", 1)[-1].isdigit())
    return UsageError(
        f"hookpoint={hookpoint}: must be the dotted path of a module that runs once, before the"
        " head, and returns a tensor of shape (batch, sequence, hidden), such as"
        f" {next(ends, 'model.layers.0')!r}{reason}{did_you_mean(meant)}"
    )


@contextmanager
def edit_output(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the context lasts, `module` returns edit(output); only the first element of a tuple."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
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
    """While the context lasts, `module` gets edit(x) for its first positional argument x."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (edit(args[0]), *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _Stop(Exception):
    """Raised to end a forward as soon as the hookpoint's output is known."""


def capture(module: nn.Module, forward: Callable[[], object]) -> Tensor:
    """The output of `module` in `forward()`, detached. The forward stops right after it."""
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
    """While the context lasts, `model` is in evaluation mode and no parameter requires a gradient.

    Modes and flags are restored afterwards.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    training = [module for module in model.modules() if module.training]
    for p in trainable:
        p.requires_grad_(False)
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for module in training:
            module.training = True
