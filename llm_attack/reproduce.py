"""Shared parts of the files figN.py: they turn settings into options, and these into a command.

Each figN.py holds a frozen dataclass of settings, its presets, a function that runs the experiment
and writes into a folder, and COMMAND, which `figure_command` makes of these. Heavy libraries are
imported when the command runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from llm_attack.base.declare import DIALECT, declared
from llm_attack.base.errors import UsageError, invalid
from llm_attack.base.failures import one_line
from llm_attack.base.folder import (
    check_same,
    check_writable,
    claim,
    clear_drafts,
    resolved,
    strangers,
)
from llm_attack.base.options import Command, Option, examples, of_setting
from llm_attack.base.plugins import load_function
from llm_attack.base.record import hardware, versions, write_json
from llm_attack.base.redact import redacted

PRESET_NAMES = ("quick", "paper")
# The mark of an unfinished folder; and subfolders of results.
_STARTED, _PARTS = "started.json", ("checkpoints",)
_COMMAND = "llm-attack reproduce"
OUT = "out"  # default folder of results; results/ holds the stored ones
_SEEDS = 2**62  # torch's generators take integers of 64 bits
DEVICE = (
    "Device to compute on: cpu, cuda, cuda:1, ... The default is cuda if there is a GPU, and else"
    " cpu"
)


class Figure(Command):
    """The command of a figure. `settle` prepares it, before anything is computed."""

    settle: Callable[..., tuple[Any, dict[str, Any], Path]]


def figure_command(
    name: str,
    presets: dict[str, Any],
    run: Callable[[Any, Path], dict[str, Any]],
    effective: str | None = None,
    *,
    without: Sequence[str] = (),
) -> Figure:
    """Makes the command that runs an experiment with a preset and writes its record.

    Args:
        name: name of the command; the results go to out/`name` by default.
        presets: settings by the names of `PRESET_NAMES`. They are a dataclass with fields of
            `declare.setting`, including `seed` and `device`.
        run: takes settings and a folder, and writes figure and CSV into it. It returns the headline
            results and, as `seconds`, a dictionary of timings. Its docstring is the help.
        effective: name of a function, `module:function`, that turns settings into those that take
            effect, for the record. It is imported when the command runs.
        without: settings that are not options, because the experiment does not read them, or nobody
            needs another value.
    """

    def settle(preset: str, output: str, **given: Any) -> tuple[Any, dict[str, Any], Path]:
        """Settings, head of the record, folder; `UsageError` if one of them is not allowed."""
        overrides = {key: value for key, value in given.items() if value is not None}
        settings = replace(presets[preset], **overrides)
        if hasattr(settings, "check_used"):
            settings.check_used()
        if abs(settings.seed) >= _SEEDS:
            raise invalid("seed", settings.seed, f"an integer below {_SEEDS}")
        settings = replace(settings, device=pick_device(settings.device))
        if effective is not None:
            settings = load_function("effective", effective)(settings)
        words = [_COMMAND, name, "--preset", preset]
        for key, value in overrides.items():
            words += [f"--{key}", _shown(value)]
        folder = resolved(output)
        if folder != default_output:
            words += ["-o", str(output)]
        head = redacted({"command": " ".join(words), "settings": asdict(settings)})
        claim(folder, lambda names: _is_same(folder, name, head, names), _PARTS)
        if getattr(settings, "save", None) is not None:
            check_writable(resolved(settings.save, "save"), argument="save")
        return settings, head, folder

    def callback(preset: str, output: str, **given: Any) -> None:
        settings, head, folder = settle(preset, output, **given)
        start = time.perf_counter()
        with _started(folder, head):
            results = run(settings, folder)
        seconds = results.pop("seconds") | {"all": time.perf_counter() - start}
        record = {
            **head,
            "results": results,
            "seconds": {key: round(value, 2) for key, value in seconds.items()},
            "versions": versions(),
            "hardware": hardware(),
        }
        write_json(folder / "run.json", record)
        (folder / _STARTED).unlink(missing_ok=True)
        click.echo(f"written: {folder}, in {seconds['all']:.1f} s")

    default_output = Path(OUT, name)
    command = Figure(
        name,
        callback=callback,
        params=_options(presets, default_output, without),
        help=run.__doc__,
        epilog=examples(
            f"{_COMMAND} {name}",
            f"{_COMMAND} {name} --preset paper -o {OUT}/{name}-paper",
            f"{_COMMAND} {name} --seed 1 --device cpu -o {OUT}/{name}-1",
        ),
        context_settings=DIALECT,
    )
    command.settle = settle
    return command


def _options(
    presets: dict[str, Any], output: Path, without: Sequence[str]
) -> list[click.Parameter]:
    """The options of a figure: preset, folder, and each setting except those of `without`."""
    options: list[click.Parameter] = [
        preset_option(),
        Option(
            ["-o", "--output"],
            group="output",
            metavar="PATH",
            default=str(output),
            show_default=True,
            help="Folder for figure.png, figure.svg, the CSV files and run.json.",
        ),
    ]
    for entry, about in declared(presets["quick"]):
        if entry.name in without:
            continue
        shown = {preset: _shown(getattr(presets[preset], entry.name)) for preset in PRESET_NAMES}
        values = ", ".join(f"{preset}: {value}" for preset, value in shown.items())
        if len(set(shown.values())) == 1:
            values = f"default: {shown['quick']}"
        note = f"  [{values}]" if shown["quick"] else ""
        options.append(of_setting(entry.name, about, note))
    return options


def _shown(value: Any) -> str:
    """A value as one types it; empty for None."""
    values = value if isinstance(value, tuple) else (value,)
    return ",".join(
        "" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in values
    )


def preset_option() -> click.Option:
    """The option --preset, for one experiment or for all."""
    return Option(
        ["--preset"],
        group="output",
        type=click.Choice(PRESET_NAMES),
        default="quick",
        show_default=True,
        help=(
            "Settings for a laptop (small), or the sizes of the paper (paper). Options override"
            " them."
        ),
    )


@contextmanager
def _started(folder: Path, head: dict[str, Any]) -> Iterator[None]:
    """While the context lasts, the folder of an experiment has a mark.

    If the experiment fails before it has written anything, the mark is removed.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    clear_drafts(folder, _PARTS)
    write_json(folder / _STARTED, head)
    try:
        yield
    except BaseException:
        if strangers(folder, _PARTS) == [_STARTED]:
            (folder / _STARTED).unlink()
            with suppress(OSError):
                for path in made:
                    path.rmdir()
        raise


