"""A failure at the end of a run is one line. Its numbers are stored, and can be shown again."""

import errno
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from invented import build
from matplotlib.text import Text

from llm_attack.base import drawing
from llm_attack.base.errors import UsageError
from llm_attack.base.failures import Attempts
from llm_attack.cli import main
from llm_attack.suite import evaluate, render, results
from llm_attack.suite.analysis import critical
from llm_attack.suite.analysis.summary import summarise
from llm_attack.suite.analysis.worst import with_worst
from llm_attack.suite.report import figures, tables
from llm_attack.suite.report.layout import Unit, legible, print_style, unit_of, wrapped
from llm_attack.suite.results import Result
from llm_attack.suite.studies import claims, models, revisions, sanity, survival
from llm_attack.suite.studies import hookpoints as layers

CONDITIONS = {"none": 3.0, "fgsm@0.1": 1.0, "fgsm@0.2": 0.5, "critical@0.2": 0.0}

# What is replaced by something that fails, the name in the line, and what is not written then.
FAULTS = {
    "bars": (figures, "figure figure", {"figure.svg"}),
    "curves": (figures, "figure epsilon", {"epsilon.svg"}),
    "margins": (figures, "figure margin", {"margin.svg"}),
    "cosines": (figures, "figure cosine", {"cosine.svg"}),
    "figure": (survival, "figure survival", {"survival.svg"}),
    "figure of layers": (layers, "figure layers", {"layers.svg"}),
    "save": (survival, "critical.md", {"critical.md", "critical.csv", "foretold.csv"}),
    "save of layers": (layers, "layers.md", {"layers.md"}),
    "save of tables": (tables, "table.csv", {"table.csv", "table.md"}),
    "claims": (claims, claims.TITLE, set()),
    "checks": (sanity, sanity.TITLE, set()),
    "with_worst": (results, "worst", set()),
    "write_report": (render, "report.html", {"report.html"}),
    "as_json": (evaluate, "lm_eval/results_none.json", {"lm_eval/results_none.json"}),
}


def made_up(hookpoints=("embed", "h.0", "h.1")):
    """A run that never was, of several hookpoints."""
    samples, questions = build({"a": (12, 4), "b": (12, 2)}, CONDITIONS)
    samples["cluster"] = questions["cluster"] = None
    searched = samples["attack"] == "critical"
    samples["critical_epsilon"] = np.where(searched, 0.1, np.nan)
    samples["first_order"] = np.where(samples["attack"] == "none", samples.index * 0.1, np.nan)
    parts = [samples.assign(hookpoint=hookpoints[0])]
    for place in hookpoints[1:]:
        others = samples[samples["attack"] != "none"]
        parts.append(others.assign(hookpoint=place, condition=others["condition"] + f"@{place}"))
    samples = pd.concat(parts, ignore_index=True)
    samples = samples.astype({"prediction_norm": "Int64", "cluster": "Int64"})
    questions = questions.astype({"cluster": "Int64"})
    names = samples["condition"].unique()
    infos = {name: {"attack": name.partition("@")[0], "epsilon": 0.1} for name in names}
    run = {
        "settings": {"loss": "margin"},
        "attacks": infos,
        "model": "m",
        "model_name": "m",
        "fingerprint": {},
    }
    run |= {"equivalence": None, "warnings": []}
    table = summarise(with_worst(samples, run), infos)
    return Result(table, samples, questions, run, {"none": {"results": {}}})


def files(folder):
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def stub(figure, folder, name, title=None):
    """In place of drawing, which takes long."""
    axes = figure.axes[0]
    (folder / f"{name}.svg").write_text(f"{axes.get_ylabel()}{len(axes.lines)}{len(figure.axes)}")


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(drawing, "save_figure", stub)
    monkeypatch.setattr(critical, "RESAMPLES", 20)


def fail(*_, **__):
    raise ValueError("$x is no mathtext\nand this is its second line")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of which nothing failed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "save_figure", stub)
        patch.setattr(critical, "RESAMPLES", 20)
        assert evaluate.save(made_up(), folder, ["llm-attack", "run"]) == []
    return folder


@pytest.fixture
def whole(undrawn, finished):
    """Its files."""
    found = files(finished)
    assert set.union(*(lost for _, _, lost in FAULTS.values())) <= set(found)
    return found


