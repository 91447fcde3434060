"""The numbers and outputs of the README, and of the pages for beginners."""

import re
from contextlib import redirect_stdout
from io import StringIO

import pandas as pd
import pytest
from scipy.stats import binomtest
from shown import ROOT
from test_docs import blocks, own_task
from test_shown_numbers import record_of, table_of, tables, words

from llm_attack import Plan, evaluate
from llm_attack.suite.analysis.summary import summarise

README = (ROOT / "README.md").read_text("utf-8")
STATISTICS = "docs/explain/statistics.md"


def first(n):
    """The samples of `make demo` for the first questions of each task: a run with that limit."""
    samples = pd.read_parquet(ROOT / "results/demo/sequence/samples.parquet")
    return samples[samples["doc_id"] < n]


def row_of(folder, task, condition):
    table = pd.read_csv(ROOT / "results" / folder / "table.csv").set_index(["task", "condition"])
    return table.loc[(task, condition)]


def test_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_demo_in_the_readme():
    """The table is that of `docs/demo.md`, which is compared with the results."""
    page = (ROOT / "docs/demo.md").read_text("utf-8")
    one, two = (
        next(tables(text[text.index("| task | none | random@0.01 |") :])) for text in (README, page)
    )
    assert one == two


def test_known_label_in_the_readme():
    """An adversary who knows the label, and what a clean model and guesses reach."""
    clean, left = (
        row_of("fig3/smollm2-135m-choice", "mean", name) for name in ("none", "fgsm@0.007rms")
    )
    text = words("README.md")
    assert f"0.007 RMS takes the mean from {clean['acc']:.3f} to {left['acc']:.3f}" in text
    assert left["acc"] < left["baseline"]
    clean = row_of("fig3/smollm2-135m", "mean", "none")
    assert f"mean accuracy is {clean['acc']:.3f} without an attack, and guesses reach" in text
    assert f"guesses reach {clean['baseline']:.3f}." in text


def test_output_of_lm_eval_in_the_readme():
    answers = first(50).set_index(["task", "condition"]).loc[("demo_piqa", "fgsm@0.01")]
    rows = re.findall(r"\|(acc|acc_norm)\s*\|↑\s*\|\s*([\d.]+)\|±\s*\|([\d.]+)\|", README)
    assert [name for name, _, _ in rows] == ["acc", "acc_norm"]
    for name, value, error in rows:
        assert float(value) == pytest.approx(answers[name].mean())
        assert float(error) == pytest.approx(answers[name].std() / 50**0.5, abs=5e-5)


@pytest.mark.slow
def test_python_in_the_readme():
    code, output = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL)[0]
    with redirect_stdout(StringIO()) as printed:
        exec(code, {})
    assert printed.getvalue() == output


def test_the_first_attack():
    """What its command prints is what the stored run has for the same questions."""
    table = summarise(first(50)).set_index(["task", "condition"])
    text = (ROOT / "docs/start/first-attack.md").read_text("utf-8")
    block = re.findall(r"```text\n(.*?)```", text, re.DOTALL)[0]
    heading, *lines = (line.split() for line in block.splitlines())
    conditions = heading[2:-1]
    for line in lines[:7]:
        task, n, *cells, baseline = line
        for condition, cell in zip(conditions, cells, strict=True):
            of = table.loc[(task, condition)]
            assert (int(n), cell.rstrip("§†‡")) == (of["n"], f"{of['acc']:.3f}")
            if task != "mean":
                assert ("†" in cell) == (of["verdict"] == "indistinguishable from guessing")
                assert ("§" in cell) == (of["p_mcnemar_holm"] > 0.05)
        assert baseline == f"{of['baseline']:.3f}"
    for line, name in zip(lines[7:], ("drop", "detectable"), strict=True):
        values = table.loc["mean"].loc[conditions[1:], name]
        assert line[-3:] == [f"{value:.1f}" for value in values]
    drops = table.loc["mean"]["drop"]
    text = " ".join(text.split())
    assert f"Random noise costs {drops['random@0.01']:.1f} points." in text
    assert f"gradient costs {drops['fgsm@0.01']:.1f} points" in text


def minus(text):
    return text.replace("-", "−")


