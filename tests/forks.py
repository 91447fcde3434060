"""Separate processes that need not import the libraries: forks of a server that has done so."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from indexed import know_few

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        "llm_attack.suite.evaluate",
        "llm_attack.suite.report.figures",
        "matplotlib.backends.backend_agg",
        "matplotlib.backends.backend_svg",
        "matplotlib.figure",
        "transformers.models.llama.modeling_llama",
    ]
)


class Done(NamedTuple):
    """What a process came to."""

    returncode: int
    stdout: str
    stderr: str


def run_module(name: str, *arguments: str, folder: Path) -> Done:
    """`python -m name arguments`, which writes what it prints into `folder`."""
    process = server.Process(target=_enter, args=(name, arguments, folder))
    process.start()
    process.join()
    return Done(process.exitcode, *((folder / of).read_text() for of in ("stdout", "stderr")))


def _enter(name: str, arguments: tuple[str, ...], folder: Path) -> None:
    gc.freeze()
    for number, of in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / of, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [name, *arguments]
    if name == "lm_eval":
        know_few(pytest.MonkeyPatch())
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except Exception:  # as an interpreter does at its end, and `multiprocessing` does not
        sys.excepthook(*sys.exc_info())
        raise SystemExit(1) from None
