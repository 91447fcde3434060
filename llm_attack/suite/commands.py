"""The commands `report` and `compare` for finished runs. They need neither torch nor lm-eval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from llm_attack.base.drawing import draw
from llm_attack.base.errors import UsageError, as_path, invalid
from llm_attack.base.failures import Attempts
from llm_attack.base.folder import check_writable, claim_file, resolved, resolved_file
from llm_attack.base.record import write_text
from llm_attack.suite import logged, render, results, thresholds
from llm_attack.suite.analysis import flags
from llm_attack.suite.analysis.drops import differences
from llm_attack.suite.analysis.equivalence import with_equivalence
from llm_attack.suite.analysis.flags import flagged
from llm_attack.suite.analysis.pairs import paired, unshared
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.report import paper, tables
from llm_attack.suite.report.layout import paper_style, print_style
from llm_attack.suite.report.tables import Cells
from llm_attack.suite.results import Result
from llm_attack.suite.run.progress import warn, written
from llm_attack.suite.studies import drop_pairs, drops, models
from llm_attack.suite.studies import leaderboard as board
from llm_attack.suite.studies import scaling as scalings
from llm_attack.suite.studies import transfer as transfers


def report(
    folder: Path,
    equivalence: float | None,
    formats: str | None = None,
    intervals: str = "below",
) -> None:
    """The command `llm-attack report`: writes tables, figures and report again from the samples."""
    wanted = paper.formats_of(formats)
    folder = resolved(folder, "folder")
    check_writable(folder, argument="folder")
    result = results.load(folder, equivalence)
    warn(render.render(result, folder, result.run))
    warn(render.for_paper(result, folder, wanted, intervals))
    written(f"{folder}: report.html, tables, figures{''.join(f', {name}' for name in wanted)}")


def compare(
    folders: Sequence[Path],
    output: str | None,
    leaderboard: str | None,
    equivalence: float | None,
    formats: str | None = None,
    intervals: str = "below",
    fail_drop: str | None = None,
) -> None:
    """The command `llm-attack compare`: compares runs on the questions that all of them asked."""
    wanted = paper.formats_of(formats)
    table, path = _file("output", output), _file("leaderboard", leaderboard)
    folders = [as_path("folders", folder) for folder in folders]
    _check(len(folders), table, path, equivalence, wanted)
    limits = thresholds.drop(fail_drop)
    if limits and len(folders) != 2:
        raise UsageError(f"fail_drop={fail_drop}: needs exactly two folders")
    places = [logged.folder_of(folder) for folder in folders]
    of_lm_eval = [place for place in places if place is not None]
    if of_lm_eval:
        if "pdf" in wanted:
            raise UsageError(
                f"format={formats}: must be tex with runs of lm_eval, because their comparison has"
                " no figure"
            )
        _check_logged(folders, places, path)
        cells, frame = _compare_logged(of_lm_eval, table, equivalence)
        _write_for_paper(table, wanted, cells, "b against a", intervals, {})
        return thresholds.fail(thresholds.check_pair(frame, limits))
    compared = [results.load(folder) for folder in folders]
    runs = dict(zip(models.names(folders, compared), compared, strict=True))
    if path is not None:
        board.check(path, runs)
    missed: list[str] = []
    if len(folders) > 1:
        if len(folders) == 2:
            pdf = "pdf" in wanted
            cells, frame = _compare_two(folders, compared, table, equivalence, pdf)
            missed = thresholds.check_pair(frame, limits)
        else:
            cells = _compare_many(runs, table, "pdf" in wanted)
        title = ("models" if len(folders) > 2 else "b against a") + ", accuracy"
        _write_for_paper(table, wanted, cells, title, intervals, compared[0].run)
    if path is not None:
        board.add(path, runs)
        written(path)
    thresholds.fail(missed)


def _check(
    n: int,
    table: Path | None,
    leaderboard: Path | None,
    equivalence: float | None,
    wanted: Sequence[str],
) -> None:
    """Refuses options of `compare` that do not fit each other or the number of folders, `n`."""
    listed = ",".join(wanted)
    if wanted and table is None:
        raise UsageError(
            f"format={listed}: needs output, a CSV file; the other files are written beside it"
        )
    if n < 2 and leaderboard is None:
        raise UsageError(f"compare: needs two folders or more, not {n}")
    if equivalence is not None and n != 2:
        raise UsageError(f"equivalence={equivalence:g}: needs exactly two folders")
    pictures = [table.with_suffix(f".{form}") for form in ("png", "svg")] if table else []
    if leaderboard is not None and leaderboard in (table, *pictures):
        raise UsageError(f"leaderboard={leaderboard}: must be another file than output")
    if wanted and table is not None:
        _claim_for_paper(table, wanted, table if n > 2 else _drops_of(table))


def _check_logged(
    folders: Sequence[Path], places: Sequence[Path | None], leaderboard: Path | None
) -> None:
    """Refuses runs of lm_eval that cannot be compared."""
    for folder, place in zip(folders, places, strict=True):
        if place is None:
            raise UsageError(
                f"compare: {folder} is not a run of lm_eval, but another folder is; all must be of"
                " the same kind"
            )
    if len(folders) != 2 or leaderboard is not None:
        raise UsageError("compare: needs exactly two runs of lm_eval, and no leaderboard")


def _write_for_paper(
    table: Path | None,
    wanted: Sequence[str],
    cells: Cells,
    title: str,
    intervals: str,
    run: dict[str, Any],
) -> None:
    """Writes the comparison in LaTeX, if the user asked for it, and the BibTeX entries."""
    if "tex" in wanted and table is not None:
        write_text(table.with_suffix(".tex"), paper.table_of_cells(cells, title, intervals))
        write_text(table.parent / paper.CITATION, paper.bibtex(run))


def _drops_of(table: Path) -> Path:
    """The file of the differences of drops, beside that of a comparison."""
    return table.with_name(f"{table.stem}-drops.csv")


def _claim_for_paper(table: Path, wanted: Sequence[str], drawn: Path) -> None:
    """Refuses to replace files of others beside the table. The figure is beside `drawn`."""
    if table.suffix in (".tex", ".pdf", ".bib"):
        raise UsageError(f"output={table}: must be a CSV file, such as {table.stem}.csv")
    if "tex" in wanted:
        claim_file(table.with_suffix(".tex"), paper.HEAD, "a table of llm-attack")
        claim_file(table.parent / paper.CITATION, paper.BIBTEX.splitlines()[0], "what to cite")
    if "pdf" in wanted and drawn.with_suffix(".pdf").exists() and not drawn.exists():
        raise UsageError(f"output={table}: the figure beside it would replace a file")


def _file(argument: str, given: str | None) -> Path | None:
    """The resolved path of an output file, after a trial that writes it and a figure beside it."""
    if given is None:
        return None
    path = resolved_file(given, argument)
    check_writable(path.parent, path.name, f"{path.stem}.png", argument=argument)
    return path


def _compare_two(
    folders: Sequence[Path],
    compared: Sequence[Result],
    output: Path | None,
    equivalence: float | None,
    pdf: bool = False,
) -> tuple[Cells, pd.DataFrame]:
    """Prints two runs in pairs; returns the table, and the frame of `paired`."""
    a, b = compared
    samples = [run.worst() for run in compared]
    content = samples[0], a.questions, samples[1], b.questions
    known = a.conditions, b.conditions
    frame = with_equivalence(paired(*content, conditions=known), equivalence)
    of_drops = differences(*content, conditions=known)
    records = {"_a": a.run, "_b": b.run}
    frame, of_drops = flagged(frame, records), flagged(of_drops, records)
    text, text_of_drops = tables.csv(frame), tables.csv(of_drops)
    if output is not None:
        claim_file(output, text.splitlines()[0], "a comparison of two runs")
        beside = _drops_of(output)
        claim_file(beside, text_of_drops.splitlines()[0], "a comparison of drops")
        pictures = [beside.with_suffix(f".{form}") for form in ("png", "svg")]
        strange = [path for path in pictures if path.exists() and not beside.exists()]
        if strange:
            raise UsageError(
                f"output={output}: the figure beside it would replace {strange[0]}; must be"
                " another name, such as pair.csv"
            )
    notes = unshared(*content, conditions=known)
    names = [
        f"{folder} ({models.name_of(result.run)})"
        for folder, result in zip(folders, compared, strict=True)
    ]
    failed = flags.notes(dict(zip("ab", (a.run, b.run), strict=True)))
    cells = tables.comparison(frame, (names[0], names[1]), [*notes, *failed])
    Console().print(cells.rich("b against a, accuracy"))
    more = drops.amplitudes(of_drops, a, b)
    if of_drops.empty:
        Console().print(*more, sep="\n", markup=False)
        if output is not None and pdf:
            warn([f"{beside.stem}.pdf: not written, because there are no drops to compare"])
    else:
        Console().print(drops.cells(of_drops, more).rich(drops.TITLE))
    if output is not None:
        write_text(output, text)
        if not of_drops.empty:
            write_text(beside, text_of_drops)
            attempts = Attempts()
            with print_style():
                draw(beside.parent, beside.stem, lambda: drops.figure(of_drops), attempts)
            with attempts(f"{beside.stem}.pdf"), paper_style():
                if pdf:
                    figure = drops.figure(of_drops)
                    paper.save_pdf(figure, beside.with_suffix(".pdf"), drops.TITLE)
            warn(attempts.lines)
    return cells, frame


def _compare_logged(
    places: Sequence[Path], output: Path | None, equivalence: float | None
) -> tuple[Cells, pd.DataFrame]:
    """Prints two runs of lm_eval, question by question; returns the table and its frame."""
    a, b = (logged.load(place) for place in places)
    notes = logged.differences(a, b)
    frame = paired(a.samples, a.questions, b.samples, b.questions)
    frame = with_equivalence(frame, equivalence)
    frame = frame.drop(columns=[name for name in frame if "gold" in name])
    text = tables.csv(frame)
    if output is not None:
        claim_file(output, text.splitlines()[0], "a comparison of two runs")
    for row in frame[frame["task"] == MEAN].to_dict("records"):
        if row["detectable"] == row["detectable"]:
            smallest = f"{row['detectable']:.1f} points"
            notes.append(f"smallest mean difference that this many questions can show: {smallest}")
    notes += unshared(a.samples, a.questions, b.samples, b.questions)
    names = [f"{place} ({run.name})" for place, run in zip(places, (a, b), strict=True)]
    cells = tables.comparison(frame, (names[0], names[1]), notes)
    Console().print(cells.rich("b against a"))
    if output is not None:
        write_text(output, text)
    return cells, frame


def _compare_many(runs: dict[str, Result], output: Path | None, pdf: bool) -> Cells:
    frame = models.across(runs)
    text = tables.csv(frame)
    if output is not None:
        claim_file(output, text.splitlines()[0], "a comparison of three runs or more")
        pictures = [output.with_suffix(f".{form}") for form in ("png", "svg")]
        strange = [path for path in pictures if path.exists() and not output.exists()]
        if strange or output in pictures:
            raise UsageError(
                f"output={output}: the figure beside it would replace {(strange or pictures)[0]};"
                " must be another name, such as models.csv"
            )
    of_pairs = drop_pairs.pairs(runs)
    text_of_pairs = tables.csv(of_pairs)
    if output is not None:
        first_line = text_of_pairs.splitlines()[0]
        claim_file(_drops_of(output), first_line, "a comparison of drops of three runs or more")
    cells = models.cells(frame, models.unshared(runs))
    Console().print(cells.rich("models, accuracy and drop"))
    if len(runs) <= drop_pairs.MOST:
        Console().print(drop_pairs.cells(of_pairs).rich(drop_pairs.TITLE))
    else:
        print(f"differences of drops: not compared; give {drop_pairs.MOST} runs or fewer")
    if output is not None:
        write_text(output, text)
        write_text(_drops_of(output), text_of_pairs)
        attempts = Attempts()
        with print_style():
            draw(output.parent, output.stem, lambda: models.figure(frame), attempts)
        with attempts(f"{output.stem}.pdf"), paper_style():
            if pdf:
                title = "Drop against clean accuracy"
                paper.save_pdf(models.figure(frame), output.with_suffix(".pdf"), title)
        warn(attempts.lines)
    return cells


def transfer(folders: Sequence[Path], output: str | None) -> None:
    """The command `llm-attack transfer`: a matrix of runs with perturbations found before."""
    path = _file("output", output)
    runs = {str(folder): results.load(as_path("folders", folder)) for folder in folders}
    frame = transfers.transfers(runs)
    text = tables.csv(frame)
    if path is not None:
        claim_file(path, text.splitlines()[0], "a table of transfers")
    for title, cells in transfers.matrices(frame).items():
        Console().print(cells.rich(title))
    if path is not None:
        write_text(path, text)
        written(path)


def scaling(folders: Sequence[Path], output: str | None, ceiling: float | None = None) -> None:
    """The command `llm-attack scaling`: a power law of the critical epsilons of several runs."""
    if ceiling is not None and not 0 < ceiling < math.inf:
        raise invalid("ceiling", ceiling, "a number above 0, in RMS of the embeddings")
    path = _file("output", output)
    runs = {str(folder): results.load(as_path("folders", folder)) for folder in folders}
    of_models, laws = scalings.scaling(runs, math.inf if ceiling is None else ceiling)
    text, text_of_laws = tables.csv(of_models), tables.csv(laws)
    if path is not None:
        beside = path.with_name(f"{path.stem}-laws.csv")
        claim_file(path, text.splitlines()[0], "a table of models and critical epsilons")
        claim_file(beside, text_of_laws.splitlines()[0], "a table of power laws")
    for title, cells in scalings.cells(of_models, laws).items():
        Console().print(cells.rich(title))
    if path is not None:
        write_text(path, text)
        write_text(beside, text_of_laws)
        attempts = Attempts()
        draw(path.parent, path.stem, lambda: scalings.figure(of_models), attempts)
        warn(attempts.lines)
        written(path)
