"""Builds that must fail: `--fail_under` and `--fail_drop`, and the workflow in the docs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.suite import thresholds
from llm_attack.suite.plan import Plan

ROOT = Path(__file__).parents[2]
PLAN = Plan("demo", "demo_piqa", attacks=["none", "fgsm"], epsilons=["0.01", "0.1"])


def table(*rows):
    """Means of conditions: (name, accuracy with its ends, drop with its ends)."""
    names = ("acc", "acc_low", "acc_high", "drop", "drop_low", "drop_high")
    return pd.DataFrame(
        {"task": task, "condition": name, "attack": name.partition("@")[0]}
        | dict(zip(names, values, strict=True))
        for task in ("arc", "mean")
        for name, *values in ((n, *(v if task == "mean" else [0.0] * 6)) for n, *v in rows)
    )


FOUND = table(
    ("none", 0.9, 0.85, 0.95, np.nan, np.nan, np.nan),
    ("fgsm@0.01", 0.5, 0.45, 0.55, 40.0, 36.0, 44.0),
    ("fgsm@0.1", 0.3, 0.25, 0.35, 60.0, 56.0, 64.0),
)


@pytest.mark.parametrize(
    ("given", "missed"),
    (
        ("worst=0.25", []),
        ("worst=0.26", ["fail_under worst=0.26: fgsm@0.1 has 0.300 (0.250 to 0.350)"]),
        ("worst=0.3:point", []),
        ("worst=0.31:point", ["fail_under worst=0.31:point: fgsm@0.1 has 0.300 (0.250 to 0.350)"]),
        ("fgsm=0.6", ["fail_under fgsm=0.6: fgsm@0.1 has 0.300 (0.250 to 0.350), and 1 more"]),
        ("fgsm@0.01=0.45, none=0.85", []),
        ("none=0.86", ["fail_under none=0.86: none has 0.900 (0.850 to 0.950)"]),
    ),
)
def test_the_lower_end_counts_unless_it_is_the_point(given, missed):
    assert thresholds.check_run(FOUND, thresholds.under(given, PLAN)) == missed


def test_the_upper_end_of_a_drop_counts():
    def check(given):
        return thresholds.check_run(FOUND, thresholds.drop(given, PLAN))

    assert check("64") == check("60:point") == []
    assert check("63.9") == ["fail_drop 63.9: fgsm@0.1 drops by 60.0 points (56.0 to 64.0)"]
    assert check("40:point")[0].startswith("fail_drop 40:point: fgsm@0.1")


def test_what_cannot_be_judged_does_not_pass():
    unknown = FOUND.assign(acc=np.nan, acc_low=np.nan)
    (line,) = thresholds.check_run(unknown, thresholds.under("none=0", PLAN))
    assert line.endswith("none has no mean over tasks")
    (line,) = thresholds.check_run(FOUND.assign(better="lower"), thresholds.under("none=0", PLAN))
    assert line.endswith("none has a score that is better when it is lower")


@pytest.mark.parametrize(("better", "worse"), (("higher", -1.0), ("lower", 1.0)))
def test_of_a_pair_the_second_must_not_be_worse(better, worse):
    ends = sorted([worse * 1.0, worse * 5.0])
    frame = pd.DataFrame(
        [
            {"task": "mean", "condition": "none", "difference": worse * 3.0, "better": better}
            | {"difference_low": ends[0], "difference_high": ends[1]}
        ]
    )
    assert thresholds.check_pair(frame, thresholds.drop("5")) == []
    assert thresholds.check_pair(frame, thresholds.drop("3:point")) == []
    (line,) = thresholds.check_pair(frame, thresholds.drop("4.9"))
    text = "under none the second run is worse by 3.0 points (1.0 to 5.0)"
    assert line == f"fail_drop 4.9: {text}"
    turned = frame.assign(difference=-frame.difference)
    turned = turned.assign(difference_low=-ends[1], difference_high=-ends[0])
    assert thresholds.check_pair(turned, thresholds.drop("0")) == []


def test_hookpoints_are_named_by_their_attack():
    plan = Plan("demo", "demo_piqa", attacks=["none", "fgsm"], hookpoints=["embed", "1"])
    assert thresholds.under("fgsm=0.1", plan)[0].condition == "fgsm"
    with pytest.raises(UsageError, match="must name one of worst, none, fgsm;"):
        thresholds.under("fgsm@0.01=0.1", plan)


def test_exit_code_after_everything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["run", "--model", "demo", "--tasks", "demo_piqa", "--attacks", "none,fgsm"]
    words += ["--limit", "6", "--device", "cpu", "--progress", "quiet", "-o", "out"]
    done = CliRunner().invoke(main, [*words, "--fail_under", "fgsm@0.01=1,none=0"])
    assert done.exit_code == 3, done.output
    (line,) = done.stderr.splitlines()
    pattern = r"failed: fail_under fgsm@0.01=1: fgsm@0.01 has 0\.\d{3} \(0\.\d{3} to [01]\.\d{3}\)"
    assert re.fullmatch(pattern, line)
    assert {"run.json", "report.html", "table.csv", "samples.parquet"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    # a finished run is judged again, and loses nothing
    done = CliRunner().invoke(main, [*words, "--fail_under", "worst=0.1:point"])
    assert (done.exit_code, done.stderr) == (0, "")
    pair = ["compare", "out", "out", "-o", "pair.csv", "--fail_drop"]
    done = CliRunner().invoke(main, [*pair, "0"])
    assert done.exit_code == 3 and "failed: fail_drop 0: under " in done.stderr
    assert (tmp_path / "pair.csv").exists()
    assert CliRunner().invoke(main, [*pair, "0:point"]).exit_code == 0
    done = CliRunner().invoke(main, ["compare", "out", "out", "out", "--fail_drop", "2"])
    assert done.exit_code == 2 and "fail_drop=2: needs exactly two folders" in done.stderr


def steps():
    """The steps of the workflow in docs/how/ci.md."""
    page = (ROOT / "docs/how/ci.md").read_text("utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (job,) = yaml.safe_load(text)["jobs"].values()
    return job["steps"]


def test_the_workflow_names_only_what_there_is():
    """Each command of it is known; what it keeps is what they write."""
    commands = [shlex.split(step["run"]) for step in steps() if "run" in step]
    assert [words[:2] for words in commands] == [
        ["pip", "install"],
        *(["llm-attack", name] for name in ("doctor", "run", "compare")),
    ]
    kept = next(step["with"]["path"].split() for step in steps() if "path" in step.get("with", {}))
    assert kept == [commands[2][-1], commands[3][-1]]
    assert commands[3][2:4] == ["released", "attacked"]


@pytest.mark.slow
def test_the_workflow_passes_and_fails(tmp_path):
    """Its commands as they stand: on the bundled model they pass, and on a ruined run they fail."""
    commands = [shlex.split(step["run"]) for step in steps() if "run" in step][1:]

    def carried_out(words):
        program = [sys.executable, "-m", "llm_attack", *words[1:]]
        return subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)

    doctor, run, compare = commands
    assert carried_out(doctor).returncode == 0
    done = carried_out(run)
    assert done.returncode == 0, done.stderr
    (tmp_path / "attacked").rename(tmp_path / "released")
    again = ["0.5rms" if word == "0.1rms" else word for word in run]
    done = carried_out(again)
    assert done.returncode == 3, done.stderr
    shared = carried_out(compare)
    assert shared.returncode == 0, shared.stderr  # `none` is the condition that both have
    assert (tmp_path / "against-release.csv").exists()
