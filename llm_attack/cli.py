"""The command line `llm-attack`. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import click

from llm_attack import __version__
from llm_attack.base import declare, failures, garbage
from llm_attack.base.declare import DIALECT
from llm_attack.base.options import Command, Option, examples, number, options

_EXPERIMENTS = "reproduce"  # name of a command


class _Commands(click.Group):
    """Commands whose failures end in one line; --traceback, at any place, shows the rest."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> NoReturn:
        words = list(sys.argv[1:] if args is None else args)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # unknown letters become question marks
                stream.reconfigure(errors="replace")
        extra["standalone_mode"] = False
        try:
            code = super().main([w for w in words if w != failures.TRACEBACK], *more, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except (Exception, KeyboardInterrupt) as error:
            if failures.TRACEBACK in words:
                failures.show(error)
            code, line = failures.failure(error)
            click.echo(line, err=True)
        sys.exit(code)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return sorted([*super().list_commands(ctx), _EXPERIMENTS])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command. The experiments are imported only if they are asked for."""
        if cmd_name == _EXPERIMENTS:
            from llm_attack.experiments import reproduce

            return reproduce
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llm-attack")
@click.option(failures.TRACEBACK, is_flag=True, help="Also show the traceback of an error.")
def main(traceback: bool) -> None:
    """How much of a language model's accuracy survives a perturbation of its embeddings?"""


@main.command(
    "eval",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def eval_(arguments: tuple[str, ...]) -> None:
    """Run lm_eval with the model attacked-hf and our tasks. It takes all options of lm_eval."""
    from llm_attack.harness.tasks import lm_eval

    lm_eval(list(arguments))


def _read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Makes the settings in a YAML file the defaults of the other options."""
    if path is not None:
        from llm_attack.suite.config import from_yaml

        ctx.default_map = from_yaml(path)


class _OfPlan(Command):
    """A command whose options are the settings of a plan. It imports them when it needs them."""

    @cached_property
    def settings(self) -> list[Option]:
        from llm_attack.suite.plan import Plan

        return options(Plan)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters, with the plan's settings after the first."""
        first, *others = super().get_params(ctx)
        return [first, *self.settings, *others]


_progress = click.option(
    "--progress",
    cls=Option,
    group="output",
    choices=("bar", "json", "quiet"),
    default="bar",
    help="How progress is shown: off a terminal, bar is a line per stage and every 30 seconds.",
)


def _output(text: str) -> Callable[..., Any]:
    return click.option("-o", "--output", cls=Option, group="output", metavar="PATH", help=text)


def _dry_run(text: str) -> Callable[..., Any]:
    return click.option("--dry_run", cls=Option, group="output", is_flag=True, help=text)


_verbose = click.option(
    "-v",
    "--verbose",
    cls=Option,
    group="output",
    count=True,
    show_default=False,
    help="Show the logs of this package and of the libraries; -vv: those for debugging as well.",
)


@main.command(
    cls=_OfPlan,
    context_settings={"show_default": True, **DIALECT},
    epilog=examples(
        "llm-attack run --model demo --tasks demo_six -o out/demo",
        "llm-attack run --model TinyLlama/TinyLlama_v1.1 --epsilons 0.7rms --dry_run",
        "llm-attack run --model demo --tasks demo_piqa --fail_under worst=0.3",
    ),
)
@click.option(
    "--config",
    cls=Option,
    group="output",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="YAML file with these options. Options on the command line override the file.",
)
@_progress
@_verbose
@_output(
    "Folder for tables, figures, report and samples. To continue a stopped run, give its folder."
)
@_dry_run(
    "Print what the run would need (tokens, FLOP, time on this device, memory), and write nothing."
)
@click.option(
    "--revisions",
    "checkpoints",
    cls=Option,
    group="model",
    metavar="NAME,...",
    help="Checkpoints of one training: revisions on the hub, or subfolders of a local model. Each"
    " is attacked in a folder of its own. One table and one figure show all.",
)
@click.option(
    "--fail_under",
    cls=Option,
    group="output",
    metavar="CONDITION=SHARE,...",
    help="Exit code 3 if the mean accuracy may be lower: worst=0.3 (every attack), fgsm=0.3,"
    " none=0.5. The lower end of the 95 % interval counts; with 0.3:point, the estimate.",
)
@click.option(
    "--fail_drop",
    cls=Option,
    group="output",
    metavar="POINTS",
    help="Exit code 3 if an attack may cost more points of mean accuracy. The upper end of the 95 %"
    " interval counts; with 2:point, the estimate.",
)
@click.option(
    "--wandb_args",
    cls=Option,
    group="output",
    metavar="KEY=VALUE,...",
    help="Also log to Weights & Biases with lm-eval's logger: arguments of wandb.init, such as"
    " project=robustness. Each condition is a run.",
)
@click.option(
    "--trackio_args",
    cls=Option,
    group="output",
    metavar="KEY=VALUE,...",
    help="The same for Trackio: arguments of trackio.init. Needs an lm-eval that has it.",
)
@click.option(
    "--hf_hub_log_args",
    cls=Option,
    group="output",
    metavar="KEY=VALUE,...",
    help="Also push to the Hugging Face hub with lm-eval's EvaluationTracker, such as"
    " hub_results_org=me,push_results_to_hub=True. Each condition is a model.",
)
def run(**settings: Any) -> None:
    """Compare attacks over tasks, and write a report.

    The report has accuracies, tests and figures. All conditions are computed in one pass. Several
    processes (accelerate launch --num_processes N -m llm_attack run ...) share the work.
    """
    from llm_attack.suite import evaluate

    evaluate.run(**_given(settings))


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those of the plan that nobody gave. The plan knows their defaults."""
    ctx = click.get_current_context()
    assert isinstance(ctx.command, _OfPlan)
    own = {option.name for option in ctx.command.settings}
    default = click.core.ParameterSource.DEFAULT
    return {
        name: value
        for name, value in settings.items()
        if name not in own or ctx.get_parameter_source(name) is not default
    }


class _OfDoctor(_OfPlan):
    """A command with the settings of a plan, except those that it sets itself."""

    _SETTLED = ("attacks", "epsilons", "epsilon_unit", "critical", "epsilon_max", "hookpoints")
    # settings of attacks that it does not run, and of several processes
    _UNUSED = ("decay", "restarts", "rounds", "first_epsilon", "shard", "ray", "ray_workers")
    _OF_OUTPUT = ("equivalence", "save_perturbations", "path_points", "trace")
    _OF_CERTIFICATES = ("sigmas", "draws", "selection_draws", "failure_probability")
    _OF_FIXED = ("perturbation", "perturbation_of", "half")

    @cached_property
    def settings(self) -> list[Option]:
        """The settings of the plan that the user may choose."""
        own: tuple[str, ...] = (*self._SETTLED, *self._UNUSED, *self._OF_OUTPUT)
        own += (*self._OF_CERTIFICATES, *self._OF_FIXED)
        left = [option for option in super().settings if option.name not in own]
        for option in left:
            option.default = {"loss": "choice", "limit": 10}.get(str(option.name), option.default)
        return left


@main.command(
    cls=_OfDoctor,
    context_settings={"show_default": True, **DIALECT},
    epilog=examples(
        "llm-attack doctor --model demo --tasks demo_six",
        "llm-attack doctor --model models/mine --limit 50",
        "llm-attack doctor --model models/mine --model_args peft=models/adapter",
    ),
)
@_progress
@_verbose
def doctor(progress: str, verbose: int, **settings: Any) -> int:
    """Check whether a model hides its gradient, by a small run.

    The exit code is 1 if a check fails. Attacks on such a model show nothing.
    """
    from llm_attack.suite.doctor import ATTACKS, EPSILONS, command
    from llm_attack.suite.plan import Plan

    return command(Plan(attacks=ATTACKS, epsilons=EPSILONS, **settings), progress, verbose)


class _OfUniversal(_OfPlan):
    """A command with the settings of a plan that a universal perturbation depends on."""

    _LEFT_OUT = (
        *("critical", "epsilon_max", "hookpoints", "rounds", "first_epsilon", "queries"),
        *("equivalence", "save_perturbations", "path_points", "trace", "gradient_dtype"),
        *("sigmas", "draws", "selection_draws", "failure_probability"),
        *("perturbation", "perturbation_of", "half", "cells", "shard", "ray", "ray_workers"),
        *("swaps", "exact_tokens", "candidates"),
    )

    @cached_property
    def settings(self) -> list[Option]:
        """The settings of the plan that the user may choose."""
        left = [option for option in super().settings if option.name not in self._LEFT_OUT]
        for option in left:
            defaults = {"loss": "choice", "attacks": "apgd", "steps": 20}
            option.default = defaults.get(str(option.name), option.default)
        return left


@main.command(
    cls=_OfUniversal,
    context_settings={"show_default": True, **DIALECT},
    epilog=examples(
        "llm-attack universal --model demo --tasks demo_six --epsilons 0.5rms -o u.safetensors",
        "llm-attack universal --model demo --tasks demo_six --share all -o vector.safetensors",
        "llm-attack universal --model models/mine --epsilons 0.5rms --dry_run",
    ),
)
@_progress
@_verbose
@_output("New file of safetensors for the perturbation.")
@click.option(
    "--share",
    cls=Option,
    group="attack",
    choices=("token", "position", "all"),
    default="token",
    help="Tokens that have one perturbation: those of a vocabulary entry, of a position, or all.",
)
@_dry_run(
    "Print what it would need (tokens, FLOP, time on this device, memory), and write nothing."
)
def universal(
    progress: str, verbose: int, output: str | None, share: str, dry_run: bool, **settings: Any
) -> None:
    """Fit one perturbation that is for all questions.

    Half of the questions are used. Score it on the other half with llm-attack run --perturbation
    FILE.
    """
    from llm_attack.suite import universal as commands
    from llm_attack.suite.plan import Plan

    commands.run(Plan(**settings), share, output, progress, verbose, dry_run)


@main.command(
    epilog=examples(
        "llm-attack export u.safetensors -o models/attacked",
        "llm-attack export u.safetensors --model models/mine -o models/attacked",
        "llm-attack export vector.safetensors -o models/attacked",
    )
)
@click.argument("file", type=click.Path())
@click.option("--model", metavar="NAME", help="Model to change. By default, the file names it.")
@click.option(
    "-o", "--output", metavar="PATH", required=True, help="New folder for the checkpoint."
)
def export(file: str, output: str, model: str | None) -> None:
    """Save a checkpoint that contains a universal perturbation.

    Any program that loads it shows the accuracy under the perturbation, such as lm_eval with hf.
    """
    from llm_attack.suite import universal as commands

    commands.export(file, output, model)


class _OfTrain(_OfPlan):
    """A command with the settings of a training, and those of a plan that it depends on."""

    _OF_PLAN = ("model", "model_args", "norm", "steps", "step_size", "epsilon_unit", "seed")

    @cached_property
    def settings(self) -> list[Option]:
        """The settings of the plan that the user may choose."""
        left = [o for o in super().settings if o.name in (*self._OF_PLAN, "device")]
        for option in left:
            defaults = {"model": "demo", "steps": 3}
            option.default = defaults.get(str(option.name), option.default)
        return left

    @cached_property
    def own(self) -> list[Option]:
        """The settings of the training."""
        from llm_attack.suite.plan.training import Training

        return options(Training)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The settings of the training come first."""
        return [*self.own, *super().get_params(ctx)]


@main.command(
    cls=_OfTrain,
    context_settings={"show_default": True, **DIALECT},
    epilog=examples(
        "llm-attack train --against pgd@0.02rms -o out/robust",
        "llm-attack train --against freelb@0.02rms --updates 200 -o out/robust",
        "llm-attack train --model models/mine --text texts.txt --lora 8 -o out/adapter",
    ),
)
@_progress
@_verbose
@_output("New folder for the model, or for its adapter.")
@_dry_run("Print the passes and the time that it would need, and write nothing.")
def train(progress: str, verbose: int, output: str | None, dry_run: bool, **settings: Any) -> None:
    """Tune a model on text whose embeddings are under attack.

    The embedding itself stays as it is. Attack the result with llm-attack run.
    """
    from llm_attack.suite import train as commands
    from llm_attack.suite.plan.training import Training

    training = Training(**{name: settings.pop(name) for name in declare.names(Training)})
    commands.run(training, _given(settings), output, progress, verbose, dry_run)


_FOLDER = click.Path(path_type=Path, file_okay=False)
_equivalence = click.option(
    "--equivalence",
    type=number(float),
    metavar="POINTS",
    help="Also test whether accuracies are equal within this many percentage points.",
)


_format = click.option(
    "--format",
    "formats",
    metavar="FORMAT,...",
    help="Also write files for a paper: pdf (figures at the width of a column), tex (the table in"
    " LaTeX with its caption, and references in llm_attack.bib), or both.",
)
_intervals = click.option(
    "--intervals",
    type=click.Choice(["below", "beside", "none"]),
    default="below",
    show_default=True,
    help="Place of the intervals in the LaTeX table.",
)


@main.command(
    epilog=examples(
        "llm-attack report out/demo",
        "llm-attack report out/demo --equivalence 2",
        "llm-attack report out/demo --format pdf,tex --intervals beside",
    )
)
@click.argument("folder", type=_FOLDER)
@_equivalence
@_format
@_intervals
def report(folder: Path, **settings: Any) -> None:
    """Write the tables and figures of a run again.

    They are made from its stored samples. No model is loaded.
    """
    with garbage.kept():
        from llm_attack.suite import commands

        commands.report(folder, **settings)


@main.command(
    epilog=examples(
        "llm-attack compare out/base out/tuned -o pair.csv",
        "llm-attack compare out/released out/new --fail_drop 2",
        "llm-attack compare out/a out/b out/c -o models.csv --leaderboard board.csv",
    )
)
@click.argument("folders", type=_FOLDER, nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    metavar="PATH",
    help="CSV file for the table. With more than two runs, a figure is written beside it.",
)
@click.option(
    "--leaderboard",
    metavar="PATH",
    help="CSV file that gets a row for each model and condition. It may exist already.",
)
@click.option(
    "--fail_drop",
    metavar="POINTS",
    help="Exit code 3 if the second of two runs may be worse by more points of mean accuracy, under"
    " any condition. The upper end of the 95 % interval counts; with 2:point, the estimate.",
)
@_equivalence
@_format
@_intervals
def compare(folders: tuple[Path, ...], **settings: Any) -> None:
    """Compare runs on the questions that all of them asked.

    Two runs are paired question by question, and the second is compared with the first. More runs,
    usually one for each model, give the clean accuracy against the drop, and their correlation. Two
    folders of lm_eval --log_samples can be compared as well.
    """
    with garbage.kept():
        from llm_attack.suite import commands

        commands.compare(folders, **settings)


@main.command(
    epilog=examples(
        "llm-attack transfer out/base-base out/base-tuned",
        "llm-attack transfer out/base-base out/base-int4 -o transfer.csv",
        "llm-attack transfer out/from-*/under-* -o transfer.csv",
    )
)
@click.argument("folders", type=_FOLDER, nargs=-1, required=True)
@click.option("-o", "--output", metavar="PATH", help="CSV file for the table.")
def transfer(folders: tuple[Path, ...], output: str | None) -> None:
    """Show whether perturbations of one model harm others.

    The table has the drop of accuracy for each pair of models. Each pair has a run, made by
    llm-attack run --perturbation.
    """
    with garbage.kept():
        from llm_attack.suite import commands

        commands.transfer(folders, output)


@main.command(
    epilog=examples(
        "llm-attack scaling out/small out/medium out/large out/huge",
        "llm-attack scaling out/width*/step2000 -o scaling.csv",
        "llm-attack scaling out/width*/step* --ceiling 0.03 -o ceiling.csv",
    )
)
@click.argument("folders", type=_FOLDER, nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    metavar="PATH",
    help="CSV file for the models. The laws and a figure are written beside it.",
)
@click.option(
    "--ceiling",
    type=number(float),
    metavar="RMS",
    help="Count critical epsilons above it as censored, to see how much the law depends on them.",
)
def scaling(folders: tuple[Path, ...], **settings: Any) -> None:
    """Show how critical epsilons grow with model size.

    It fits a power law of the number of parameters. Each run asks the same questions of another
    model, with the attack critical or fmn.
    """
    with garbage.kept():
        from llm_attack.suite import commands

        commands.scaling(folders, **settings)


@main.command(
    epilog=examples(
        "llm-attack card out/demo",
        "llm-attack card out/demo -o cards/demo.json",
        "llm-attack card out/demo --name Ada --link https://example.org/paper",
    )
)
@click.argument("folder", type=_FOLDER)
@click.option(
    "-o", "--output", metavar="PATH", help="JSON file. The default is card.json in FOLDER."
)
@click.option("--name", metavar="TEXT", help="Name of the person or group that hands the card in.")
@click.option("--link", metavar="URL", help="Address of a paper, a page or a person.")
def card(folder: Path, **settings: Any) -> None:
    """Write the card of a run with --attacks standard.

    It is a JSON file with the model, the tasks and the robust accuracy. A run that the standard
    does not allow is refused.
    """
    from llm_attack.suite import cards

    cards.card(folder, **settings)


@main.command(
    epilog=examples(
        "llm-attack board out/demo/card.json -o site",
        "llm-attack board board/cards/*.json -o site",
        "llm-attack board board/cards/*.json out/mine/card.json -o site",
    )
)
@click.argument("cards", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "-o", "--output", metavar="PATH", required=True, help="Folder for the pages and downloads."
)
def board(cards: tuple[Path, ...], output: str) -> None:
    """Make pages that compare models, from their cards.

    They have sortable tables, a figure, a page for each model, and downloads. The pages need
    neither a server nor a network. Models are compared if they answered the same questions under
    the same version of a standard.
    """
    from llm_attack.suite import cards as commands

    commands.board(cards, output)
