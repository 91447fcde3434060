"""`summary.json`: valid, stable, and equal to the table."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from llm_attack.suite import render, results
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.commands import report
from llm_attack.suite.report import summary_file

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is of the extra dev")

STORED = Path(__file__).parents[3] / "results"
RUNS = sorted(str(path.parent.relative_to(STORED)) for path in STORED.rglob("samples.parquet"))
SCHEMA = json.loads(summary_file.SCHEMA.read_text("utf-8"))


def valid(content):
    jsonschema.Draft202012Validator(SCHEMA).validate(content)


@pytest.fixture(scope="module")
def choice():
    return results.load(STORED / "demo" / "choice")


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    "folder",  # those of a sweep over hookpoints are large
    [pytest.param(name, marks=[pytest.mark.slow] * ("layers" in name)) for name in RUNS],
)
@pytest.mark.sampled(4)
def test_every_stored_run_has_a_valid_one(folder, tmp_path):
    """Also of several hookpoints, and of versions that recorded less."""
    result = results.load(STORED / folder)
    summary_file.save(result.table, tmp_path, result.run, result.conditions)
    content = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    valid(content)
    for row, said in zip(result.table.to_dict("records"), content["results"], strict=True):
        assert said["mean_over_tasks"] == (row["task"] == MEAN) == (said["task"] is None)
        assert (said["condition"], said["n"]) == (row["condition"], row["n"])
        assert said["accuracy"]["value"] == pytest.approx(row["acc"], rel=1e-11)
        if row["condition"] == "none":
            assert said["drop"] is None
        else:
            ends = [said["drop"][end] for end in ("low", "value", "high", "p")]
            of_row = [row[key] for key in ("drop_low", "drop", "drop_high", "p_mcnemar")]
            assert ends == pytest.approx(of_row, rel=1e-11)


@pytest.mark.parametrize(
    "change",
    [
        lambda of: of.pop("date"),
        lambda of: of.update(schema_version=2),
        lambda of: of.update(date="yesterday"),
        lambda of: of["results"].clear(),
        lambda of: of["results"][0].pop("accuracy"),
        lambda of: of["results"][-1]["drop"].pop("test"),
        lambda of: of["results"][-1]["drop"].update(p=1.5),
        lambda of: of["results"][-1]["drop"].update(low="0.1"),
    ],
)
def test_what_is_not_valid_is_found(change, choice):
    content = copy.deepcopy(summary_file.content(choice.table, choice.run, choice.conditions))
    valid(content)
    change(content)
    with pytest.raises(jsonschema.ValidationError):
        valid(content)


def test_report_writes_it(tmp_path, monkeypatch):
    """Twice the same; figures are left out here, which take long."""
    monkeypatch.setattr(render.figures, "draw_all", lambda *_: [])
    folder = tmp_path / "run"
    shutil.copytree(STORED / "demo" / "choice", folder)
    texts = []
    for _ in range(2):
        report(folder, None)
        texts.append((folder / "summary.json").read_bytes())
    assert texts[0] == texts[1]
    content = json.loads(texts[0])
    valid(content)
    assert content["model"]["weights"] == "c8a0678e24ba3fe0"
    tests = {row["task"]: row["drop"]["test"] for row in content["results"] if row["drop"]}
    assert tests.pop(None) == summary_file.STRATIFIED
    assert set(tests.values()) == {summary_file.MCNEMAR}


def test_a_score_that_is_a_number_has_its_own_test(choice):
    result = choice
    table = result.table.assign(score="f1", kind="share, 0 to 1", better="higher", clusters=7)
    rows = summary_file.content(table, result.run, result.conditions)["results"]
    assert {row["drop"]["test"] for row in rows if row["drop"] and row["task"]} == {
        summary_file.RANDOMIZATION
    }
    table = table.assign(kind="right or wrong")
    rows = summary_file.content(table, result.run, result.conditions)["results"]
    assert {row["drop"]["test"] for row in rows if row["drop"] and row["task"]} == {
        summary_file.SIGNS
    }
