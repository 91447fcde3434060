"""The command line `llm-attack`. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from llm_attack import __version__
from llm_attack.errors import UsageError
from llm_attack.reproduce import reproduce


class _Commands(click.Group):
    """Commands whose bad input ends in one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)


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


@main.command(context_settings={"show_default": True})
@click.option("--model", default="TinyLlama/TinyLlama_v1.1", help="Hub id, local folder, or demo.")
@click.option("--tasks", default="paper_six", help="lm-eval tasks or groups, separated by commas.")
@click.option("--attacks", default="none,random,fgsm,bim", help="Separated by commas.")
@click.option("--epsilon", default=0.01, help="L-infinity amplitude of the perturbation.")
@click.option("--loss", default="sequence", help="sequence, continuation or choice (gold-aware).")
@click.option("--model_args", default="", help="More arguments of attacked-hf: key=value,...")
@click.option("--limit", type=float, help="Questions per task; below 1, their share.")
@click.option("--num_fewshot", type=int, help="Examples in the context.")
@click.option("--batch_size", default="auto", help="Requests per batch at most.")
@click.option("--device", help="cuda, cuda:1, cpu, mps, ...")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder for table.csv and run.json."
)
def run(**options) -> None:
    """Compare attacks over tasks: one table of accuracies beside the random-guess baseline."""
    from llm_attack.suite.compare import main as compare

    compare(**options)


main.add_command(reproduce)
