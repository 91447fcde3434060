"""Checks the argument `revision`, which has a meaning only on a hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_attack.base.errors import UsageError
from llm_attack.base.loaded import name_of

DEFAULT = "main"


def check_revision(pretrained: Any, source: Any, arguments: Mapping[str, Any]) -> None:
    """Refuses a revision of a local model, because `from_pretrained` would ignore it.

    Args:
        pretrained: the argument as the user gave it, for the message.
        source: the place that the model is loaded from.
        arguments: the arguments of `hf`. An adapter, delta weights and a tokenizer are loaded from
            the same revision as the model.

    Raises:
        UsageError: a revision other than the default is given, and nothing is loaded from a hub.
    """
    revision = arguments.get("revision")
    sources = [source, *(arguments.get(name) for name in ("tokenizer", "peft", "delta"))]
    if revision in (None, DEFAULT) or any(map(_on_hub, sources)):
        return
    raise UsageError(
        f"revision={revision}: must be left out with pretrained={name_of(pretrained)}, which has"
        " no revisions, because it is not loaded from a hub"
    )


def _on_hub(source: Any) -> bool:
    return isinstance(source, str) and source != "" and not Path(source).exists()
