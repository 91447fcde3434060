"""Models in a GGUF file, which transformers dequantises as it loads them."""

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
    """(folder or hub id, name of the GGUF file in it or None).

    Args:
        pretrained: folder, hub id, loaded model, or the path of a GGUF file.
        gguf_file: as of lm-eval's `hf`.

    Raises:
        UsageError: a local file is not there, or the package `gguf` is not.
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
    """The GGUF files of a folder; none where it is not one."""
    return sorted(path.name for path in Path(str(folder)).glob("*.gguf"))


@contextmanager
def without_progress() -> Iterator[None]:
    """Dequantisation shows no progress while it lasts, unless transformers is to be verbose."""
    from transformers import modeling_gguf_pytorch_utils

    reading: Any = modeling_gguf_pytorch_utils  # its bar is not part of its interface
    quiet = transformers_logging.get_verbosity() > logging.INFO
    bar = partial(reading.tqdm, disable=True) if quiet else reading.tqdm
    with replaced(reading, tqdm=bar):
        yield
