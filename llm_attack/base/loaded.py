"""A model that is already in memory, and its name in results. Needs no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llm_attack.base.errors import UsageError, invalid


class LoadedModel(str):
    """The name of a loaded model, as a text that also holds the model.

    Records, tables and comparisons read it as a text. Only the code that computes uses the model.

    Args:
        model: a model of transformers.
        tokenizer: its tokenizer, or the path or hub id to load it from; None: the path or hub id
            that the model was loaded from.
        name: the name in results. By default the path or hub id of the model, or else its class.

    Raises:
        UsageError: it is not a model of transformers, or the name is not a text.
    """

    model: Any
    tokenizer: Any

    def __new__(cls, model: Any, tokenizer: Any = None, name: str | None = None) -> LoadedModel:
        kind = type(model).__name__
        if not hasattr(model, "config"):
            raise UsageError(f"model={kind}: must be a model of transformers, or its name")
        if name is not None and (not isinstance(name, str) or not name.strip()):
            raise invalid("name", name, "a text")
        source = getattr(model.config, "name_or_path", "")
        if tokenizer is None and not source:
            raise UsageError(
                f"tokenizer=None: must be given, because the loaded {kind} does not know the path"
                " it was loaded from"
            )
        loaded = super().__new__(cls, name or source or kind)
        loaded.model, loaded.tokenizer = model, tokenizer
        return loaded

    def __deepcopy__(self, memo: Any) -> LoadedModel:
        """Returns itself. A copied plan with only the name would load other weights."""
        return self

    def __reduce__(self) -> Any:
        raise UsageError(
            f"model={self}: is loaded in this process; must be the name of a model to be pickled"
        )


def is_loaded(model: Any) -> bool:
    """Whether it is a network in memory. If torch is not imported, it is not."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def name_of(model: Any) -> str:
    """The name of a model in messages: its name or path, or the class of a loaded model."""
    return str(model) if isinstance(model, (str, Path)) else type(model).__name__
