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
    use. A search takes a twentieth of the time, and frees nothing. There is none at the end of the
    context and of the process either.
    """
    atexit.register(gc.disable)
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            if not gc.get_freeze_count():  # what somebody froze stays so
                gc.freeze()  # all objects become old without a search, which is a tenth of a second
                gc.unfreeze()
            gc.enable()