@pytest.mark.sampled(7)
@pytest.mark.parametrize("fault", FAULTS)
def test_one_that_fails_is_a_line_and_the_others_are_there(fault, whole, tmp_path, monkeypatch):
    module, name, lost = FAULTS[fault]
    with monkeypatch.context() as patch:
        patch.setattr(module, fault.partition(" ")[0], fail)
        lines = evaluate.save(made_up(), tmp_path / "run", ["llm-attack", "run"])
    (line,) = lines
    assert line.startswith(name) and line.endswith(": ValueError: $x is no mathtext")
    found = files(tmp_path / "run")
    assert set(whole) - set(found) == lost
    same = {name for name in found if found[name] == whole[name]}
    told_in_page = set() if fault == "as_json" else {"report.html"}
    # without the worst case there is less to draw and to tell
    assert set(found) - same <= told_in_page | ({"margin.svg"} if fault == "with_worst" else set())
    if "report.html" in set(found) - same and fault != "write_report":
        assert "$x is no mathtext" in found["report.html"].decode()
    if fault == "as_json":
        return  # is no part of what is told from the samples
    done = CliRunner().invoke(main, ["report", str(tmp_path / "run")])
    assert done.exit_code == 0 and "warning" not in done.output
    assert files(tmp_path / "run") == whole


def test_report_says_what_it_could_not_make(whole, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "whole")
    monkeypatch.setattr(figures, "margins", fail)
    done = CliRunner().invoke(main, ["report", str(tmp_path / "whole")])
    assert done.exit_code == 0
    assert "warning: figure margin could not be made: ValueError: $x is no mathtext" in done.output
    assert {**files(tmp_path / "whole"), "report.html": b""} == {**whole, "report.html": b""}


def test_a_machine_that_fails_is_no_line():
    """A full disk is full for the rest as well, and what is finished is kept."""
    attempts = Attempts()
    for error in (OSError(errno.ENOSPC, "full"), OSError(errno.EROFS, "read-only"), MemoryError()):
        with pytest.raises(type(error)), attempts("a figure"):
            raise error
    with pytest.raises(KeyboardInterrupt), attempts("a figure"):
        raise KeyboardInterrupt
    assert attempts.lines == []
    for error in (FileNotFoundError(errno.ENOENT, "gone"), OSError("no font"), RuntimeError()):
        with attempts("b"):
            raise error
    kinds = [line.split(": ")[1] for line in attempts.lines]
    assert kinds == ["FileNotFoundError", "OSError", "RuntimeError"]


def test_what_saving_needs_is_tried_before_the_model_is_loaded(tmp_path, monkeypatch):
    def loaded(*_):
        raise AssertionError

    monkeypatch.setattr("llm_attack.suite.evaluate.prepare", loaded)
    monkeypatch.setattr(drawing, "save_figure", fail)
    arguments = ["run", "--model", "demo", "--tasks", "demo_piqa", "-o", str(tmp_path / "run")]
    done = CliRunner().invoke(main, arguments)
    assert isinstance(done.exception, UsageError) or done.exit_code == 2
    text = str(done.exception) + done.output
    assert "a figure could not be made: ValueError: $x is no mathtext" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_of_which_a_figure_fails(tmp_path, monkeypatch):
    words = ["run", "--model", "demo", "--tasks", "demo_piqa", "--limit", "4", "--attacks"]
    words += ["none,fgsm", "--device", "cpu", "--progress", "quiet", "-o"]
    with monkeypatch.context() as patch:
        patch.setattr(figures, "bars", fail)
        done = CliRunner().invoke(main, [*words, str(tmp_path / "run[/x]")])
    assert done.exit_code == 0, done.output
    assert "warning: figure figure could not be made: ValueError: $x" in done.output
    names = set(files(tmp_path / "run[/x]"))
    assert {"samples.parquet", "table.csv", "run.json", "report.html", "margin.png"} <= names
    assert "figure.png" not in names
    again = CliRunner().invoke(main, ["report", str(tmp_path / "run[/x]")])
    assert again.exit_code == 0 and f"written: {tmp_path}/run[/x]" in again.output.replace("\n", "")
    assert "figure.png" in files(tmp_path / "run[/x]")


def test_figures_of_several_runs_lose_no_table(tmp_path, monkeypatch, undrawn):
    monkeypatch.setattr(revisions, "figure", fail)
    frame = pd.DataFrame({"model": ["a"], "acc": [0.5]})
    (line,) = revisions.save(frame, tmp_path)
    assert line.startswith("figure revisions could not be made: ValueError")
    assert (tmp_path / "revisions.csv").read_text() == "model,acc\na,0.500000\n"


def test_a_figure_of_an_experiment_that_fails_is_a_line(tmp_path, capsys):
    with drawing.new_figure(tmp_path, (2, 2), "fig") as figure:
        figure.subplots().set_title("$\\nosuch$")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}: figure fig could not be made: ValueError: ")
    assert not list(tmp_path.iterdir())


