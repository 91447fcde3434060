"""The folder of a run: what is written there, and read back."""

from __future__ import annotations

import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from llm_attack.base.drawing import draw
from llm_attack.base.errors import UsageError, as_path
from llm_attack.base.failures import Attempts, one_line
from llm_attack.base.record import write_json, write_text
from llm_attack.base.redact import redacted
from llm_attack.harness.judge import as_json
from llm_attack.suite.analysis import critical
from llm_attack.suite.analysis.conditions import CONDITIONS
from llm_attack.suite.analysis.equivalence import with_equivalence
from llm_attack.suite.analysis.summary import summarise
from llm_attack.suite.analysis.worst import with_worst
from llm_attack.suite.report import figures, tables
from llm_attack.suite.report.layout import panels, print_style, unit_of
from llm_attack.suite.report.page import Picture, page_template, write_report
from llm_attack.suite.report.tables import Cells
from llm_attack.suite.run import rows as frames
from llm_attack.suite.run.execute import LM_EVAL, Result
from llm_attack.suite.studies import claims, sanity, survival
from llm_attack.suite.studies import hookpoints as layers

# What draw_all draws, and what a reader who cannot see it should know.
_PICTURES = {
    "figure": (
        "Accuracy under each condition",
        "Bars of accuracy per task and condition with 95 % intervals, over shading by the number"
        " of options and a dashed line at the accuracy of guesses; the numbers are in the table.",
    ),
    "epsilon": (
        "Accuracy against epsilon",
        "Curves of accuracy over the amplitude of the perturbation, one panel per task, with a"
        " dashed line at the accuracy of guesses; the numbers are in the table.",
    ),
    "survival": (
        "Share of questions still right",
        "Robustness curves: for every epsilon the share of questions whose smallest epsilon with a"
        " wrong answer is above it, one panel per task; the medians and areas are in the table.",
    ),
    "layers": (
        "Accuracy by what is perturbed",
        "Lines of mean accuracy over the block that is perturbed, for each attack and amplitude;"
        " the numbers are in the table.",
    ),
    "margin": (
        "Gold margin before and after",
        "Histograms of the best right choice's log-likelihood minus the best wrong one's, for each"
        " condition; questions left of zero are answered wrongly.",
    ),
    "cosine": (
        "Cosine similarity of embeddings and gradient",
        "Distributions per task of the cosine similarity between a question's embeddings and the"
        " gradient of the loss there, for questions answered rightly and wrongly without an"
        " attack.",
    ),
}


# Parts of run.json that the rest relies on, and those that earlier records have not.
_SINCE: dict[str, type] = {
    "model_name": str,
    "warnings": list,
    "equivalence": float,
    "of_tasks": dict,
}
_RECORD: dict[str, type] = {
    "command": str,
    **dict.fromkeys(("settings", "attacks", "fingerprint"), dict),
    **_SINCE,
}


def save(result: Result, folder: Path, command: list[str]) -> list[str]:
    """Writes everything of a run into `folder`; `run.json` last, which says that it is complete.

    `samples.parquet`, `questions.parquet`, `table.csv`, `table.md`, figures as PNG and SVG, where
    critical epsilons were looked for `critical.csv`, `foretold.csv` and `critical.md`, of several
    hookpoints `layers.md` (the other tables, figures and the report are of the first of them),
    `report.html`, `lm_eval/results_CONDITION.json` and `run.json`.

    Args:
        result: the run.
        folder: where to.
        command: that repeats it.

    Returns:
        What could not be made of what `render` writes, and of lm-eval's results: a line for each.
        The others, and the numbers, are there.
    """
    samples = result.samples.copy(deep=False)
    samples.attrs[CONDITIONS] = result.run.get(CONDITIONS, {})
    frames.save(folder, samples=samples, questions=result.questions)
    attempts = Attempts()
    for name, found in result.lm_eval.items():
        with attempts(f"{LM_EVAL}/results_{name}.json"):
            write_text(folder / LM_EVAL / f"results_{name}.json", as_json(found))
    run = {"command": shlex.join(command), **result.run}
    failed = [*attempts.lines, *render(result, folder, run)]
    write_json(folder / "run.json", run)
    return failed


