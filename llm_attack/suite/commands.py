"""The commands `run`, `report` and `compare`, and `evaluate`, which is `run` as a function."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llm_attack.declare import names
from llm_attack.drawing import save_figure
from llm_attack.errors import UsageError, as_path, invalid
from llm_attack.failures import ProcessDied, Stopped, failure, leave
from llm_attack.folder import claim, claim_file
from llm_attack.harness.patches import without_bars
from llm_attack.record import write_text
from llm_attack.redact import redacted
from llm_attack.suite import (
    estimate,
    fingerprint,
    frames,
    layers,
    models,
    on_ray,
    results,
    revisions,
    survival,
    tables,
)
from llm_attack.suite.equivalence import with_equivalence
from llm_attack.suite.layout import print_style
from llm_attack.suite.leaderboard import with_entries
from llm_attack.suite.pairs import paired, unshared
from llm_attack.suite.plan import Plan
from llm_attack.suite.progress import MODES, note
from llm_attack.suite.run import LM_EVAL, Processes, Result, execute, prepare
from llm_attack.suite.store import STORE, discard
from llm_attack.suite.worst import with_worst


@torch.inference_mode(False)
def evaluate(
    plan: Plan, *, output: str | Path | None = None, progress: str = "bar"
) -> Result | None:
    """Evaluates a model under attack: `llm-attack run` as a function.

    Args:
        plan: model, tasks, attacks, epsilons, ...
        output: the run's folder, where it goes on if it was interrupted, and all outputs are
            written; None: nothing is kept.
        progress: bar, json or quiet.

    Returns:
        A `Result` with the pandas frames `table`, `samples` and `questions`; None on all processes
        of a parallel run but the first.

    Raises:
        TypeError: an argument is of another type.
        UsageError: an argument is not allowed, or the folder holds something else.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: must be a Plan, not {type(plan).__name__}")
    if progress not in MODES:
        raise invalid("progress", progress, MODES)
    who = Processes.of(plan)
    shown = progress if who.first else "quiet"
    console = Console(stderr=True)
    folder = None if output is None else as_path("output", output)
    if folder is None and who.world > 1:
        raise UsageError("output=None: must be a folder, which the processes share")
    if folder is not None:  # before a model is loaded
        claim(folder, lambda _: fingerprint.kept(folder) is not None, (STORE, LM_EVAL))
    with on_ray.cluster(plan):
        prepared = prepare(plan, shown, console)
        if folder is None:
            with tempfile.TemporaryDirectory() as nowhere:
                return execute(prepared, Path(nowhere), shown, console)
        fingerprint.check(folder, prepared.mark)
        result = _finished(folder, plan, prepared.mark, who, shown, console)
        if result is None:
            result = execute(prepared, folder, shown, console)
            if result is not None:
                alone = replace(plan, shard=None, ray=None, ray_workers=None)
                results.save(result, folder, command(alone, folder))
    if not who.first:
        return None
    discard(folder)
    return result


def _finished(
    folder: Path, plan: Plan, mark: dict[str, Any], who: Processes, shown: str, console: Console
) -> Result | None:
    """The run in `folder`, if it is complete and can be read; files that cannot be are renamed."""
    if not (folder / "run.json").exists():
        return None
    try:
        return results.load(folder, plan.equivalence)
    except UsageError as error:
        if who.first:
            fingerprint.keep(folder, mark)  # while run.json, which has it, is still there
            aside = ", ".join(map(str, results.set_aside(folder)))
            note(shown, console, f"{error}; moved aside, computed again: {aside}")
        return None


def command(plan: Plan, folder: Path | None) -> list[str]:
    """The command line of a plan, without secrets: what differs from the defaults."""
    words = ["llm-attack", "run"]
    defaults = asdict(Plan())
    for name in names(plan):
        value = redacted(getattr(plan, name))
        if value == defaults[name]:
            continue
        if isinstance(value, dict):
            value = ",".join(f"{k}={v}" for k, v in value.items())
        elif isinstance(value, tuple):
            value = ",".join(map(str, value))
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words if folder is None else [*words, "-o", str(folder)]


def run(
    *,
    output: Path | None,
    progress: str,
    dry_run: bool,
    checkpoints: str | None = None,
    **settings: Any,
) -> None:
    """The command `llm-attack run`."""
    plan = Plan(**settings)
    if checkpoints is not None:
        if dry_run or output is None:
            wrong = "without dry_run" if dry_run else "with output, a folder for all of them"
            raise UsageError(f"revisions={checkpoints}: must be given {wrong}")
        return _run_revisions(plan, checkpoints, output, progress)
    if dry_run:
        silence()
        with without_bars():
            estimated = estimate.dry_run(plan, progress)
        return Console().print(estimate.show(estimated, plan.model_name))
    again = shlex.join(command(plan, output))
    silence()
    with without_bars(), _stops_are_explained(again, output, Processes.of(plan).first):
        result = evaluate(plan, output=output, progress=progress)
    if result is not None:
        console = Console()
        title = f"{result.run['model_name']}: accuracy, loss={result.run['settings']['loss']}"
        table = layers.at_first(result.table)
        warnings = layers.shown_of(result.run, result.table)["warnings"]
        console.print(tables.RunTable(table, title, warnings))
        for name, (cells, _) in survival.tables(layers.at_first(result.samples)).items():
            console.print(cells.rich(name))
        of_layers = layers.cells(result.table)
        if of_layers is not None:
            console.print(of_layers.rich(layers.TITLE))
        if output is not None and progress != "quiet":
            console.print(f"written: {output}: report.html, table.csv, figure.png, samples.parquet")


