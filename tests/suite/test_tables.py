"""Tables: content of the cells, marks and their notes, bytes that do not vary."""

import io
import re

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from llm_attack.suite.analysis import equivalence, pairs, summary
from llm_attack.suite.report import tables
from llm_attack.suite.report.words import in_words

CONDITIONS = {
    "none": 3.0,
    "random@0.01": 2.99,
    "fgsm@0.01": 1.2,
    "bim@0.01": -0.1,
    "pgd@0.01": -3.0,
}


@pytest.fixture
def table(frames):
    samples, _ = frames({"some_task": (200, 4), "another": (120, 2)}, CONDITIONS)
    return summary.summarise(samples)


def cell(table, task, condition):
    row = table[(table["task"] == task) & (table["condition"] == condition)]
    return row.iloc[0]


def test_cells_of_a_run(table):
    cells = tables.accuracies(table)
    assert cells.heading == ["task", "n", *CONDITIONS, "baseline"]
    under = {"mean drop, points": "drop", "detectable, points": "detectable"}
    under |= {"right → wrong": "lost", "wrong → right": "gained"}
    under |= {"p(gold) drop": "gold_probability_drop", "likelihood, nats": "log_likelihood_change"}
    under |= {"gold margin, nats": "margin_change"}
    assert [row[0] for row in cells.rows] == ["some_task", "another", "mean", *under]
    assert [row[1] for row in cells.rows] == ["200", "120", "320", *[""] * 7]
    assert [row[-1] for row in cells.rows] == ["0.250", "0.500", "0.375", *[""] * 7]
    for row in cells.rows[:3]:
        for condition, text in zip(CONDITIONS, row[2:-1], strict=True):
            it = cell(table, row[0], condition)
            value, ends = text.split(" ")
            assert value.rstrip("†‡§") == f"{it['acc']:.3f}"
            assert ends == f"({it['acc_low']:.3f}–{it['acc_high']:.3f})"
    forms = (".1f", ".1f", "d", "d", ".1f", "+.2f", "+.2f")
    columns = zip(under.values(), forms, strict=True)
    for row, (column, form) in zip(cells.rows[3:], columns, strict=True):
        values = [cell(table, "mean", c) for c in CONDITIONS]
        ends = [
            f" ({of[f'{column}_low']:.1f} to {of[f'{column}_high']:.1f})"
            if column.endswith("drop")
            else ""
            for of in values[1:]
        ]
        shown = [format(of[column], form) for of in values[1:]]
        assert row[2:-1] == ["–", *map("".join, zip(shown, ends, strict=True))]


def test_units_of_the_rms_are_told(frames):
    """Beside a name such as fgsm@0.7rms, what that is, and its signal to noise."""
    samples, _ = frames({"some_task": (9, 4)}, {"none": 3.0, "fgsm@0.07": 1.0, "fgsm@0.02": 2.0})
    plain = tables.means(summary.summarise(samples))
    assert "epsilon" not in plain and "signal/noise, dB" not in plain
    samples = samples.replace({"condition": {"fgsm@0.07": "fgsm@0.5rms"}})
    attacks = {"none": {}, "fgsm@0.5rms": {"snr_db": 6.02}, "fgsm@0.02": {"snr_db": 16.9}}
    table = summary.summarise(samples, attacks)
    found = tables.means(table)
    assert found["epsilon"]["fgsm@0.5rms"] == "0.07"
    assert found["signal/noise, dB"] == {"none": "–", "fgsm@0.5rms": "6.0", "fgsm@0.02": "16.9"}
    (_, said) = in_words(table)
    assert "FGSM at 0.02 to 0.5 RMS: " in said


def test_marks_are_the_verdicts(table):
    """Each mark stands exactly where its test says so, and is explained only if it stands."""
    cells = tables.accuracies(table)
    found = set()
    for row in cells.rows[:2]:
        for condition, text in zip(CONDITIONS, row[2:-1], strict=True):
            it = cell(table, row[0], condition)
            assert ("†" in text) == (it["verdict"] == "indistinguishable from guessing")
            assert ("‡" in text) == (it["verdict"] == "below guessing")
            assert ("§" in text) == (condition != "none" and it["p_mcnemar_holm"] > 0.05)
            found |= set(text) & set("†‡§")
    assert found == set("†‡§")
    assert [note[0] for note in cells.notes[4:]] == ["†", "‡", "§"]
    assert "indistinguishable from guessing" in cells.notes[4]
    assert not set("†‡") & set("".join(cells.rows[2]))
    for condition, text in zip(list(CONDITIONS)[1:], cells.rows[2][3:-1], strict=True):
        assert ("§" in text) == (cell(table, "mean", condition)["p_mcnemar"] > 0.05)
    adjusted = table.assign(p_mcnemar=0.03, p_mcnemar_holm=0.06, verdict="above guessing")
    assert all(text[5] == "§" for text in tables.accuracies(adjusted).rows[0][2:-1])
    clean = tables.accuracies(table, conditions=["none"])
    assert len(clean.notes) == 1 and clean.heading == ["task", "n", "none", "baseline"]


