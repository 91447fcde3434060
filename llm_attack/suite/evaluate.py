"""The command `run`, and `evaluate`, which is `run` as a function."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llm_attack.base.errors import UsageError, invalid
from llm_attack.base.failures import Attempts, ProcessDied, Stopped, failure, held, leave, stop_in
from llm_attack.base.folder import claim, resolved
from llm_attack.base.loaded import LoadedModel
from llm_attack.base.record import write_json, write_text
from llm_attack.base.redact import redacted
from llm_attack.harness.judge import as_json
from llm_attack.harness.loggers import Loggers
from llm_attack.harness.patches import without_bars
from llm_attack.suite import render, results, thresholds
from llm_attack.suite.analysis.conditions import CONDITIONS
from llm_attack.suite.analysis.perturbations import FOLDER
from llm_attack.suite.plan import Plan
from llm_attack.suite.report import tables
from llm_attack.suite.results import CERTIFICATES, LM_EVAL, TOKENS, TRACE, Result, save_frames
from llm_attack.suite.run import estimate, fingerprint, on_ray
from llm_attack.suite.run.execute import Prepared, Processes, execute, prepare
from llm_attack.suite.run.load import left_as_it_was
from llm_attack.suite.run.progress import MODES, note, warn, written
from llm_attack.suite.run.store import STORE, begun, discard
from llm_attack.suite.studies import hookpoints, revisions
from llm_attack.suite.thresholds import Threshold


@torch.inference_mode(False)
def evaluate(
    plan: Plan, *, output: str | os.PathLike[str] | None = None, progress: str = "bar"
) -> Result | None:
    """Evaluates a model under attack: `llm-attack run` as a function.

    Args:
        plan: model, tasks, attacks, epsilons and other settings.
        output: folder for all outputs. A run that was interrupted continues in its folder. With
            None, nothing is kept.
        progress: `bar` (off a terminal, a line per stage and every 30 seconds), `json` or `quiet`.
            With `quiet`, the bars and logs of the libraries are silent, too.

    Returns:
        A `Result` with the pandas frames `table`, `samples` and `questions`. The first process of a
        parallel run gets it, and the others get None.

    Raises:
        TypeError: an argument has a wrong type.
        UsageError: a value is not allowed, or the folder holds something else.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: must be a Plan, not {type(plan).__name__}")
    if progress not in MODES:
        raise invalid("progress", progress, MODES)
    who = Processes.of(plan)
    shown = progress if who.first else "quiet"
    console = Console(stderr=True)
    folder = None if output is None else resolved(output)
    _check_folder(folder, who, plan)
    with (
        silenced() if progress == "quiet" else nullcontext(),
        on_ray.cluster(plan),
        left_as_it_was(plan.model),
    ):
        prepared = prepare(plan, shown, console)
        if folder is None:
            with tempfile.TemporaryDirectory() as nowhere, held():
                return execute(prepared, Path(nowhere), shown, console)
        fingerprint.check(folder, prepared.mark)
        result = _finished(folder, plan, prepared.mark, who, shown, console)
        if result is None:
            alone = replace(plan, shard=None, ray=None, ray_workers=None)
            loaded = isinstance(plan.model, LoadedModel)
            again = call(alone, output) if loaded else command(alone, output)
            result = _carried_out(prepared, folder, again, shown, console)
    if not who.first:
        return None
    discard(folder)
    return result


def _check_folder(folder: Path | None, who: Processes, plan: Plan) -> None:
    """Checks the folder before a model is loaded."""
    if folder is None:
        if plan.save_perturbations:
            raise UsageError("save_perturbations=True: needs output, the folder that gets them")
        if who.world > 1:
            raise UsageError("output=None: must be a folder that the processes share")
        return
    claim(folder, lambda _: fingerprint.kept(folder) is not None, (STORE, LM_EVAL, FOLDER))
    if who.first:
        render.try_out()


def _carried_out(
    prepared: Prepared, folder: Path, again: list[str] | str, shown: str, console: Console
) -> Result | None:
    """Carries out and saves the rest of the run. `again` is the command that repeats it."""
    with held(), begun(folder):
        result = execute(prepared, folder, shown, console)
        if result is not None:
            warn(save(result, folder, again), shown)
            result = replace(result, folder=folder)
        return result


