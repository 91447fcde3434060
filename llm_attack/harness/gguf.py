"""Models in a GGUF file. Transformers dequantises them while it loads them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_gguf_available

from llm_attack.base.errors import UsageError, closest, did_you_mean
from llm_attack.harness.patches import replaced


def located(pretrained: Any, gguf_file: str | None) -> tuple[Any, str | None]:
    """Splits a model's path: (folder or hub id, name of the GGUF file in it or None).

    Args:
        pretrained: folder, hub id, loaded model, or the path of a GGUF file.
        gguf_file: the argument of lm-eval's `hf`.

    Raises:
        UsageError: a local file does not exist, or the package `gguf` is not installed.
    """
    if gguf_file is None and str(pretrained).endswith(".gguf"):
        path = Path(pretrained).expanduser()
        pretrained, gguf_file = str(path.parent), path.name
        if not path.parent.is_dir() and (path.is_absolute() or len(path.parts) != 3):
            raise UsageError(f"pretrained={path}: there is no folder {path.parent}")
    if gguf_file is None:
        return pretrained, None
    folder = Path(str(pretrained))
    if folder.is_dir() and not (folder / gguf_file).is_file():
        there = names_in(folder)
        meant = closest(gguf_file, there) or next(iter(there), None)
        raise UsageError(f"gguf_file={gguf_file}: must be a file in {folder}{did_you_mean(meant)}")
    if not is_gguf_available():
        raise UsageError(
            f"gguf_file={gguf_file}: needs the package gguf, which is missing or too old; pip"
            " install -U gguf"
        )
    return pretrained, gguf_file


def names_in(folder: Any) -> list[str]:
    """The names of the GGUF files in a folder; empty if it is not a folder."""
    return sorted(path.name for path in Path(str(folder)).glob("*.gguf"))


@contextmanager
def without_progress() -> Iterator[None]:
    """While the context lasts, dequantisation shows no bar, unless transformers is verbose."""
    from transformers import modeling_gguf_pytorch_utils

    reading: Any = modeling_gguf_pytorch_utils  # the bar is not part of its interface
    quiet = transformers_logging.get_verbosity() > logging.INFO
    bar = partial(reading.tqdm, disable=True) if quiet else reading.tqdm
    with replaced(reading, tqdm=bar):
        yield
