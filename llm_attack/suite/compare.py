"""Conditions over tasks with one model: the table of Fig. 3, through lm-eval itself."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from llm_attack.errors import UsageError
from llm_attack.lm.engine import Answer
from llm_attack.lm.model import AttackedHFLM
from llm_attack.lm.settings import AttackSettings, split_arguments
from llm_attack.outputs import versions, write_json
from llm_attack.suite.harness import task_manager


@dataclass
class Comparison:
    """What was measured.

    Attributes:
        accuracies: a row for each task and a last one with their mean; a column for each condition
            and `baseline`, the accuracy of random guesses. lm-eval's `acc`.
        attacks: for each condition, its resolved settings and diagnostics.
        seconds: wall time, building of tasks included.
    """

    accuracies: pd.DataFrame
    attacks: dict[str, dict[str, Any]]
    seconds: float


class _Bar:
    """A rich progress bar with the few methods of tqdm's that the model calls."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress = progress
        self.task = progress.add_task("requests", total=total)

    def update(self, n: int) -> None:
        self.progress.advance(self.task, n)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _Replay(LM):
    """Lets lm-eval judge answers that were computed before."""

    def __init__(self, answers: list[Answer]) -> None:
        super().__init__()
        self.answers = answers

    def loglikelihood(self, requests: list[Instance]) -> list[Answer]:
        return self.answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise UsageError(f"tasks={requests[0].task_name}: must be a task with choices")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise UsageError(f"tasks={requests[0].task_name}: must be a task with choices")


class _Recorder(_Replay):
    """Answers for all conditions at the first one's evaluation."""

    def __init__(self, lm: AttackedHFLM) -> None:
        super().__init__([])
        self.lm = lm

    def loglikelihood(self, requests: list[Instance]) -> list[Answer]:
        self.of_conditions = self.lm.answers_of(requests)
        return self.of_conditions[0]


def compare(
    lm: AttackedHFLM,
    tasks: list[str],
    conditions: list[AttackSettings],
    *,
    manager: TaskManager | None = None,
    console: Console | None = None,
    **options: Any,
) -> Comparison:
    """Evaluates `lm` on lm-eval `tasks` under all `conditions`, in one pass over the requests.

    Args:
        lm: the model.
        tasks: names of tasks or groups with choices.
        conditions: as for `AttackedHFLM.use`.
        manager: knows the tasks; made unless given.
        console: where a progress bar is shown.
        **options: of lm-eval's `simple_evaluate` (limit, num_fewshot, ...).

    Raises:
        UsageError: a task is unknown or has no choices, or an argument is out of range.
    """
    manager = manager or task_manager(tasks)
    lm.use(*conditions)
    options = {"task_manager": manager, "bootstrap_iters": 0, "log_samples": True, **options}
    columns: dict[str, dict[str, float]] = {}
    recorder = _Recorder(lm)
    start = time.perf_counter()
    shown = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*shown, TimeRemainingColumn(), console=console, disable=console is None) as bars:
        lm.progress = lambda total, **_: _Bar(bars, total)
        results = [simple_evaluate(recorder, tasks=tasks, **options)]
    for answers in recorder.of_conditions[1:]:
        results.append(simple_evaluate(_Replay(answers), tasks=tasks, **options))
    for attack, found in zip(lm.engine.attacks, results, strict=True):
        columns[attack.condition] = {t: found["results"][t]["acc,none"] for t in found["samples"]}
    columns["baseline"] = {t: _chance(found) for t, found in results[0]["samples"].items()}
    frame = pd.DataFrame(columns)
    frame.loc["mean"] = frame.mean()
    attacks = {a.condition: lm.attack_info(i) for i, a in enumerate(lm.engine.attacks)}
    return Comparison(frame, attacks, round(time.perf_counter() - start, 2))


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
    conditions = [
        split_arguments({**arguments, "attack": name}, AttackSettings)[0] for name in names
    ]
    task_names = [name.strip() for name in tasks.split(",") if name.strip()]
    with console.status("looking up the tasks"):
        manager = task_manager(task_names)
    with console.status(f"loading {model}"):
        lm = AttackedHFLM(pretrained=model, **arguments, attack=names[0])
    comparison = compare(
        lm, task_names, conditions, manager=manager, console=console, **of_evaluation
    )
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
    write_json(folder / "run.json", run)
