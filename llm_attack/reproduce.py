"""The parts that the files figN.py share: settings that are options, the command made of them.

Each holds a frozen dataclass of settings, its presets, a function that runs the experiment and
writes into a folder, and COMMAND, made of these by `figure_command`. They import nothing heavy
until the command runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from llm_attack.declare import DIALECT, declared
from llm_attack.errors import UsageError, invalid
from llm_attack.record import hardware, versions, write_json

PRESET_NAMES = ("quick", "paper")
DEVICE = "Where to compute: cpu, cuda, cuda:1, ...; unless given, cuda where there is one"


class Integers(click.ParamType):
    """Integers separated by commas, as a tuple."""

    name = "integer,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: must be integers separated by commas", param, ctx)


def figure_command(
    name: str, presets: dict[str, Any], run: Callable[[Any, Path], dict[str, Any]]
) -> click.Command:
    """The command that runs an experiment with a preset and writes its record.

    Args:
        name: of the command; the results go to results/`name` unless --output says otherwise.
        presets: settings (a dataclass of fields by `declare.setting`, `seed` and `device` among
            them) by their names, those of `PRESET_NAMES`.
        run: takes settings and a folder; writes figure and CSV there; returns the headline
            results and, as `seconds`, a dictionary of timings. Its docstring is the help.
    """

    def callback(preset: str, output: Path, **given: Any) -> None:
        overrides = {key: value for key, value in given.items() if value is not None}
        settings = replace(presets[preset], **overrides)
        settings = replace(settings, device=pick_device(settings.device))
        check_folder(output)
        start = time.perf_counter()
        results = run(settings, output)
        seconds = results.pop("seconds") | {"all": time.perf_counter() - start}
        words = ["llm-attack reproduce", name, "--preset", preset]
        for key, value in overrides.items():
            words += [f"--{key}", _shown(value)]
        if output != default_output:
            words += ["-o", str(output)]
        record = {
            "command": " ".join(words),
            "settings": asdict(settings),
            "results": results,
            "seconds": {key: round(value, 2) for key, value in seconds.items()},
            "versions": versions(),
            "hardware": hardware(),
        }
        write_json(output / "run.json", record)
        click.echo(f"written: {output}, in {seconds['all']:.1f} s")

    default_output = Path("results", name)
    options: list[click.Parameter] = [
        preset_option(),
        click.Option(
            ["-o", "--output"],
            type=click.Path(path_type=Path),
            default=default_output,
            show_default=True,
            help="Folder for figure.png, figure.svg, the CSV files and run.json.",
        ),
    ]
    for entry, about in declared(presets["quick"]):
        shown = {preset: _shown(getattr(presets[preset], entry.name)) for preset in PRESET_NAMES}
        values = ", ".join(f"{preset}: {value}" for preset, value in shown.items())
        if len(set(shown.values())) == 1:
            values = f"default: {shown['quick']}"
        text = about.sentence() + (f"  [{values}]" if shown["quick"] else "")
        kind = about.option or about.kind
        options.append(click.Option([f"--{entry.name}"], type=kind, help=text))
    return click.Command(
        name,
        callback=callback,
        params=options,
        help=run.__doc__,
        context_settings=DIALECT,
    )


def _shown(value: Any) -> str:
    """A value as it is typed; nothing for None."""
    values = value if isinstance(value, tuple) else (value,)
    return ",".join(
        "" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in values
    )


def preset_option() -> click.Option:
    """The option --preset, for one experiment or for all."""
    return click.Option(
        ["--preset"],
        type=click.Choice(PRESET_NAMES),
        default="quick",
        show_default=True,
        help="Settings small enough for a laptop, or of the paper's sizes; options override them.",
    )


def check_folder(folder: Path) -> None:
    """Refuses a folder for results before anything is computed; makes nothing.

    Raises:
        UsageError: it is a file, or cannot be written, or cannot be made.
    """
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise UsageError(f"output={folder}: must be a folder that can be written or made")


def pick_device(name: str | None) -> str:
    """The device to compute on: `name`, or else cuda where there is one, or else cpu.

    Raises:
        UsageError: torch does not know the device or cannot use it here.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, dtype=torch.float64, device=name).cpu()  # from "meta" nothing comes back
    except (RuntimeError, AssertionError, TypeError, NotImplementedError):
        raise invalid("device", name, "cpu, cuda, or another that torch finds here") from None
    return name
