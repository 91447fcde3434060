"""The command `llm-attack reproduce`, with an experiment for each figure of the paper."""

from __future__ import annotations

from typing import Any

import click

from llm_attack.base.errors import UsageError
from llm_attack.base.folder import resolved
from llm_attack.base.options import examples, number
from llm_attack.reproduce import DEVICE, OUT, preset_option
from llm_attack.theory import fig4, fig6, relation, toys
from llm_attack.vision import declines, factors, fig1, fig2, fig5, tradeoff

_EXPERIMENTS = (fig1, fig2, fig4, fig5, fig6, relation, tradeoff, factors, declines, toys)
FIGURES = [figure.COMMAND for figure in _EXPERIMENTS]


@click.group(
    epilog=examples(
        "llm-attack reproduce fig4",
        "llm-attack reproduce fig2 --preset paper -o out/fig2-paper",
        "llm-attack reproduce all --seed 1 -o out/seed-1",
    )
)
def reproduce() -> None:
    """Reproduce the other experiments of the paper.

    Each writes its figure, its numbers and its record.
    """


for _command in FIGURES:
    reproduce.add_command(_command)


@reproduce.command("fig3", add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def fig3(arguments: tuple[str, ...]) -> None:
    """Language models: use llm-attack run."""
    raise UsageError(
        "reproduce fig3: Fig. 3 is llm-attack run, such as llm-attack run --model"
        " TinyLlama/TinyLlama_v1.1 -o out/fig3"
    )


@reproduce.command(
    "all",
    params=[preset_option()],
    epilog=examples(
        "llm-attack reproduce all",
        "llm-attack reproduce all --preset paper -o out/paper",
        "llm-attack reproduce all --seed 1 -o out/seed-1",
    ),
)
@click.option(
    "-o",
    "--output",
    metavar="PATH",
    default=OUT,
    show_default=True,
    help="Folder that gets a subfolder for each figure.",
)
@click.option("--device", help=DEVICE)
@click.option("--seed", type=number(int), help="First seed of every experiment.")
@click.pass_context
def all_(ctx: click.Context, /, output: str, **options: Any) -> None:
    """Every figure in turn."""
    folders = {command: str(resolved(output) / str(command.name)) for command in FIGURES}
    for command, folder in folders.items():  # all folders are prepared before anything is computed
        command.settle(output=folder, **options)
    for command, folder in folders.items():
        click.echo(f"{command.name}:")
        ctx.invoke(command, output=folder, **options)