def test_figures_that_there_is_no_data_for_are_removed(tmp_path, undrawn):
    (tmp_path / "survival.png").write_text("of another version")
    samples, _ = build({"a": (5, 4)}, {"none": 1.0})
    assert not drawing.draw(tmp_path, "survival", lambda: survival.figure(samples))
    assert not list(tmp_path.iterdir())


STRANGE = (
    "$",
    "a$b$c",
    "$\\frac{",
    "_x",
    "a_b^{c",
    "\\",
    "%s",
    "a\x00b",
    "a\x1bb",
    "\ufffe",
    " ",
    "<&>",
)


@pytest.mark.filterwarnings("error")
@pytest.mark.slow
def test_names_are_drawn_as_they_are(tmp_path):
    """Of tasks, conditions and models, whatever matplotlib, SVG or UTF-8 would make of them."""
    conditions = {"none": 2.0, "fgsm@0.1": 1.0, "fgsm@0.2": 1.0, "critical@0.2": 1.0}
    samples, _ = build({name: (3, 4) for name in STRANGE}, conditions)
    samples["critical_epsilon"] = np.where(samples["attack"] == "critical", 0.1, np.nan)
    renamed = {name: f"{name}@$h_{{0}}^\\x" for name in conditions if name != "none"}
    samples["condition"] = samples["condition"].replace(renamed)
    table = summarise(samples)
    drawn = figures.draw_all(samples, table, tmp_path)
    assert drawn == ["figure", "epsilon", "margin", "cosine"]
    with print_style():
        assert drawing.draw(tmp_path, "survival", lambda: survival.figure(samples))
    for name in ("epsilon", "survival", "figure"):
        tree = ET.parse(tmp_path / f"{name}.svg")  # which is XML
        shown = "".join(tree.getroot().itertext()).replace("\n", "")
        for text in ("$\\frac{", "a_b^{c", "%s", "<&>", "a\ufffdb"):
            assert text in shown.replace(" ", ""), (name, text)
    legend = "".join(ET.parse(tmp_path / "figure.svg").getroot().itertext())
    assert "fgsm@0.1@$h_{0}^\\x" in legend


def test_models_are_in_the_legend_whatever_they_begin_with():
    assert [legible(name) for name in ("_m", "m_", "$m$", "a\udc80")] == [
        " _m",
        "m_",
        "$m$",
        "a\ufffd",
    ]
    ends = [f"{name}{end}" for name in ("clean", "drop") for end in ("_low", "_high")]
    columns = ["model", "condition", "n", "clean", *ends[:2], "acc", "drop", *ends[2:]]
    row = ["c", 9, 0.5, 0.4, 0.6, 0.3, 20.0, 10.0, 30.0]
    frame = pd.DataFrame([[name, *row] for name in ("_a", "$b")], columns=columns)
    drawn = models.figure(frame.assign(epsilon_relative=0.1))
    (legend,) = drawn.legends
    assert [text.get_text().strip() for text in legend.get_texts()] == ["_a", "$b"]


