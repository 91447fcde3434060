"""The commands `llm-attack reproduce ...`: the other experiments of arXiv 2205.01493, by figure."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

from llm_attack.experiment import preset_option

# Each has COMMANDS, a list of click commands, and imports nothing heavy until one runs.
MODULES = ("llm_attack.theory.commands", "llm_attack.vision.commands")


@click.group()
def reproduce() -> None:
    """Reproduce the other experiments of the paper: a figure, its numbers and their record."""


FIGURES = sorted(
    (command for module in MODULES for command in import_module(module).COMMANDS),
    key=lambda command: str(command.name),
)
for _command in FIGURES:
    reproduce.add_command(_command)


@reproduce.command("all", params=[preset_option()])
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="results",
    show_default=True,
    help="Folder for a folder of each figure.",
)
@click.option("--device", help="cuda, cuda:1, cpu, ...; cuda where there is one unless given.")
@click.option("--seed", type=int, help="First seed of every experiment.")
@click.pass_context
def all_(ctx: click.Context, output: Path, **options) -> None:
    """Every figure in turn."""
    for command in FIGURES:
        click.echo(f"{command.name}:")
        ctx.invoke(command, output=output / str(command.name), **options)