def _is_same(folder: Path, name: str, head: dict[str, Any], names: list[str]) -> bool:
    """Whether a folder with these names has the mark of this experiment.

    Raises:
        UsageError: it belongs to another experiment, or to something else. The message says how it
            differs.
    """
    marked = [mark for mark in (_STARTED, "run.json") if mark in names]
    for mark in marked:
        try:
            record = json.loads((folder / mark).read_text(encoding="utf-8"))
            program, there = record["command"].split()[:3], {**record["settings"]}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UsageError(
                f"output={folder}: {mark} in this folder is not the record of an experiment"
                f" ({one_line(error)}); must be another folder"
            ) from error
        if names == [_STARTED]:
            break  # it was stopped before it wrote anything
        check_same(folder, {"command": " ".join(program)}, {"command": f"{_COMMAND} {name}"})
        here = json.loads(json.dumps(head["settings"]))
        here.pop("device")  # the device may change
        check_same(folder, {key: there.get(key) for key in here}, here)
    return bool(marked)


def pick_device(name: str | None) -> str:
    """The device to compute on: `name`, or by default cuda if it exists, and else cpu.

    Raises:
        UsageError: torch does not know the device or cannot use it here.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, dtype=torch.float64, device=name).cpu()  # nothing comes back from "meta"
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        allowed = f"cpu, cuda, or another device that torch can use here ({one_line(error)})"
        raise invalid("device", name, allowed) from error
    return name
