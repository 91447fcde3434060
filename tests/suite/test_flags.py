"""A check that failed is named in every table of the run's numbers, and of its comparisons."""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pandas as pd
import pytest
from test_models import five as five
from test_models import folders, invoke  # noqa: F401 (a fixture)

from llm_attack.base.record import write_json
from llm_attack.suite import results
from llm_attack.suite.report import summary_file

FAILED = "answers do not vary from call to call"
CHECKS = [
    {"name": FAILED, "passed": False, "figure": "log-probabilities change by 0.1 of their size"},
    {"name": "the gradient is not zero", "passed": True, "figure": "zero for 0 of 4 points"},
]


@pytest.fixture
def flagged(five, folders):  # noqa: F811
    """The folders of three runs, the first of which failed a check."""
    run = five["m0"].run | {"checks": CHECKS}
    five["m0"] = replace(five["m0"], run=run)
    write_json(Path("m0/run.json"), run)
    return folders[:3]


def tables_with(text):
    return {
        str(path)
        for path in Path().rglob("*")
        if path.suffix in (".csv", ".md", ".html", ".tex", ".json") and text in path.read_text()
    }


def test_of_one_run(flagged):
    assert invoke("report", "m0", "--format", "tex").exit_code == 0
    named = {"table.csv", "report.html", "table.tex", "summary.json", "run.json"}
    assert tables_with(FAILED) == {f"m0/{name}" for name in named}
    table = pd.read_csv("m0/table.csv")
    assert (table["failed_checks"] == FAILED).all() and len(table) == 6
    assert results.load(Path("m0")).table["failed_checks"].tolist() == [FAILED] * 6
    summary = json.loads(Path("m0/summary.json").read_text())
    jsonschema.validate(summary, json.loads(summary_file.SCHEMA.read_text()))
    assert [row["failed_checks"] for row in summary["results"]] == [[FAILED]] * 6
    assert "mean" not in Path("m0/report.html").read_text().split(FAILED)[0].split("<caption")[-1]


def test_of_two_runs(flagged):
    words = ["compare", "m1", "m0", "-o", "pair.csv", "--format", "tex"]
    for _ in range(2):  # also over its own file
        done = invoke(*words)
        assert done.exit_code == 0, done.output
    assert f"failed checks of b: {FAILED}" in " ".join(done.stdout.split())
    for name in ("pair.csv", "pair-drops.csv"):
        frame = pd.read_csv(name)
        assert (frame["failed_checks_b"] == FAILED).all() and len(frame)
        assert frame["failed_checks_a"].isna().all()
    assert f"Failed checks of b: {FAILED}" in Path("pair.tex").read_text()


def test_of_many_runs(flagged):
    words = ["-o", "many.csv", "--leaderboard", "board.csv", "--format", "tex"]
    done = invoke("compare", *flagged, *words)
    assert done.exit_code == 0, done.output
    for name in ("many.csv", "board.csv"):
        frame = pd.read_csv(name).set_index("model")["failed_checks"]
        assert frame["m0"] == FAILED and frame[["m1", "m2"]].isna().all()
    pairs = pd.read_csv("many-drops.csv")
    assert ((pairs["failed_checks_a"] == FAILED) == (pairs["a"] == "m0")).all()
    assert f"Failed checks of m0: {FAILED}" in Path("many.tex").read_text()


def test_runs_without_checks_have_no_column_for_them(folders):  # noqa: F811
    assert invoke("report", "m1").exit_code == 0
    assert invoke("compare", "m1", "m2", "-o", "pair.csv").exit_code == 0
    assert tables_with("failed_checks") == set()
