"""Encoder-decoder models: their two parts, the embeddings of both, and a forward over a text."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

ENCODER, DECODER, BOTH = "encoder", "decoder", "both"
PARTS = (ENCODER, DECODER)


def is_pair(model: Any) -> bool:
    """Whether `model` is an encoder with a decoder. Each of the two reads its own tokens."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def part_of(model: Any, part: str) -> nn.Module:
    """The encoder or the decoder of an encoder-decoder model."""
    found: nn.Module = model.get_encoder() if part == ENCODER else model.get_decoder()
    return found


def embedding_of(model: Any, part: str = ENCODER) -> nn.Module:
    """The input embedding. An encoder-decoder model has one in each part."""
    owner: Any = part_of(model, part) if is_pair(model) else model
    embedding: nn.Module = owner.get_input_embeddings()
    return embedding


def places(model: Any, hookpoint: str | None) -> dict[str, nn.Module]:
    """The modules that a hookpoint of an encoder-decoder model means, by part.

    Args:
        model: the model.
        hookpoint: dotted path of a module, which may start at `encoder` or `decoder`; `both`: the
            embeddings of both; None: the embedding of the encoder.

    Returns:
        One module, or two; empty if there is none of this name.
    """
    if hookpoint in (None, BOTH):
        parts = PARTS if hookpoint == BOTH else (ENCODER,)
        return {part: embedding_of(model, part) for part in parts}
    names = dict(model.named_modules(remove_duplicate=False))
    for part in PARTS:
        whole = part_of(model, part)
        inside = dict(whole.named_modules(remove_duplicate=False))
        paths = [part, *(name for name, module in names.items() if module is whole)]
        for path in paths:
            module = inside.get(str(hookpoint).removeprefix(f"{path}."))
            if str(hookpoint).startswith(f"{path}.") and module is not None:
                return {part: module}
    return {}


def read(model: Any, input_ids: Tensor) -> Any:
    """The output of a forward over a text, (B, L), which each part of the model reads."""
    decoder = {"decoder_input_ids": input_ids} if is_pair(model) else {}
    return model(input_ids=input_ids, **decoder)
