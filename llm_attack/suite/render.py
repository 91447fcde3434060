"""The files of a finished run that people read: tables, figures and the report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from llm_attack.base.drawing import draw
from llm_attack.base.errors import UsageError
from llm_attack.base.failures import Attempts
from llm_attack.base.record import write_text
from llm_attack.suite.analysis import calibration as calibrated
from llm_attack.suite.analysis import critical
from llm_attack.suite.report import figures, paper, perturbations, summary_file, tables, texts
from llm_attack.suite.report.layout import panels, paper_style, print_style, unit_of
from llm_attack.suite.report.page import PERTURBATIONS, Picture, page_template, write_report
from llm_attack.suite.report.tables import Cells
from llm_attack.suite.results import Result, save_frames
from llm_attack.suite.studies import (
    calibration,
    certificates,
    claims,
    convergence,
    hookpoints,
    roundings,
    sanity,
    steps,
    survival,
    tokens,
)

WHOLE = "scores of whole tasks"
if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MANY = 6  # conditions; with more, the report begins with curves

# The pictures of the report: caption, and description for readers who cannot see them.
_PICTURES = {
    "figure": (
        figures.TITLES["figure"],
        "Bars of accuracy per task and condition, with 95 % intervals. The shading shows the"
        " number of choices, and the dashed line the accuracy of random guesses. The numbers are"
        " in the table.",
    ),
    "epsilon": (
        figures.TITLES["epsilon"],
        "Curves of accuracy over the amplitude of the perturbation, one panel per task. The"
        " dashed line is the accuracy of random guesses. The numbers are in the table.",
    ),
    "survival": (
        "Share of questions still right",
        "Robustness curves, one panel per task. For every epsilon, they show the share of"
        " questions whose smallest epsilon with a wrong answer is larger. The medians and areas"
        " are in the table.",
    ),
    "certified": (
        "Certified accuracy",
        "Curves of certified accuracy over the length of the perturbation, one panel per task, for"
        " each sigma. A dotted line shows the network under attack, if the run searched critical"
        " epsilons in L2. The numbers are in the tables.",
    ),
    "layers": (
        "Accuracy by hookpoint",
        "Lines of mean accuracy over the perturbed block, for each attack and amplitude. The"
        " numbers are in the table.",
    ),
    "calibration": (
        "Confidence and accuracy",
        "Reliability diagrams, one panel per condition: accuracy of the questions over the"
        " confidence of their answers. Below the diagonal the model is surer than it is right."
        " The numbers are in the table.",
    ),
    "steps": (
        "Accuracy by steps",
        "Curves of accuracy over the number of steps, one panel per task, for each attack and"
        " amplitude. The numbers are in the table.",
    ),
    "trace": (
        "Loss over steps",
        "Curves of the mean loss over the steps of each attack, one panel per attack, for each"
        " amplitude. If a curve still rises at its end, more steps would find more.",
    ),
    "margin": (
        figures.TITLES["margin"],
        "Histograms of the margin, for each condition: the log-likelihood of the best right"
        " choice minus that of the best wrong one. Questions left of zero are answered wrongly.",
    ),
    "cosine": (
        figures.TITLES["cosine"],
        "Distributions of the cosine similarity between a question's embeddings and the gradient"
        " of the loss, per task. Questions that are right and wrong without an attack are shown"
        " separately.",
    ),
}


class Tables:
    """The tables of a run in addition to its accuracies, for the terminal, files and the page.

    If the run has several hookpoints, they show the first, except for the table that compares
    hookpoints.

    Attributes:
        table: accuracies at the first hookpoint.
        samples: samples at the first hookpoint, worst cases included.
        searched: the same, with the score that critical epsilons refer to.
        score: the result of `critical.score_of`.
        whole: scores of whole tasks; None if there are none.
        texts: the result of `texts.cells`; None if no task generates or scores whole texts.
        critical: the result of `survival.tables`.
        shown: the certificates; None if there are none.
        certified: the result of `certificates.tables`.
        hookpoints: accuracy by hookpoint; None for one hookpoint.
        steps: accuracy by steps; None if no attack has several numbers of steps.
        roundings: accuracy under roundings; None if no attack stays in cells.
        tokens: how many tokens change the answer; empty if no attack chooses tokens.
    """

    def __init__(self, result: Result, attempts: Attempts) -> None:
        self.table, self.samples = map(hookpoints.at_first, (result.table, result.samples))
        with attempts("worst, the accuracy against all attacks"):
            self.samples = hookpoints.at_first(result.worst())
        self.score, self.searched = critical.score_of(result.run), self.samples
        self.whole: Cells | None = None
        self.texts: Cells | None = None
        self.critical: dict[str, tuple[Cells, pd.DataFrame]] = {}
        self.hookpoints: Cells | None = None
        self.steps: Cells | None = None
        self.roundings: Cells | None = None
        self.tokens: dict[str, Cells] = {}
        with attempts("the table of tokens"):
            self.tokens = tokens.cells(result.changed)
        with attempts("the table of roundings"):
            self.roundings = roundings.cells(self.table, result.conditions, result.run)
        with attempts("the table of steps"):
            self.steps = steps.cells(self.table, result.conditions)
        with attempts("the table of the scores of whole tasks"):
            self.whole = tables.of_whole_tasks(self.table)
        with attempts(f"the table of {texts.TITLE}"):
            self.texts = texts.cells(self.samples, result.run)
        with attempts("the tables of critical epsilons"):
            self.searched = critical.of_score(self.samples, result.questions, self.score)
            self.critical = survival.tables(self.searched, self.score)
        self.shown: certificates.Certificates | None = None
        self.certified: dict[str, tuple[Cells, pd.DataFrame]] = {}
        with attempts("the tables of certificates"):
            self.shown = certificates.Certificates.of(
                result.certificates, self.searched, result.conditions, result.run
            )
            self.certified = certificates.tables(self.shown)
        with attempts("the table of hookpoints"):
            self.hookpoints = hookpoints.cells(result.table, result.conditions)

    def named(self) -> dict[str, Cells]:
        """The tables that exist, by their titles."""
        of_questions = self.critical | self.certified
        titled = {WHOLE: self.whole} | {title: cells for title, (cells, _) in of_questions.items()}
        titled |= {texts.TITLE: self.texts, roundings.TITLE: self.roundings}
        titled |= self.tokens
        titled |= {hookpoints.TITLE: self.hookpoints, steps.TITLE: self.steps}
        return {title: cells for title, cells in titled.items() if cells is not None}


def render(result: Result, folder: Path, run: dict[str, Any]) -> list[str]:
    """Writes tables, then figures, then the report.

    Returns:
        A line for each file that could not be written. The others are written nevertheless.
    """
    attempts = Attempts()
    run = hookpoints.shown_of(run, result.table)
    with attempts("table.csv and table.md"):
        tables.save(result.table, folder, run.get("warnings") or ())
    known, made = result.conditions, Tables(result, attempts)
    with attempts(summary_file.FILE):
        summary_file.save(result.table, folder, run, known)
    table, samples = made.table, made.samples
    more: dict[str, Cells] = {}
    with attempts("the table of changes"):
        changed = tables.changes(table)
        more |= {} if changed is None else {"changes from no attack": changed}
    more |= {} if made.whole is None else {WHOLE: made.whole}
    with attempts(claims.TITLE):
        verdicts = claims.claims(samples, known=known)
        more |= {claims.TITLE: claims.cells(verdicts)} if verdicts else {}
    with attempts(sanity.TITLE):
        more[sanity.TITLE] = sanity.cells(sanity.checks(samples, run))
    more |= {title: cells for title, cells in made.named().items() if title not in more}

    @cache
    def answered() -> pd.DataFrame:
        return calibrated.judged(hookpoints.at_first(result.samples))

    with attempts("calibration.md"):
        of_answers = calibrated.calibration(answered())
        text = calibration.cells(of_answers)
        more |= {} if text is None else {calibration.TITLE: text}
        calibration.save(of_answers, folder)
    with attempts(texts.FILE):
        texts.save(made.texts, folder)
    with attempts(tokens.FILE):
        tokens.save(made.tokens, folder)
    with attempts(roundings.FILE):
        roundings.save(made.roundings, folder)
    with attempts("critical.md"):
        survival.save(made.critical, folder)
    with attempts("certified.md"):
        certificates.save(made.certified, folder)
    with attempts("layers.md"):
        hookpoints.save(made.hookpoints, folder)

    unit = unit_of(run)
    drawn = figures.draw_all(samples, table, folder, unit, attempts)
    others = {
        "survival": lambda: survival.figure(made.searched, unit, made.score),
        "certified": lambda: certificates.figure(made.shown),
        "layers": lambda: hookpoints.figure(result.table, known),
        "calibration": lambda: calibration.figure(answered()),
        "steps": lambda: steps.figure(table, known),
        "trace": lambda: convergence.figure(result.trace, known) if _traced(result) else None,
    }
    with print_style():
        for name, make in others.items():
            drawn += [name] if draw(folder, name, make, attempts, _PICTURES[name][0]) else []
    with attempts(PERTURBATIONS):
        name = str(run.get("model_name") or run.get("model"))
        perturbations.write_page(folder, result.samples, result.questions, name)
    with attempts("report.html"):
        # curves are easier to read than very many bars
        first = "epsilon" if table["condition"].nunique() > _MANY else "figure"
        drawn.sort(key=lambda name: name != first)
        pictures = [Picture(*_PICTURES[name], folder / f"{name}.svg") for name in drawn]
        # without times, the same run gives the same report
        lasting = {key: value for key, value in run.items() if key != "timings"}
        lasting["warnings"] = [*(run.get("warnings") or ()), *attempts.lines]
        write_report(folder, samples, result.questions, table, pictures, lasting, more)
    return attempts.lines


def _traced(result: Result) -> bool:
    """Whether the run kept the loss at every step."""
    return bool((result.run.get("settings") or {}).get("trace"))


def for_paper(
    result: Result, folder: Path, formats: Sequence[str], intervals: str = "below"
) -> list[str]:
    """Writes the files for a paper into `folder`.

    Args:
        result: the run.
        folder: the folder to write into.
        formats: some of `paper.FORMATS`. `pdf` writes each figure at a column's width; the bars
            show the conditions of the table. `tex` writes `table.tex`, BibTeX entries and, together
            with `pdf`, `figures.tex`.
        intervals: see `paper.table_of_run`.

    Returns:
        A line for each file that could not be written.
    """
    attempts = Attempts()
    run = hookpoints.shown_of(result.run, result.table)
    table = hookpoints.at_first(result.table)
    few, unit, score = paper.shown(table), unit_of(run), critical.score_of(run)
    samples = hookpoints.at_first(result.worst())
    searched = critical.of_score(samples, result.questions, score)
    makers: dict[str, Callable[[], Figure | None]] = {
        "figure": lambda: figures.bars(few),
        "epsilon": lambda: figures.curves(table, unit),
        "survival": lambda: survival.figure(searched, unit, score),
        "certified": lambda: certificates.figure(
            certificates.Certificates.of(result.certificates, searched, result.conditions, run)
        ),
        "layers": lambda: hookpoints.figure(result.table, result.conditions),
        "steps": lambda: steps.figure(table, result.conditions),
        "trace": lambda: (
            convergence.figure(result.trace, result.conditions) if _traced(result) else None
        ),
        "margin": lambda: figures.margins(samples[samples["condition"].isin(few["condition"])]),
        "cosine": lambda: figures.cosines(samples),
        "calibration": lambda: calibration.figure(
            calibrated.judged(hookpoints.at_first(result.samples))
        ),
    }
    drawn = {}
    for name, make in makers.items() if "pdf" in formats else ():
        title = _PICTURES[name][0]
        with attempts(f"{name}.pdf"), paper_style():
            figure = make()
            if figure is not None:
                paper.save_pdf(figure, folder / f"{name}.pdf", title)
                drawn[name] = title
    if "tex" in formats:
        with attempts("table.tex"):
            write_text(folder / "table.tex", paper.table_of_run(table, run, intervals))
        with attempts("figures.tex"):
            if drawn:
                write_text(folder / "figures.tex", paper.figures_of_run(drawn, table, run))
        with attempts(paper.CITATION):
            write_text(folder / paper.CITATION, paper.bibtex(run))
    return attempts.lines


def try_out() -> None:
    """Tries the libraries that `render` needs, before a run that would fail at its end.

    Raises:
        UsageError: a library does not work on this machine.
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
        raise UsageError(f"output: {line}; without output, the run does not need it")
