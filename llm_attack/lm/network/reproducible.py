"""Numbers that depend on what is computed alone, to the last bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What cuBLAS wants to be told before it is first used: one workspace of each kind and stream.
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


@contextmanager
def reproducible(wanted: bool) -> Iterator[None]:
    """While it lasts, the same operation on the same tensors gives the same bits, if `wanted`.

    On one thread, as sums are divided among threads, whose number differs between launchers; with
    the algorithms that torch calls deterministic, and an error where there is none.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault(*_CUBLAS)
    threads = torch.get_num_threads()
    mode = torch.get_deterministic_debug_mode()
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)