def render(result: Result, folder: Path, run: dict[str, Any]) -> list[str]:
    """Writes tables, then figures, then the report.

    Returns:
        What could not be made: a line for each. The others are there.
    """
    attempts = Attempts()
    run = layers.shown_of(run, result.table)
    with attempts("table.csv and table.md"):
        tables.save(result.table, folder, run.get("warnings") or ())
    known = result.conditions
    samples, table = map(layers.at_first, (result.samples, result.table))
    with attempts("worst, what is left after all attacks"):
        samples = layers.at_first(with_worst(result.samples, result.run))
    more: dict[str, Cells] = {}
    with attempts("the table of changes"):
        changed = tables.changes(table)
        more |= {} if changed is None else {"what changed against no attack": changed}
    with attempts("the table of the scores of whole tasks"):
        whole = tables.of_whole_tasks(table)
        more |= {} if whole is None else {"scores of whole tasks": whole}
    with attempts(claims.TITLE):
        told = claims.claims(samples, result.questions, known=known)
        more |= {claims.TITLE: claims.cells(told)} if told else {}
    with attempts(sanity.TITLE):
        more[sanity.TITLE] = sanity.cells(sanity.checks(samples, run))
    score, searched = critical.score_of(run), samples
    with attempts("critical.md and its tables"):
        searched = critical.of_score(samples, result.questions, score)
        more |= survival.save(searched, folder, score)
    with attempts("layers.md"):
        more |= layers.save(result.table, folder, known)

    unit = unit_of(run)
    drawn = figures.draw_all(samples, table, folder, unit, attempts)
    others = {
        "survival": lambda: survival.figure(searched, unit, score),
        "layers": lambda: layers.figure(result.table, known),
    }
    with print_style():
        drawn += [name for name, make in others.items() if draw(folder, name, make, attempts)]
    with attempts("report.html"):
        pictures = [Picture(*_PICTURES[name], folder / f"{name}.svg") for name in drawn]
        # the same run gives the same report, however long it took
        lasting = {key: value for key, value in run.items() if key != "timings"}
        lasting["warnings"] = [*(run.get("warnings") or ()), *attempts.lines]
        write_report(folder, samples, result.questions, table, pictures, lasting, more)
    return attempts.lines


def try_out() -> None:
    """What `render` needs of other libraries, before a run whose end depends on it.

    Raises:
        UsageError: it does not work on this machine.
    """
    attempts = Attempts()
    with tempfile.TemporaryDirectory() as nowhere:
        with attempts("a figure"), print_style():
            draw(Path(nowhere), "figure", lambda: panels(["a"])[0])
        with attempts("samples.parquet"):
            frames.save(Path(nowhere), samples=pd.DataFrame({"acc": [0.0]}))
        with attempts("report.html"):
            page_template()
    for line in attempts.lines:
        raise UsageError(f"output: {line}; without output the run needs none of it")


def load(folder: Path, equivalence: float | None = None) -> Result:
    """A finished run.

    Args:
        folder: of the run.
        equivalence: of `with_equivalence`, in place of what the run was told with.

    Raises:
        UsageError: there is none in `folder`, or a file of it cannot be read.
    """
    path = as_path("folder", folder) / "run.json"
    try:
        run = redacted(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UsageError(
            f"{folder}: has no run.json; must be the folder of a finished run"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: cannot be read ({one_line(error)}); must be of a finished run"
        ) from error
    for name, kind in _RECORD.items():
        part = run.get(name) if isinstance(run, dict) else None
        if not isinstance(part, kind) and (part is not None or name not in _SINCE):
            raise UsageError(
                f"{path}: {name} there is {type(part).__name__}, not {kind.__name__}; must be of a"
                " finished run"
            )
    found = frames.load(folder)
    run = {"conditions": found["samples"].attrs.pop(CONDITIONS, {}), **run}
    samples = with_worst(found["samples"], run)
    table = summarise(samples, run.get("attacks"), run.get("of_tasks"))
    within = run.get("equivalence") if equivalence is None else equivalence
    table, run = with_equivalence(table, within), run | {"equivalence": within}
    return Result(table, found["samples"], found["questions"], run, {})


def set_aside(folder: Path) -> list[Path]:
    """Renames the files of a run one of which cannot be read; returns where they are now."""
    renamed = []
    for path in [folder / "run.json", *(folder / f"{name}.parquet" for name in frames.FRAMES)]:
        if path.exists():
            renamed.append(path.replace(path.with_name(f"{path.name}.unreadable")))
    return renamed
