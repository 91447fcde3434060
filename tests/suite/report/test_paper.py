"""The files of a run for a paper: PDF figures, LaTeX, and BibTeX entries."""

import re
import shutil
import zlib
from pathlib import Path

import matplotlib.text
import numpy as np
import pandas as pd
import pytest
import yaml
from report_input import HOSTILE

from llm_attack.base.errors import UsageError
from llm_attack.suite import commands, render, results
from llm_attack.suite.report import paper, tables
from llm_attack.suite.report.layout import paper_style

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "results" / "demo" / "sequence"
MANY = ROOT / "results" / "fig3" / "smollm2-135m-choice"


@pytest.fixture(scope="module")
def demo():
    return results.load(DEMO)


@pytest.fixture(scope="module")
def written(demo, tmp_path_factory):
    """The files of a run for a paper."""
    folder = tmp_path_factory.mktemp("paper")
    assert render.for_paper(demo, folder, ("pdf", "tex")) == []
    return folder


def unescaped(text):
    """The text with commands, braces and escaped letters taken away: what is left must be plain."""
    return re.sub(r"\\[a-zA-Z]+\*?|\\[\\&%$#_{},]|\{\}", "", text)


def check(text):
    """Environments, braces and mathematics are balanced; each row has as many cells."""
    opened = []
    for kind, name in re.findall(r"\\(begin|end)\{([^}]*)\}", text):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert opened == []
    body = re.sub(r"^%.*$", "", text, flags=re.M)
    depth = 0
    for letter in re.sub(r"\\[{}]", "", body):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        assert depth >= 0
    assert depth == 0
    assert re.sub(r"\\\$", "", body).count("$") % 2 == 0
    safe = re.sub(r"\\[\\&%$#_{}]", "", body)
    plain = unescaped(re.sub(r"\$[^$]*\$|\\(?:label|cite|includegraphics|begin|end)"
                             r"(?:\[[^]]*\])?\{[^}]*\}", "", safe))  # fmt: skip
    assert not set(re.sub(r" & ", "", plain)) & set("&%$#_^"), plain
    for columns, inside in re.findall(
        r"\\begin\{tabular\}\{@\{\}([lr]+)@\{\}\}(.*?)\\end\{tabular\}", body, re.S
    ):
        rows = re.findall(r"^ *(.*?) \\\\$", inside, re.M)
        assert rows
        for row in rows:
            assert len(re.split(r"(?<!\\)&", row)) == len(columns), row


@pytest.mark.parametrize("intervals", paper.INTERVALS)
def test_the_table_is_latex_and_holds_the_numbers(demo, intervals):
    text = paper.table_of_run(demo.table, demo.run, intervals)
    check(text)
    for rule in ("toprule", "midrule", "bottomrule"):
        assert f"\\{rule}" in text
    assert text.splitlines()[0] == paper.HEAD
    rows = {line.split(" & ")[0].strip(): line for line in text.splitlines() if " & " in line}
    frame = demo.table.set_index(["task", "condition"])
    for task in demo.table["task"].unique():
        line = rows[paper.escaped(task) if task != "mean" else "Mean"]
        cells = [re.match(r"[\d.]+", cell.strip())[0] for cell in line.split(" & ")[1:-1]]
        accuracies = 100 * frame.loc[task]["acc"]
        assert cells == [f"{x:.1f}" for x in accuracies]
        low, high = frame.loc[(task, "bim@0.01"), ["acc_low", "acc_high"]] * 100
        assert (f"{low:.1f}--{high:.1f}" in text) == (intervals != "none")
        assert (f"({low:.1f}--{high:.1f})" in line) == (intervals == "beside")
    assert "57.6" in rows["Drop (points)"]
    for name in ("detectable", "likelihood", "gold margin"):
        assert name not in text
    assert ("Intervals: 95" in text) == (intervals != "none")


def test_the_caption_says_what_a_reader_must_know(demo):
    text = paper.caption(demo.table, demo.run, [r"\dag"])
    for said in (
        "Accuracy in percent of demo on demo\\_arc\\_challenge, ",
        "$n = 300$ questions each",
        r"white box, $\ell_\infty$ ball of radius $\epsilon$ round each embedding",
        r"loss \texttt{sequence}, which does not know the answer",
        r"Amplitudes $\epsilon$: 0.01 in the units of the embeddings",
        "Iterative attacks take 10 steps",
        r"$^{\dag}$ indistinguishable from guessing (exact test); all at the level 0.05, Holm",
        r"\cite{llm_attack}",
    ):
        assert said in text
    assert "below guessing" not in text
    many = results.load(MANY)
    text = paper.table_of_run(many.table, many.run)
    check(text)
    assert "which knows the answer" in text and "For each attack, the largest" in text
    assert "0.002, 0.007, 0.02 and 0.07 in units of the root mean square" in text
    assert "0.07 RMS" in text and "0.002 RMS" not in text