def test_markdown(table):
    text = tables.markdown_of_run(table)
    lines = text.split("\n")
    assert lines[0] == "| task | n | " + " | ".join(CONDITIONS) + " | baseline |"
    assert lines[1] == "| --- |" + " ---: |" * 7
    first = cell(table, "some_task", "none")
    interval = f"({first['acc_low']:.3f}–{first['acc_high']:.3f})"
    assert lines[2].startswith(f"| some_task | 200 | {first['acc']:.3f} {interval} |")
    accuracies, normed, changes = text.split("\n| task ")
    for part, columns in ((accuracies, 9), (f"| task {normed}", 9), (f"| task {changes}", 11)):
        assert {line.count("|") for line in part.split("\n") if line.startswith("|")} == {columns}
    assert "- † indistinguishable from guessing" in text
    assert "- acc_norm (95 % interval)" in text
    assert f"| {first['acc_norm']:.3f} ({first['acc_norm_low']:.3f}–" in normed
    assert not set("†‡§") & set(normed)


def test_changes(table):
    """Both directions, drops with intervals and p-values, of each task and the mean; no `none`."""
    cells = tables.changes(table)
    rows = {(row[0], row[1]): row[2:] for row in cells.rows}
    assert list(rows) == [
        (task, name) for task in ("some_task", "another", "mean") for name in [*CONDITIONS][1:]
    ]
    for (task, condition), shown in rows.items():
        it = cell(table, task, condition)
        drops = [
            f"{it[of]:.1f} ({it[f'{of}_low']:.1f} to {it[f'{of}_high']:.1f})"
            for of in ("drop", "gold_probability_drop")
        ]
        p_values = [f"{it[of]:.2g}" for of in ("p_mcnemar_holm", "p_gold_probability")]
        counts = [f"{it[of]}" for of in ("n", "clusters", "lost", "gained")]
        assert shown == [*counts, drops[0], p_values[0], drops[1], p_values[1]]
    assert tables.changes(table[table["condition"] == "none"]) is None


def test_without_acc_norm_and_none(frames):
    samples, _ = frames({"a": (9, 4)}, {"fgsm@1": 0.0}, norm=False)
    text = tables.markdown_of_run(summary.summarise(samples))
    assert "acc_norm" not in text and "mean drop" not in text and "nan" not in text


def test_acc_norm_of_some_tasks(frames):
    """A task without acc_norm, and the mean then, show a dash."""
    both = pd.concat([frames({"a": (9, 4)})[0], frames({"b": (9, 4)}, norm=False)[0]])
    cells = tables.accuracies(summary.summarise(both), "acc_norm")
    assert [set(row[2:-1]) == {"–"} for row in cells.rows] == [False, True, True]


def printed(renderable, width):
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize(
    "width, intervals, parts", [(120, True, 1), (80, False, 1), (60, False, 2)]
)
def test_terminal(table, width, intervals, parts):
    """The intervals give way first, then conditions move below."""
    text = printed(tables.RunTable(table, "a title"), width)
    assert text.count("a title") == 1 and text.count("some_task") == parts
    assert text.count("† ind") == 1
    for condition in CONDITIONS:
        it = cell(table, "some_task", condition)
        assert f"{it['acc']:.3f}" in text
        assert (f"{it['acc_low']:.3f}–{it['acc_high']:.3f}" in text) == intervals
    lines = text.split("\n")
    (above, *_) = [lines[i - 1] for i, line in enumerate(lines) if line.startswith(" mean ")]
    assert set(above) == {" ", "─"}


def test_terminal_cuts_nothing(table):
    for width in range(46, 110, 3):
        text = printed(tables.RunTable(table, ""), width)
        assert "…" not in text and max(map(len, text.split("\n"))) <= width
        for condition in CONDITIONS:
            assert f"{cell(table, 'another', condition)['acc']:.3f}" in text