def _finished(
    folder: Path, plan: Plan, mark: dict[str, Any], who: Processes, shown: str, console: Console
) -> Result | None:
    """The run in `folder`, if it is complete. Files that cannot be read are renamed."""
    if not (folder / "run.json").exists():
        return None
    try:
        return results.load(folder, plan.equivalence)
    except UsageError as error:
        if who.first:
            fingerprint.keep(folder, mark)  # before run.json, which contains the mark, is renamed
            aside = ", ".join(map(str, results.set_aside(folder)))
            note(shown, console, f"{error}; moved aside, and computed again: {aside}")
        return None


def _given(plan: Plan) -> dict[str, Any]:
    """The settings of a plan that differ from the defaults, without secrets."""
    defaults = Plan().plain()
    values = {name: redacted(value) for name, value in plan.plain().items()}
    return {name: value for name, value in values.items() if value != defaults[name]}


def call(plan: Plan, folder: str | os.PathLike[str] | None) -> str:
    """The call in Python that repeats the run of a loaded model."""
    given = {"name": redacted(plan.model), **_given(plan)}
    words = [
        "model, tokenizer=tokenizer",
        *(f"{k}={v!r}" for k, v in given.items() if k != "model"),
    ]
    output = "" if folder is None else f", output={os.fspath(folder)!r}"
    kind = type(plan.model.model).__name__
    return f"evaluate(Plan({', '.join(words)}){output})  # in Python, where model is a {kind}"


def command(plan: Plan, folder: str | os.PathLike[str] | None) -> list[str]:
    """The command line of a plan: the settings that differ from the defaults, without secrets."""
    words = ["llm-attack", "run"]
    for name, value in _given(plan).items():
        if isinstance(value, dict):
            value = ",".join(f"{k}={v}" for k, v in value.items())
        elif isinstance(value, tuple):
            value = ",".join(map(str, value))
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words if folder is None else [*words, "-o", str(folder)]


def run(
    *,
    output: str | None,
    progress: str,
    dry_run: bool,
    checkpoints: str | None = None,
    fail_under: str | None = None,
    fail_drop: str | None = None,
    wandb_args: str | None = None,
    trackio_args: str | None = None,
    hf_hub_log_args: str | None = None,
    verbose: int = 0,
    **settings: Any,
) -> None:
    """The command `llm-attack run`."""
    plan = Plan(**settings)
    asked = {"wandb_args": wandb_args, "trackio_args": trackio_args}
    loggers = Loggers(plan.model_name, asked | {"hf_hub_log_args": hf_hub_log_args})
    limits = [*thresholds.under(fail_under, plan), *thresholds.drop(fail_drop, plan)]
    if checkpoints is not None:
        if dry_run or output is None:
            wrong = (
                "without dry_run" if dry_run else "together with output, the folder for all of them"
            )
            raise UsageError(f"revisions={checkpoints}: must be given {wrong}")
        return _run_revisions(plan, checkpoints, output, progress, limits, verbose, loggers)
    if dry_run:
        silence(verbose)
        with without_bars():
            estimated = estimate.dry_run(plan, progress)
        return Console().print(estimate.show(estimated, plan.model_name))
    again = shlex.join(command(plan, output))
    folder = None if output is None else resolved(output)
    silence(verbose)
    with without_bars(), _stops_are_explained(again, folder, Processes.of(plan).first):
        result = evaluate(plan, output=output, progress=progress)
    if result is not None:
        console = Console()
        table = hookpoints.at_first(result.table)
        shown = "score" if "score" in table else "accuracy"
        title = f"{result.run['model_name']}: {shown}, loss={result.run['settings']['loss']}"
        warnings = hookpoints.shown_of(result.run, result.table)["warnings"]
        attempts = Attempts()
        with attempts("the table"):
            console.print(tables.RunTable(table, title, warnings))
        for name, cells in render.Tables(result, attempts).named().items():
            console.print(cells.rich(name))
        warn(attempts.lines, progress)
        if folder is not None and progress != "quiet":
            written(f"{folder}: report.html, table.csv, figure.png, samples.parquet")
        warn(loggers.log(results.lm_eval_of(result)), progress)
        thresholds.fail(thresholds.check_run(result.table, limits))


