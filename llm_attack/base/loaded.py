"""A model that is in memory already, under the name that results give it. Needs no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llm_attack.base.errors import UsageError, invalid


class LoadedModel(str):
    """The name of a loaded model, which carries the model.

    Records, tables and comparisons see a text. Only what computes asks for the model itself.

    Args:
        model: of transformers.
        tokenizer: its tokenizer, or where that is loaded from; None: from where the model is from.
        name: what it is called in results; unless given, where it is from, or else its class.

    Raises:
        UsageError: it is no model of transformers, or the name is no text.
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
        """Itself: by its name alone, a copied plan would load other weights."""
        return self

    def __reduce__(self) -> Any:
        raise UsageError(
            f"model={self}: is loaded in this process; must be the name of a model to be pickled"
        )


def is_loaded(model: Any) -> bool:
    """Whether it is a network in memory; without torch there is none."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def name_of(model: Any) -> str:
    """The text by which messages name a model: its name or path, or the class of a loaded one."""
    return str(model) if isinstance(model, (str, Path)) else type(model).__name__
