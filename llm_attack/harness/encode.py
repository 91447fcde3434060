"""Tokenises many texts in one call, because a fast tokenizer works on them in parallel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from llm_attack.harness.patches import replaced


@contextmanager
def encoded_together(tokenizer: Any, texts: Iterable[str]) -> Iterator[None]:
    """While the context lasts, `tokenizer.encode` already has the tokens of `texts`.

    lm-eval's own code still decides how a request becomes tokens, and with which options.
    """
    known: dict[tuple[Any, ...], dict[str, list[int]]] = {}
    distinct = list(dict.fromkeys(texts))
    encode = tokenizer.encode

    def together(text: str, **options: Any) -> list[int]:
        key = tuple(sorted(options.items()))
        if key not in known:
            tokens = tokenizer(distinct, **options)["input_ids"] if distinct else []
            known[key] = dict(zip(distinct, tokens, strict=True))
        tokens = known[key].get(text)
        return encode(text, **options) if tokens is None else list(tokens)

    with replaced(tokenizer, encode=together):
        yield