def _run_revisions(
    plan: Plan,
    given: str,
    typed: str,
    progress: str,
    limits: Sequence[Threshold],
    verbose: int,
    loggers: Loggers,
) -> None:
    of_each = revisions.plans(plan, given)
    output = resolved(typed)
    revisions.check(output, of_each)
    again = shlex.join([*command(plan, typed), "--revisions", given])
    silence(verbose)
    runs: dict[str, Result | None] = {}
    who = Processes.of(plan)
    with without_bars(), _stops_are_explained(again, output, who.first):
        for name, each in of_each.items():
            if who.first:
                note(progress, Console(stderr=True), name)
            revision = str(each.model_args.get("revision", name))  # its name on the hub
            runs[revision] = evaluate(each, output=output / name, progress=progress)
    finished = {name: result for name, result in runs.items() if result is not None}
    if not who.first:
        return
    frame = revisions.along(finished)
    warn(revisions.save(frame, output), progress)
    cells = revisions.cells(frame, revisions.equal(finished))
    Console().print(cells.rich(f"{plan.model}: revisions under attack"))
    if progress != "quiet":
        written(f"{output}: revisions.csv, revisions.png, and a folder for each revision")
    for name, result in finished.items():
        warn(loggers.log(results.lm_eval_of(result), f"{plan.model_name}, {name}"), progress)
    missed = {name: thresholds.check_run(run.table, limits) for name, run in finished.items()}
    thresholds.fail(f"{name}: {text}" for name, lines in missed.items() for text in lines)


@contextmanager
def _stops_are_explained(again: str, output: Path | None, first: bool) -> Iterator[None]:
    """If the run stops or is stopped, prints the command that continues it.

    While the context lasts, SIGTERM raises an exception in the main thread. Other threads cannot
    have handlers.
    """
    kept = (
        f"finished batches are kept; to continue: {again}"
        if output
        else "without -o, nothing is kept"
    )

    def stop(*_: Any) -> None:
        raise Stopped

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    except (KeyboardInterrupt, Stopped, SystemError) as error:
        if stop_in(error) is None:
            raise
        code, line = failure(error)
        leave(code, f"{line}; {kept}" if first else None)
    except (ProcessDied, OSError) as error:
        code, line = failure(error)
        leave(code, f"{line}; {kept}")
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


LIBRARIES = ("lm_eval", "transformers", "datasets", "accelerate", "huggingface_hub")


def silence(verbose: int = 0) -> None:
    """Silences the progress bars of the libraries, which would break up ours, and their logs.

    Args:
        verbose: 0: the libraries log only errors; 1: the libraries and this package log
            information; 2 or more: they also log for debugging.
    """
    import datasets
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    level = (logging.ERROR, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(level)
    if verbose:
        logging.getLogger("llm_attack").setLevel(level)
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def silenced() -> Iterator[None]:
    """While the context lasts, applies `silence` and turns off lm-eval's bars."""
    import datasets
    import transformers

    bars = transformers.utils.logging
    levels = {name: logging.getLogger(name).level for name in LIBRARIES}
    shown = bars.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    silence()
    try:
        with without_bars():
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if shown[0]:
            bars.enable_progress_bar()
        if not shown[1]:
            datasets.enable_progress_bars()


def save(result: Result, folder: Path, command: list[str] | str) -> list[str]:
    """Writes everything of a run into `folder`. `run.json` is last, and marks the run as complete.

    docs/files.md lists the files. If a run has several hookpoints, `layers.md` compares them, and
    the other tables, figures and the report show only the first.

    Args:
        result: the run.
        folder: the folder of the run.
        command: the command that repeats the run, as a list of arguments or as text.

    Returns:
        A line for each file of `render` or of lm-eval's results that could not be written. The
            numbers and all other files are written nevertheless.
    """
    samples = result.samples.copy(deep=False)
    samples.attrs[CONDITIONS] = result.run.get(CONDITIONS, {})
    frames = {"samples": samples, "questions": result.questions}
    more = {TRACE: result.traced, CERTIFICATES: result.certificates}
    more[TOKENS] = result.changed
    frames |= {name: frame for name, frame in more.items() if frame is not None}
    save_frames(folder, **frames)
    attempts = Attempts()
    for name, judged in result.lm_eval.items():
        with attempts(f"{LM_EVAL}/results_{name}.json"):
            write_text(folder / LM_EVAL / f"results_{name}.json", as_json(judged))
    text = command if isinstance(command, str) else shlex.join(command)
    run = {"command": text, **result.run}
    failed = [*attempts.lines, *render.render(result, folder, run)]
    write_json(folder / "run.json", run)
    return failed