def test_the_worked_example():
    """Counts, tests and intervals of ARC-Easy, and the drops of the mean."""
    names = ["fgsm@0.01", "random@0.01"]
    of = [row_of("fig3/smollm2-135m", "arc_easy", name) for name in names]
    drops = [minus(f"{row['drop']:.1f}") for row in of]
    assert table_of(STATISTICS, "on ARC-Easy, 500 questions")[1:] == [
        ["right → wrong", *(f"{row['lost']:.0f}" for row in of)],
        ["wrong → right", *(f"{row['gained']:.0f}" for row in of)],
        ["drop, points", *drops],
    ]
    _, plain, adjusted, _ = table_of(STATISTICS, "on ARC-Easy", *names)
    for (_, *cells), key in ((plain, "p_mcnemar"), (adjusted, "p_mcnemar_holm")):
        values = [row[key] for row in of]
        assert [float(cell) for cell in cells] == [
            float(f"{p:.1g}") if p < 0.1 else round(p, 2) for p in values
        ]
    _, *rows = table_of(STATISTICS, "on ARC-Easy", "drop, points")
    ends = [minus(f"{row['drop_low']:.1f} to {row['drop_high']:.1f}") for row in of]
    assert rows == [list(row) for row in zip(names, drops, ends, strict=True)]
    text = words(STATISTICS)
    assert f"at `fgsm@0.01`, {of[0]['acc'] * 500:.0f} of 500 answers are right" in text.replace(
        "At", "at"
    )
    assert of[0]["p_chance"] < 1e-9
    assert binomtest(28, 76 + 28).pvalue == pytest.approx(of[0]["p_mcnemar"], rel=1e-4)
    for name in names:
        row = row_of("fig3/smollm2-135m", "mean", name)
        values = (row[key] for key in ("drop", "drop_low", "drop_high"))
        assert f"`{name}` it drops by {{:.1f}} points ({{:.1f}} to {{:.1f}})".format(
            *values
        ) in text.replace("−", "-")


def test_sources_in_the_worked_example():
    """Which tasks have questions that share a source."""
    table = pd.read_csv(ROOT / "results/fig3/smollm2-135m/table.csv")
    of = table[(table["condition"] == "none") & (table["task"] != "mean")]
    assert set(of.loc[of["clusters"] < of["n"], "task"]) == {"winogrande", "piqa"}
    assert "only WinoGrande and PIQA have such groups" in words(STATISTICS)


def test_enough_questions():
    """`detectable` of FGSM for three sizes of a run."""
    small = summarise(first(50)).set_index(["task", "condition"]).loc[("mean", "fgsm@0.01")]
    runs = [
        small,
        *(row_of(run, "mean", "fgsm@0.01") for run in ("demo/sequence", "fig3/smollm2-135m")),
    ]
    _, *rows = table_of(STATISTICS, "run", "questions in all")
    assert [row[1:] for row in rows] == [
        [f"{row['n']:,}", f"{row['detectable']:.1f}"] for row in runs
    ]


def test_what_the_label_is_worth():
    """`docs/explain/threat-models.md`: both adversaries on the bundled model."""
    _, *rows = table_of("docs/explain/threat-models.md", "adversary")
    for row, folder in zip(rows, ("demo/sequence", "demo/choice"), strict=True):
        of = [row_of(folder, "mean", name) for name in ("none", "fgsm@0.01", "bim@0.01")]
        assert row[1:] == [*(f"{x['acc']:.3f}" for x in of), f"{of[0]['baseline']:.3f}"]


def test_scales():
    """`docs/explain/amplitudes.md` and `text.md`: the RMS of two models, and the nearest tokens."""
    _, *rows = table_of("docs/explain/amplitudes.md", "model", "RMS of the embedding matrix")
    for row, folder in zip(rows, ("fig3/smollm2-135m", "demo/sequence"), strict=True):
        rms = record_of(folder)["attacks"]["fgsm@0.01"]["embedding_rms"]
        assert row[1:] == [f"{rms:.3f}", f"{1 / rms:.0f} %"]
    share = record_of("fig3/smollm2-135m")["attacks"]["fgsm@0.7rms"]["nearest_token_unchanged"]
    assert f"it is {100 * share:.2f} % even under FGSM at 0.7 RMS" in words("docs/explain/text.md")


def test_interval_by_hand(capsys):
    exec(blocks("explain/statistics.md")[0], {})
    row = row_of("fig3/smollm2-135m", "arc_easy", "fgsm@0.01")
    shown = f"{-row['drop_high']:.1f} to {-row['drop_low']:.1f} points"
    assert capsys.readouterr().out == f"the accuracy changes by {shown}\n"


@pytest.mark.slow
def test_own_task(tmp_path, monkeypatch):
    """`docs/how/task.md`: its files are a task that a run takes."""
    own_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = evaluate(Plan("demo", "capitals", include_path="my_tasks", attacks=["none", "fgsm"]))
    assert found.questions["gold"].map(list).tolist() == [[1], [0]]
    assert set(found.table["condition"]) == {"none", "fgsm@0.01"}