@pytest.mark.parametrize("letters, width", [("测试任务名称", 8), ("abcdefghijkl", 6)])
def test_wide_letters_take_the_room_of_two(letters, width):
    lines = wrapped(letters, width).split("\n")
    assert "".join(lines) == letters
    assert max(map(len, lines)) == (width // 2 if letters[0] > "z" else width)


def font_with(letters, path):
    """A font that has a square for each of these letters."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", *(f"glyph{i}" for i in range(len(letters)))]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap(dict(zip(map(ord, letters), names[1:], strict=True)))
    font.setupGlyf(dict.fromkeys(names, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("installed", [True, False])
def test_letters_that_the_usual_font_lacks(installed, tmp_path, monkeypatch):
    """Are of a font that has them, if one is installed; no warning in either case."""
    import matplotlib.font_manager

    paths = []
    if installed:
        paths = [tmp_path / "LlmAttackFew.ttf", tmp_path / "LlmAttackMany.ttf", tmp_path / "no.ttf"]
        font_with("测", paths[0])
        font_with("测试", paths[1])
        paths[2].write_bytes(b"no font")
    monkeypatch.setattr(matplotlib.font_manager, "findSystemFonts", lambda: list(map(str, paths)))
    drawing._fonts_for.cache_clear()
    samples, _ = build({"测试_x": (5, 4)}, {"none": 1.0})
    with print_style():
        figure = figures.bars(summarise(samples))
        drawing.save_figure(figure, tmp_path)
    drawing._fonts_for.cache_clear()
    assert "测试_x" in (tmp_path / "figure.svg").read_text("utf-8")
    texts = [text for text in figure.findobj(Text) if text.get_text() == "测试_x"]
    assert texts
    for names in (text.get_fontfamily() for text in texts):
        assert ("LlmAttackMany" in names) == installed and "LlmAttackFew" not in names


def info(unit, epsilon, absolute, attack="fgsm"):
    return {
        "attack": attack,
        "epsilon_unit": unit,
        "epsilon": epsilon,
        "epsilon_absolute": absolute,
    }


def test_the_unit_is_the_users():
    clean = info("absolute", 0.01, 0.01, "none")
    rms = {"none": clean, "a": info("rms", 0.0, 0.0), "b": info("rms", 0.5, 0.015)}
    name, size = unit_of({"attacks": rms})
    assert name == " (rms)" and size == pytest.approx(0.03)
    assert unit_of({"attacks": {"none": clean, "a": info("absolute", 0.1, 0.1)}}) == ("", 1.0)
    both = {**rms, "c": info("absolute", 0.1, 0.1)}
    assert unit_of({"attacks": both}) == (" (absolute; given in absolute and rms)", 1.0)
    assert unit_of({"attacks": {"none": clean}}) == unit_of({}) == ("", 1.0)
    assert unit_of({"attacks": {"a": info("rms", 0.0, 0.0)}}) == ("", 1.0)


def test_epsilons_are_shown_in_it(undrawn, tmp_path, monkeypatch):
    """In the figures of a run; a search for the smallest epsilon is no curve of accuracy."""
    seen = {}
    monkeypatch.setattr(
        drawing, "save_figure", lambda f, d, name, _: (seen.update({name: f}), stub(f, d, name))
    )
    result = made_up(("embed",))
    infos = {
        name: info("rms", float(name.partition("@")[2] or 0) / 0.05, 0.0, name.partition("@")[0])
        for name in result.run["attacks"]
    }
    for name, of in infos.items():
        of["epsilon_absolute"] = float(name.partition("@")[2] or 0)
    render.render(
        replace(result, run={**result.run, "attacks": infos}),
        tmp_path,
        {**result.run, "attacks": infos},
    )
    for name in ("epsilon", "survival"):
        assert seen[name].get_supxlabel() == "epsilon (rms)"
    lines = {line.get_label(): line for line in seen["epsilon"].axes[0].get_lines()}
    assert set(lines) == {"fgsm", "worst", "random guess"}
    # at the smaller epsilon fgsm was alone: the worst case is no straight line from 0 past it
    assert lines["worst"].get_xdata() == pytest.approx([4])
    assert lines["fgsm"].get_xdata() == pytest.approx([0, 2, 4])
    (curve,) = seen["survival"].axes[0].get_lines()
    assert curve.get_xdata() == pytest.approx([0, 2, 4])
    assert curve.get_ydata() == pytest.approx([1, 0, 0])


LINEAR = [0.01 * i for i in range(1, 9)]
WIDE = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.11, 1e30]


@pytest.mark.parametrize("epsilons, tasks", [([0.01], 2), (LINEAR, 1), (LINEAR, 6), (WIDE, 2)])
@pytest.mark.sampled(2)
def test_ticks_do_not_overlap(epsilons, tasks):
    attacks = ("fgsm", "critical")
    conditions = {"none": 2.0} | {f"{name}@{e:g}": 1.0 for e in epsilons for name in attacks}
    samples, _ = build({f"t{i}": (3, 4) for i in range(tasks)}, conditions)
    searched = samples["condition"] == f"critical@{max(epsilons):g}"
    samples["critical_epsilon"] = np.where(searched, min(epsilons) / 2, np.nan)
    unit = Unit(" (token_norm)", 0.3)
    table = summarise(samples)
    with print_style():
        drawn = figures.curves(table, unit), survival.figure(samples, unit)
        assert (drawn[0] is None) == (len(epsilons) == 1)
        for figure in filter(None, drawn):
            figure.draw_without_rendering()
            for axes in figure.axes:
                labels = [label for label in axes.get_xticklabels() if label.get_text()]
                boxes = [label.get_window_extent() for label in labels if label.get_visible()]
                ends = sorted((box.x0, box.x1) for box in boxes)
                assert all(one[1] <= two[0] for one, two in pairwise(ends))
            shown = {label.get_text() for label in figure.axes[-1].get_xticklabels()}
            assert {"0", f"{max(epsilons) / 0.3:.3g}"} <= shown
