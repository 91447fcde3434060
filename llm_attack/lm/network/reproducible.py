"""Makes computations repeatable to the last bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# cuBLAS reads this before its first use: one workspace of each kind and stream.
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


@contextmanager
def reproducible(wanted: bool) -> Iterator[None]:
    """While the context lasts, equal operations on equal tensors give equal bits, if `wanted`.

    Torch then uses one thread, because threads divide sums and launchers set different numbers of
    them. It uses the algorithms that it calls deterministic, and raises an error if it has none.
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
