"""The command line `llm-attack`. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from llm_attack import __version__
from llm_attack.errors import UsageError
from llm_attack.reproduce import DEVICE, preset_option
from llm_attack.theory import fig4, fig6
from llm_attack.vision import fig1, fig2, fig5

FIGURES = [figure.COMMAND for figure in (fig1, fig2, fig4, fig5, fig6)]


class _Commands(click.Group):
    """Commands whose bad input ends in one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (UsageError, click.UsageError) as error:
            text = error if isinstance(error, UsageError) else error.format_message()
            click.echo(f"error: {text}", err=True)
            sys.exit(2)
        except OSError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            sys.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llm-attack")
def main() -> None:
    """How much of a language model's accuracy survives a perturbation of its embeddings?"""


@main.command(
    "eval",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def eval_(arguments: tuple[str, ...]) -> None:
    """lm_eval with attacked-hf as its model and our tasks known; takes all of lm_eval's options."""
    from llm_attack.suite.harness import lm_eval

    lm_eval(list(arguments))


def _read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Makes the settings in a YAML file the defaults of the other options."""
    if path is not None:
        from llm_attack.suite.plan import from_yaml

        ctx.default_map = from_yaml(path)


# Text of a flag, list or mapping of a YAML file: the plan reads both.
_ANY = click.UNPROCESSED


@main.command(context_settings={"show_default": True})
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="YAML file with the same names as these options, which go before it.",
)
@click.option("--model", default="TinyLlama/TinyLlama_v1.1", help="Hub id, local folder, or demo.")
@click.option("--tasks", type=_ANY, default="paper_six", help="lm-eval tasks, groups or tags.")
@click.option(
    "--attacks", type=_ANY, default="none,random,fgsm,bim", help="pgd, ost, illc, reversed, too."
)
@click.option(
    "--epsilons",
    type=_ANY,
    default="0.01",
    help="L-infinity amplitudes; 0.7rms: in units of the embeddings' RMS.",
)
@click.option("--epsilon_unit", default="absolute", help="absolute or rms.")
@click.option("--steps", default=10, help="Of bim, pgd, illc.")
@click.option("--step_size", type=float, help="Of bim, pgd, illc; a quarter of epsilon by default.")
@click.option("--loss", default="sequence", help="sequence, continuation or choice (gold-aware).")
@click.option("--score", default="acc", help="acc or acc_norm: what loss=choice attacks.")
@click.option("--context", help="own or shared: perturbations of a question's common tokens.")
@click.option("--hookpoint", help="Module whose output is perturbed; the embedding by default.")
@click.option("--seed", default=0, help="Of random draws.")
@click.option("--limit", type=float, help="Questions per task; below 1, their share.")
@click.option("--num_fewshot", type=int, help="Examples in the context.")
@click.option("--apply_chat_template", is_flag=True, help="Of the model, to all prompts.")
@click.option("--fewshot_as_multiturn", is_flag=True, help="Examples as turns of a conversation.")
@click.option("--system_instruction", help="Before all prompts.")
@click.option("--include_path", help="Folder of more lm-eval tasks.")
@click.option("--batch_size", default="auto", help="Rows of a batch at most.")
@click.option("--device", help="cuda, cuda:1, cpu, mps, ...")
@click.option("--model_args", type=_ANY, default="", help="Of attacked-hf: key=value,...")
@click.option("--progress", default="bar", help="bar, json (lines, for logs) or quiet.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for tables, figures, report and samples; a run that was stopped goes on there.",
)
def run(**options: Any) -> None:
    """Compare attacks over tasks: accuracy, tests, figures and a report.

    All conditions are computed in one pass. Several processes (accelerate launch --num_processes N
    -m llm_attack run ...) share the work.
    """
    from llm_attack.suite import commands

    commands.run(**options)


_FOLDER = click.Path(path_type=Path, file_okay=False)


@main.command()
@click.argument("folder", type=_FOLDER)
def report(folder: Path) -> None:
    """Write the tables, figures and report of a run anew, from its stored samples."""
    from llm_attack.suite import commands

    commands.report(folder)


@main.command()
@click.argument("a", type=_FOLDER)
@click.argument("b", type=_FOLDER)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="CSV file.")
def compare(a: Path, b: Path, output: Path | None) -> None:
    """Compare run B with run A, paired where both asked the same question."""
    from llm_attack.suite import commands

    commands.compare(a, b, output)


@main.group()
def reproduce() -> None:
    """Reproduce the other experiments of the paper: a figure, its numbers and their record."""


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
@click.option("--device", help=DEVICE)
@click.option("--seed", type=int, help="First seed of every experiment.")
@click.pass_context
def all_(ctx: click.Context, output: Path, **options: Any) -> None:
    """Every figure in turn."""
    for command in FIGURES:
        click.echo(f"{command.name}:")
        ctx.invoke(command, output=output / str(command.name), **options)
