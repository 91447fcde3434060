"""What every run leaves behind: figures for print, and a record of how they were made."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_attack import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is too light for lines on white: readable by the
# colour-blind, and of distinct lightness in grey print. https://jfly.uni-koeln.de/color/
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")

_STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "llm_attack",  # the same figure is the same file
}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for all figures of this project, while the context lasts.

    Figures are made as `matplotlib.figure.Figure`, without pyplot, which would need a screen
    in some programs, and would keep every figure alive.
    """
    import matplotlib
    from cycler import cycler

    with matplotlib.rc_context({**_STYLE, "axes.prop_cycle": cycler(color=COLOURS)}):
        yield


def save_figure(figure: Figure, folder: Path, name: str = "figure") -> None:
    """Writes `name`.png and `name`.svg into `folder`; equal figures give equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, also when the process is killed or the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("torch", "transformers", "lm-eval", "accelerate", "datasets", "numpy")
    python = platform.python_version()
    return {"llm-attack": __version__, "python": python, **{n: version(n) for n in names}}


def hardware() -> dict[str, Any]:
    """Processor, cores, torch's threads and accelerators of this machine."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
