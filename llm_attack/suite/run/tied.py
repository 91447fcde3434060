"""The tables of embeddings that attacks fit to all questions of a run, as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from llm_attack.attacks import Attack
from llm_attack.base.record import whole_or_not
from llm_attack.lm.engine.tied import Fitted


def save(tables: Mapping[Attack, Fitted], folder: Path) -> None:
    """Writes a safetensors file for each table.

    Its tensors are `ids`, the tokens that moved, and `embeddings`, their rows. With these rows in
    its embedding matrix, a model answers as under the attack.
    """
    for attack, table in tables.items():
        tensors = {"ids": table.ids.cpu(), "embeddings": table.rows.cpu().contiguous()}
        path = folder / f"{attack.condition.replace('@', '_')}.safetensors"
        with whole_or_not(path) as draft:
            save_file(tensors, draft, {"loss": " ".join(map(str, table.losses))})
