"""Rotary embeddings with frequencies that depend on the longest row of a forward.

With `longrope` the frequencies change from a certain length on. With `dynamic` they change with
every length beyond a limit, and they remain in later forwards until a short one comes. Rows with
different frequencies must not share a forward, and no forward may leave its frequencies to the
next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class Rotary:
    """The rotary embeddings of these kinds in a model, if it has any.

    Args:
        model: a model of transformers, or a PEFT model round one.

    Attributes:
        unknown: whether the model's own code changes frequencies by a rule that is not known here.
            Then only requests of equal length may share a forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self.unknown = False
        self._modules: list[Any] = []
        self._from: list[tuple[bool, int]] = []  # whether `dynamic`; the plain length
        module: Any
        for module in model.modules():
            for layers, kind in _kinds(module).items():
                if kind == "longrope":
                    self._from.append((False, _original_length(module.config, layers)))
                elif "dynamic" in kind:
                    self._from.append((True, int(module.original_max_seq_len)))
                else:
                    continue
                self._modules.append(module)
        self._modules = list(dict.fromkeys(self._modules))
        peft = getattr(model, "active_peft_config", None)
        self._before = getattr(peft, "num_virtual_tokens", None) or 0

    def scale(self, length: int) -> tuple[int, ...]:
        """A value that sets the frequencies for a request that reads `length` tokens.

        All requests of a forward must have the same value.
        """
        length += self._before
        if self.unknown:
            return (length,)
        return tuple(max(length, n) if dynamic else length > n for dynamic, n in self._from)

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """While the context lasts, earlier forwards have no influence; restores all afterwards."""
        before = [(m, dict(vars(m)), dict(m._buffers)) for m in self._modules]
        for module, _, buffers in before:
            for name, buffer in buffers.items():
                if buffer is not None:  # a copy, as some are written to in place
                    module._buffers[name] = buffer.clone()
            _reset(module)
        try:
            yield
        finally:
            for module, content, buffers in before:
                for name in vars(module).keys() - content.keys():
                    del vars(module)[name]
                vars(module).update(content)
                module._buffers.clear()
                module._buffers.update(buffers)


def own_code(model: Any) -> bool:
    """Whether a model is written outside of transformers, such as remote code."""
    base = getattr(model, "get_base_model", lambda: model)()  # inside a PEFT model
    return type(base).__module__.partition(".")[0] != "transformers"


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """The kinds of rotary embedding, by the type of layers that use them; None: all layers."""
    kind = getattr(module, "rope_type", None)
    return kind if isinstance(kind, dict) else {None: kind} if isinstance(kind, str) else {}


def _original_length(config: Any, layers: str | None) -> int:
    """The length up to which `longrope` has its short frequencies."""
    name = "original_max_position_embeddings"
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    of_layers = given.get(layers, given).get(name)
    return int(of_layers or getattr(config, name, None) or config.max_position_embeddings)


def _reset(module: Any) -> None:
    """Undoes the change that a long forward has left in a `dynamic` embedding."""
    for layers, kind in _kinds(module).items():
        prefix = "" if layers is None else f"{layers}_"
        cached = f"{prefix}max_seq_len_cached"
        longest = getattr(module, cached, module.max_seq_len_cached)
        if "dynamic" in kind and longest > module.original_max_seq_len:
            original = getattr(module, f"{prefix}original_inv_freq")
            inv_freq = module._buffers[f"{prefix}inv_freq"]
            module._buffers[f"{prefix}inv_freq"] = original.to(inv_freq.device, copy=True)
            setattr(module, cached, module.original_max_seq_len)