def _run_revisions(plan: Plan, given: str, output: Path, progress: str) -> None:
    of_each = revisions.plans(plan, given)
    revisions.check(output, of_each)
    again = shlex.join([*command(plan, output), "--revisions", given])
    silence()
    runs: dict[str, Result | None] = {}
    who = Processes.of(plan)
    with without_bars(), _stops_are_explained(again, output, who.first):
        for name, each in of_each.items():
            if who.first:
                note(progress, Console(stderr=True), name)
            runs[name] = evaluate(each, output=output / name, progress=progress)
    found = {name: result for name, result in runs.items() if result is not None}
    if not who.first:
        return
    frame = revisions.along(found)
    revisions.save(frame, output)
    Console().print(revisions.cells(frame).rich(f"{plan.model}: its revisions under attack"))
    if progress != "quiet":
        Console().print(f"written: {output}: revisions.csv, revisions.png, a folder of each")


def report(folder: Path, equivalence: float | None) -> None:
    """The command `llm-attack report`: tables, figures and report anew from the samples."""
    result = results.load(folder, equivalence)
    results.render(result, folder, result.run)
    Console().print(f"written: {folder}: report.html, tables, figures")


def compare(
    folders: Sequence[Path],
    output: Path | None,
    leaderboard: Path | None,
    equivalence: float | None,
) -> None:
    """The command `llm-attack compare`: runs on the questions that all of them asked."""
    folders = [as_path("folders", folder) for folder in folders]
    if len(folders) < 2 and leaderboard is None:
        raise UsageError(f"compare: must have two folders or more, not {len(folders)}")
    if equivalence is not None and len(folders) != 2:
        raise UsageError(f"equivalence={equivalence:g}: must go with two folders")
    if len(folders) == 2:
        _compare_two(folders, output, equivalence)
    if len(folders) == 2 and leaderboard is None:
        return
    found = [results.load(folder) for folder in folders]
    runs = dict(zip(models.names(folders, found), found, strict=True))
    text = None if leaderboard is None else with_entries(leaderboard, runs)
    if len(folders) > 2:
        _compare_many(runs, output)
    if leaderboard is not None and text is not None:
        write_text(leaderboard, text)
        Console().print(f"written: {leaderboard}", soft_wrap=True)


def _compare_two(folders: Sequence[Path], output: Path | None, equivalence: float | None) -> None:
    found = [frames.load(folder) for folder in folders]
    content = [of for run in found for of in (with_worst(run["samples"]), run["questions"])]
    frame = with_equivalence(paired(*content), equivalence)
    text = tables.csv(frame)
    if output is not None:
        claim_file(output, text.splitlines()[0])
    cells = tables.comparison(frame, (str(folders[0]), str(folders[1])), unshared(*content))
    Console().print(cells.rich("b against a, accuracy"))
    if output is not None:
        write_text(output, text)


def _compare_many(runs: dict[str, Result], output: Path | None) -> None:
    frame = models.across(runs)
    text = tables.csv(frame)
    if output is not None:
        claim_file(output, text.splitlines()[0])
        pictures = [output.with_suffix(f".{form}") for form in ("png", "svg")]
        strange = [path for path in pictures if path.exists() and not output.exists()]
        if strange or output in pictures:
            raise UsageError(
                f"output={output}: the figure beside it would replace {(strange or pictures)[0]};"
                " must be another name, such as models.csv"
            )
    Console().print(models.cells(frame).rich("models, accuracy and drop"))
    if output is not None:
        write_text(output, text)
        with print_style():
            save_figure(models.figure(frame), output.parent, output.stem)


@contextmanager
def _stops_are_explained(again: str, output: Path | None, first: bool) -> Iterator[None]:
    """Says of a run that stops, or is stopped, with which command it goes on."""
    kept = (
        f"what is finished is kept; to go on: {again}" if output else "nothing is kept without -o"
    )

    def stop(*_: Any) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (KeyboardInterrupt, Stopped) as error:
        code, line = failure(error)
        leave(code, f"{line}; {kept}" if first else None)
    except (ProcessDied, OSError) as error:
        code, line = failure(error)
        leave(code, f"{line}; {kept}")


def silence() -> None:
    """Silences the bars and logs of the libraries, which would break up ours."""
    import datasets
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in ("lm_eval", "transformers", "datasets", "accelerate", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
