"""Turns off Python's search for garbage."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept() -> Iterator[None]:
    """While the context lasts, Python does not look for reference cycles.

    It is for short commands that import much and make many small objects. Most of these stay in
    use. A search takes a twentieth of the time, and frees nothing. The last one, when the process
    ends, is left out too.
    """
    atexit.register(gc.disable)
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
