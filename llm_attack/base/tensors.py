"""Reads and writes files of safetensors, a tensor at a time, through a memory map.

The library holds all tensors in memory when it writes them, and reads bfloat16 only with torch.
These files may be larger than the memory, and reading them needs only numpy.
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_LENGTH = 8  # bytes of the length of the header
_METADATA = "__metadata__"
# Types that numpy lacks are read as integers with as many bytes.
TYPES = {
    "F64": "<f8",
    "I64": "<i8",
    "F32": "<f4",
    "I32": "<i4",
    "F16": "<f2",
    "BF16": "<u2",
    "U8": "|u1",
}


class Spec(NamedTuple):
    """A tensor of a file: a key of `TYPES`, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of bytes."""
        return math.prod(self.shape) * np.dtype(TYPES[self.dtype]).itemsize


def create(
    path: Path, tensors: Mapping[str, Spec], metadata: Mapping[str, str]
) -> dict[str, NDArray[Any]]:
    """Makes a file of zeros, and returns its tensors. Writing to them writes to the file.

    Raises:
        OSError: the disk has no room for the file.
    """
    ordered = sorted(tensors, key=lambda name: -np.dtype(TYPES[tensors[name].dtype]).itemsize)
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name in ordered:  # the largest types first, so each is aligned
        spec, start = tensors[name], end
        end += spec.size
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH, "little") + text)
        size = _LENGTH + len(text) + end
        file.truncate(size)
        file.flush()
        if hasattr(os, "posix_fallocate"):  # a full disk is no error of a map: it ends the process
            os.posix_fallocate(file.fileno(), 0, size)
    return {name: _mapped(path, header[name], _LENGTH + len(text), "r+") for name in ordered}


class TensorFile:
    """A file that is read one tensor at a time.

    Attributes:
        tensors: its tensors.
        metadata: its metadata.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file has another format, or is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            n = int.from_bytes(file.read(_LENGTH), "little")
            size = path.stat().st_size
            if n > size:
                raise ValueError(f"{path.name}: the header is longer than the file")
            self._header = json.loads(file.read(n))
        self.metadata: dict[str, str] = self._header.pop(_METADATA, {})
        self._start = _LENGTH + n
        self.tensors = {
            name: Spec(about["dtype"], tuple(about["shape"]))
            for name, about in self._header.items()
        }
        if size != self._start + sum(spec.size for spec in self.tensors.values()):
            raise ValueError(f"{path.name}: its tensors are not as long as the header says")

    def __getitem__(self, name: str) -> NDArray[Any]:
        """A tensor as it is stored; bfloat16 as integers."""
        return _mapped(self.path, self._header[name], self._start, "r")

    def numbers(self, name: str) -> NDArray[Any]:
        """A tensor; bfloat16 as float32, which has all of its numbers."""
        return widened(self[name])


def widened(stored: NDArray[Any]) -> NDArray[Any]:
    """Turns stored bfloat16 (integers) into float32; returns other tensors unchanged."""
    return (stored.astype("<u4") << 16).view("<f4") if stored.dtype == TYPES["BF16"] else stored


def _mapped(path: Path, about: Mapping[str, Any], start: int, mode: Any) -> NDArray[Any]:
    dtype, shape = np.dtype(TYPES[about["dtype"]]), tuple(about["shape"])
    if math.prod(shape) == 0:  # an empty tensor has no map
        return np.zeros(shape, dtype)
    offset = start + about["data_offsets"][0]
    return np.memmap(path, dtype, mode, offset=offset, shape=shape)
