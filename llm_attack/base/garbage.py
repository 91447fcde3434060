"""When Python looks for garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept() -> Iterator[None]:
    """Python does not look for reference cycles while the context lasts.

    For commands of seconds that import much and make many small objects, most of which stay in use:
    looking through them again and again takes a twentieth of their time, and frees nothing.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
