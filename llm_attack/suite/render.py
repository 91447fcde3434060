"""The files of a finished run that people read: tables, figures and the report."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from llm_attack.base.drawing import draw
from llm_attack.base.errors import UsageError
from llm_attack.base.failures import Attempts
from llm_attack.suite.analysis import critical
from llm_attack.suite.report import figures, summary_file, tables
from llm_attack.suite.report.layout import panels, print_style, unit_of
from llm_attack.suite.report.page import Picture, page_template, write_report
from llm_attack.suite.report.tables import Cells
from llm_attack.suite.results import Result, save_frames
from llm_attack.suite.studies import claims, hookpoints, sanity, survival

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


def render(result: Result, folder: Path, run: dict[str, Any]) -> list[str]:
    """Writes tables, then figures, then the report.

    Returns:
        What could not be made: a line for each. The others are there.
    """
    attempts = Attempts()
    run = hookpoints.shown_of(run, result.table)
    with attempts("table.csv and table.md"):
        tables.save(result.table, folder, run.get("warnings") or ())
    known = result.conditions
    with attempts(summary_file.FILE):
        summary_file.save(result.table, folder, run, known)
    samples, table = map(hookpoints.at_first, (result.samples, result.table))
    with attempts("worst, what is left after all attacks"):
        samples = hookpoints.at_first(result.worst())
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
        more |= hookpoints.save(result.table, folder, known)

    unit = unit_of(run)
    drawn = figures.draw_all(samples, table, folder, unit, attempts)
    others = {
        "survival": lambda: survival.figure(searched, unit, score),
        "layers": lambda: hookpoints.figure(result.table, known),
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
            save_frames(Path(nowhere), samples=pd.DataFrame({"acc": [0.0]}))
        with attempts("report.html"):
            page_template()
    for line in attempts.lines:
        raise UsageError(f"output: {line}; without output the run needs none of it")