def test_marks_are_those_of_the_other_table(demo):
    text = paper.table_of_run(demo.table, demo.run)
    cells = tables.accuracies(demo.table, intervals=False)
    signs = {r"\dag": "†", r"\ddag": "‡", r"\S": "§"}
    rows = [line.split(" & ") for line in text.splitlines() if "demo\\_" in line and " & " in line]
    for row, other in zip(rows, cells.rows, strict=False):
        for cell, expected in zip(row[1:-1], other[2:-1], strict=True):
            marks = re.search(r"\$\^\{(.*)\}\$", cell)
            found = re.findall(r"\\[a-zA-Z]+", marks[1]) if marks else []
            found = "".join(signs[mark] for mark in found)
            assert found == re.sub(r"[\d.]", "", expected)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_becomes_a_command(demo, text):
    run = {**demo.run, "model_name": f"m {text}"}
    table = demo.table.replace({"task": {"demo_piqa": f"t {text}"}})
    check(paper.table_of_run(table, run))


def test_specials_are_escaped():
    assert paper.escaped(r"50% of a_b & {c} #1 $x ~y ^z \n") == (
        r"50\% of a\_b \& \{c\} \#1 \$x \textasciitilde{}y \textasciicircum{}z \textbackslash{}n"
    )


def test_figures_have_a_columns_width_and_whole_fonts(written):
    names = sorted(path.stem for path in written.glob("*.pdf"))
    assert names == ["calibration", "cosine", "figure", "margin"]
    for name in names:
        content = (written / f"{name}.pdf").read_bytes()
        assert content.startswith(b"%PDF-")
        (box,) = re.findall(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+) ?\]", content)
        assert float(box[0]) == 252  # points: 3.5 inches
        assert b"/FontFile2" in content and b"/Type3" not in content
        assert b"CreationDate" not in content
        drawn = b"".join(zlib.decompress(part) for part in streams(content))
        sizes = set(re.findall(rb"/F\d+ ([\d.]+) Tf", drawn))
        assert sizes == {b"8"}


def streams(content):
    """Those of a PDF file that draw."""
    for start in re.finditer(rb"stream\r?\n", content):
        part = zlib.decompressobj()
        try:
            if b" Tf" in part.decompress(content[start.end() :]):
                yield content[start.end() :].partition(b"\nendstream")[0]
        except zlib.error:
            continue


def test_equal_runs_give_equal_files(demo, written, tmp_path):
    render.for_paper(demo, tmp_path, ("pdf", "tex"))
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in written.iterdir()}
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_figures_of_latex_are_those_that_were_drawn(written):
    text = (written / "figures.tex").read_text()
    check(text)
    found = re.findall(r"\\includegraphics\[width=\\columnwidth\]\{(.*?)\}", text)
    assert set(found) == {path.name for path in written.glob("*.pdf")}
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(set(labels)) == len(found)


def test_what_to_cite_is_that_of_the_citation_file(demo, written):
    text = (written / paper.CITATION).read_text()
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert set(re.findall(r"@(\w+)\{(\w+),", text)) == {
        ("software", "llm_attack"),
        ("misc", "zhang2022uncertainty"),
    }
    assert text.count("{") == text.count("}")
    fields = re.sub(r"^@\w+\{\w+,$", "", text, flags=re.M)
    assert not re.search(r"(?<!\\)[_&%#$]", fields)  # LaTeX takes them as commands
    (article,) = cff["references"]
    flat = " ".join(text.split())
    assert article["title"] in flat and str(article["year"]) in flat and article["url"] in flat
    names = [f"{who['family-names']}, {who['given-names']}" for who in article["authors"]]
    assert " and ".join(names) in flat
    assert " ".join(cff["abstract"].split()).rstrip(".") in flat
    assert f"version = {{{demo.run['versions']['llm-attack']}}}" in flat
    assert f"license = {{{cff['license']}}}" in flat