def test_comparison(frames):
    a = frames(
        {"some_long_task": (50, 4), "another": (40, 2)}, {"none": 3.0, "fgsm@0.1": 1.0}, seed=1
    )
    b = frames(
        {"some_long_task": (50, 4), "another": (40, 2)}, {"none": 2.0, "bim@0.1": 1.0}, seed=2
    )
    b[1].loc[:4, "doc_hash"] = "other"
    frame = pairs.paired(*a, *b)
    cells = tables.comparison(frame, ("runs/a", "runs/b"), pairs.unshared(*a, *b))
    assert [row[:4] for row in cells.rows] == [
        ["some_long_task", "none", "45", "5"],
        ["another", "none", "40", "0"],
        ["mean", "none", "85", "5"],
    ]
    row = frame.iloc[0]
    assert cells.rows[0][4:] == [
        f"{row['acc_a']:.3f}",
        f"{row['acc_b']:.3f}",
        f"{row['difference']:+.1f} ({row['difference_low']:+.1f} to {row['difference_high']:+.1f})",
        f"{row['p_mcnemar_holm']:.2g}",
    ]
    assert cells.rows[2][-1] == f"{frame['p_mcnemar_holm'].iloc[2]:.2g}"
    assert "a: runs/a; b: runs/b" in cells.notes[0]
    assert cells.notes[-1] == "conditions only in run b: bim@0.1"
    for width in (60, 80):
        text = printed(cells.rich("two runs"), width)
        assert "…" not in text and f"{row['difference']:+.1f}" in text
        assert max(map(len, text.split("\n"))) <= width


def test_csv(table):
    """Six decimals, six digits of p-values and epsilons, whole counts, empty where null."""
    text = tables.csv(table)
    assert text == tables.csv(table.copy()) and "\r" not in text
    back = pd.read_csv(io.StringIO(text))
    assert list(back) == list(table)
    for column in table.select_dtypes("number"):
        got, expected = back[column].to_numpy(float), table[column].astype(float).to_numpy()
        small = column.startswith("p_") or column == "epsilon"
        np.testing.assert_allclose(
            got, expected, rtol=1e-5 if small else 0, atol=0 if small else 5.1e-7
        )
    line = text.split("\n")[1].split(",")
    assert line[:7] == ["some_task", "none", "none", "embed", "0", "", "200"]
    assert line[-6:] == [""] * 6 and len(line[10]) == 8
    assert back["verdict"].dropna().tolist() == table["verdict"].dropna().tolist()


def test_save(table, tmp_path):
    tables.save(table, tmp_path / "run")
    assert (tmp_path / "run/table.csv").read_text() == tables.csv(table)
    assert (tmp_path / "run/table.md").read_text() == tables.markdown_of_run(table)


def test_equivalence_is_marked_and_said(table):
    """Only where it was asked for, with the limit as it was given."""
    assert "≈" not in tables.markdown_of_run(table) and not any(
        "equi" in p for p in in_words(table)
    )
    asked = equivalence.with_equivalence(table, 12.5)
    cells = tables.accuracies(asked)
    for condition, text in zip(CONDITIONS, cells.rows[2][2:-1], strict=True):
        it = cell(asked, "mean", condition)
        assert ("≈" in text) == (it["p_equivalence_holm"] <= 0.05), condition
    assert "≈" in cells.rows[2][3] and "≈" not in cells.rows[2][6]
    assert "≈ equivalent to none within ±12.5 points" in cells.notes[-1]
    _, random, fgsm, *_ = in_words(asked)
    assert " Equivalent to no attack within 12.5 points." in random
    assert " Not shown to be equivalent to no attack within 12.5 points." in fgsm


def test_equivalence_of_two_runs(frames):
    a, b = frames({"a": (400, 4)}, seed=1), frames({"a": (400, 4)}, seed=1)
    frame = equivalence.with_equivalence(pairs.paired(*a, *b), 2)
    cells = tables.comparison(frame, ("a", "b"))
    assert cells.heading[-1] == "p(±2)" and "p(±2): two one-sided tests" in cells.notes[-1]
    assert cells.rows[0][-1] == f"{frame['p_equivalence_holm'][0]:.2g}"
    assert frame["p_equivalence_holm"][0] < 1e-3


def test_long_texts_are_folded_and_no_column_is_lost():
    long = ", ".join(f"token{i}" for i in range(20))
    cells = tables.Cells(
        ["condition", "task", "tokens", "n"], [["fgsm@0.01", "arc_easy", long, "7"]], []
    )
    lines = printed(cells.rich("title"), 60).splitlines()
    assert max(map(len, lines)) <= 60
    (first,) = (line for line in lines if "arc_easy" in line)
    assert first.split()[0] == "fgsm@0.01" and first.split()[-1] == "7"
    assert re.findall(r"token\d+", " ".join(lines)) == re.findall(r"token\d+", long)
