"""Conditions over tasks with one model: the table of Fig. 3, through lm-eval itself."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from llm_attack import __version__
from llm_attack.errors import UsageError
from llm_attack.lm.model import AttackedHFLM
from llm_attack.lm.settings import split_arguments
from llm_attack.suite.harness import add_tasks, unknown_tasks


@dataclass
class Comparison:
    """What was measured.

    Attributes:
        accuracies: a row for each task and a last one with their mean; a column for each condition
            and `baseline`, the accuracy of random guesses. lm-eval's `acc`.
        attacks: for each condition, its resolved settings and diagnostics.
        seconds: wall time of each condition, task building included.
    """

    accuracies: pd.DataFrame
    attacks: dict[str, dict[str, Any]]
    seconds: dict[str, float]


class _Bar:
    """A rich progress bar with the few methods of tqdm's that the model calls."""

    def __init__(self, progress: Progress, total: int, desc: str) -> None:
        self.progress = progress
        self.task = progress.add_task(desc, total=total)

    def update(self, n: int) -> None:
        self.progress.advance(self.task, n)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def compare(
    lm: AttackedHFLM,
    tasks: list[str],
    attacks: list[str],
    *,
    console: Console | None = None,
    **options: Any,
) -> Comparison:
    """Evaluates `lm` on lm-eval `tasks` under each of `attacks`; its other settings stay.

    Args:
        lm: the model.
        tasks: names of tasks or groups.
        attacks: names of attacks.
        console: where a progress bar is shown.
        **options: of lm-eval's `simple_evaluate` (limit, num_fewshot, ...).

    Raises:
        UsageError: a task is unknown, or an argument out of range.
    """
    add_tasks()
    manager = TaskManager()
    missing = [t for t in tasks if not manager.match_tasks([t])]
    if missing:
        raise unknown_tasks(missing, manager.all_tasks)
    conditions = [replace(lm.settings, attack=name) for name in attacks]
    columns: dict[str, dict[str, float]] = {}
    comparison = Comparison(pd.DataFrame(), {}, {})
    shown = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*shown, TimeRemainingColumn(), console=console, disable=console is None) as bars:
        for settings in conditions:
            lm.use(settings)
            name = lm.attack.condition
            lm.progress = lambda total, name=name, **_: _Bar(bars, total, f"{name:>12}")
            start = time.perf_counter()
            results = simple_evaluate(
                lm,
                tasks=tasks,
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=True,
                **options,
            )
            comparison.seconds[name] = round(time.perf_counter() - start, 2)
            comparison.attacks[name] = lm.attack_info()
            of_tasks = results["samples"]
            columns[name] = {t: results["results"][t]["acc,none"] for t in of_tasks}
            columns["baseline"] = {t: _chance(questions) for t, questions in of_tasks.items()}
    columns["baseline"] = columns.pop("baseline")  # the last column
    comparison.accuracies = pd.DataFrame(columns)
    comparison.accuracies.loc["mean"] = comparison.accuracies.mean()
    return comparison


def _chance(questions: list[dict[str, Any]]) -> float:
    """Expected accuracy of guesses: mean over questions of 1 / number of choices."""
    first = questions[0]["filter"]
    counts = [len(q["arguments"]) for q in questions if q["filter"] == first]
    return sum(1 / n for n in counts) / len(counts)


def main(
    *, model: str, tasks: str, attacks: str, output: Path | None, model_args: str, **options: Any
) -> None:
    """The command `llm-attack run`."""
    logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if output is not None and output.exists() and not output.is_dir():
        raise UsageError(f"output={output}: must be a folder, or not exist yet")
    of_model = {k: options.pop(k) for k in ("epsilon", "loss", "batch_size", "device")}
    of_evaluation = {k: v for k, v in options.items() if v is not None}
    console = Console()
    quiet_progress_bars()
    names = [name.strip() for name in attacks.split(",") if name.strip()]
    arguments = {**of_model, **simple_parse_args_string(model_args)}
    for name in names:  # before the model is loaded
        split_arguments({**arguments, "attack": name})
    with console.status(f"loading {model}"):
        lm = AttackedHFLM(pretrained=model, **arguments, attack=names[0])
    comparison = compare(lm, tasks.split(","), names, console=console, **of_evaluation)
    console.print(table(comparison, f"{model}: accuracy, loss={lm.settings.loss}"))
    if output is not None:
        save(comparison, output, {"model": model, "tasks": tasks, **options, **of_model})
        console.print(f"written: {output}/table.csv, {output}/run.json")


def quiet_progress_bars() -> None:
    """Silences the bars of lm-eval, transformers and datasets, which would break up ours."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import transformers
    from tqdm import tqdm

    def silent(*args: Any, **kwargs: Any) -> tqdm:
        return tqdm(*args, **{**kwargs, "disable": True})

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for module in (lm_eval.api.model, lm_eval.api.task):
        module.tqdm = silent


def table(comparison: Comparison, title: str) -> Table:
    """The accuracies as a rich table."""
    frame = comparison.accuracies
    result = Table("task", title=title, caption="baseline: accuracy of random guesses")
    for column in frame:
        result.add_column(str(column), justify="right")
    for task, row in frame.iterrows():
        if task == "mean":
            result.add_section()
        result.add_row(str(task), *(f"{value:.3f}" for value in row))
    return result


def save(comparison: Comparison, folder: Path, settings: dict[str, Any]) -> None:
    """Writes `table.csv` and `run.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    comparison.accuracies.to_csv(folder / "table.csv", float_format="%.6f", index_label="task")
    run = {
        "settings": settings,
        "attacks": comparison.attacks,
        "seconds": comparison.seconds,
        "versions": versions(),
    }
    (folder / "run.json").write_text(json.dumps(run, indent=2, default=str) + "\n")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    from importlib.metadata import version

    names = ("torch", "transformers", "lm-eval", "accelerate", "datasets")
    return {"llm-attack": __version__, **{name: version(name) for name in names}}