def test_the_citation_file_is_valid():
    """By its own program, where that is installed; else what its schema requires."""
    path = ROOT / "CITATION.cff"
    cff = yaml.safe_load(path.read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cff.keys()
    assert cff["cff-version"] == "1.2.0" and cff["type"] in ("software", "dataset")
    for person in (*cff["authors"], *(a for of in cff["references"] for a in of["authors"])):
        assert person.keys() in ({"name"}, {"family-names", "given-names"})
    assert all({"type", "title", "authors"} <= of.keys() for of in cff["references"])
    cffconvert = pytest.importorskip("cffconvert")
    cffconvert.Citation(path.read_text("utf-8")).validate()


# ---- as functions and commands


def test_a_figure_is_a_function_of_a_result(demo):
    sizes = {}
    for name in ("bars", "margins", "cosines"):
        figure = demo.figure(name)
        assert isinstance(figure, matplotlib.figure.Figure)
        small = demo.figure(name, paper=True)
        letters = [t.get_fontsize() for t in small.findobj(matplotlib.text.Text) if t.get_text()]
        assert small.get_figwidth() == 3.5 and set(letters) == {8}
        sizes[name] = figure.get_figwidth()
    assert sizes["bars"] > 3.5
    heights = [bar.get_height() for axes in demo.figure("bars").axes for bar in axes.containers[0]]
    clean = demo.table[(demo.table["condition"] == "none") & (demo.table["task"] != "mean")]
    np.testing.assert_allclose(heights, clean["acc"])
    with pytest.raises(UsageError, match="figure=curves: the run has no data for it"):
        demo.figure("curves")
    with pytest.raises(UsageError, match=r"figure=bar.*bars"):
        demo.figure("bar")


def shown(axes):
    """The labels of the ticks that lie on the y axis. Matplotlib makes some beyond its ends."""
    low, high = axes.get_ylim()
    return [t for t in axes.get_yticklabels() if low <= t.get_position()[1] <= high]


@pytest.mark.slow
def test_letters_do_not_overlap_in_a_column(demo):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for result, names in ((demo, ("bars", "cosines")), (results.load(MANY), ("curves",))):
        for name in names:
            with paper_style():
                figure = result.figure(name, paper=True)
                canvas = FigureCanvasAgg(figure)
                canvas.draw()
                renderer = canvas.get_renderer()
                texts = [t for a in figure.axes for t in (*a.get_xticklabels(), a.title)]
                texts += [t for a in figure.axes for t in (*shown(a), a.yaxis.label)]
                texts += [t for a in figure.axes for t in a.texts]
                boxes = [t.get_window_extent(renderer) for t in texts if t.get_text()]
            for i, box in enumerate(boxes):
                assert not any(box.shrunk(0.96, 0.85).overlaps(b) for b in boxes[i + 1 :]), name


@pytest.mark.slow
def test_the_command_report(tmp_path, capsys):
    folder = shutil.copytree(DEMO, tmp_path / "run")
    commands.report(folder, None, "tex", "none")
    assert {"table.tex", "llm_attack.bib", "report.html"} <= {p.name for p in folder.iterdir()}
    assert not list(folder.glob("*.pdf")) and not (folder / "figures.tex").exists()
    assert "--" not in re.search(r"arc\\_easy.*", (folder / "table.tex").read_text())[0]
    with pytest.raises(UsageError, match="format=doc"):
        commands.report(folder, None, "doc")


def test_the_command_compare(tmp_path, capsys):
    a, b = DEMO, ROOT / "results" / "demo" / "choice"
    output = tmp_path / "ab.csv"
    commands.compare([a, b], str(output), None, None, "tex", "beside")
    text = (tmp_path / "ab.tex").read_text()
    check(text)
    frame = pd.read_csv(output)
    row = frame[(frame["task"] == "demo_piqa") & (frame["condition"] == "none")].iloc[0]
    assert f"demo\\_piqa & none & 300 & 0 & {row['acc_a']:.3f}" in text
    assert (tmp_path / "llm_attack.bib").exists()
    commands.compare([a, b], str(output), None, None, "tex", "none")
    assert " to " not in (tmp_path / "ab.tex").read_text().split("toprule")[1]
    for formats, given, said in (
        ("tex", None, "needs output"),
        ("tex", str(tmp_path / "x.tex"), "must be a CSV file"),
    ):
        with pytest.raises(UsageError, match=said):
            commands.compare([a, b], given, None, None, formats)
    (tmp_path / "cd.tex").write_text("my thesis\n")
    with pytest.raises(UsageError, match="is not a table of llm-attack"):
        commands.compare([a, b], str(tmp_path / "cd.csv"), None, None, "tex")
    assert (tmp_path / "cd.tex").read_text() == "my thesis\n"


@pytest.mark.slow
def test_compare_of_many_has_a_figure(tmp_path, capsys):
    runs = [ROOT / "results" / "fig3" / f"smollm2-135m{end}" for end in ("", "-1000", "-bim")]
    output = tmp_path / "models.csv"
    commands.compare(runs, str(output), None, None, "pdf,tex")
    check((tmp_path / "models.tex").read_text())
    assert (tmp_path / "models.pdf").read_bytes().startswith(b"%PDF-")
