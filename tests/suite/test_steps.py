"""Several numbers of steps in one run: conditions, numbers, and the report."""

import numpy as np
import pandas as pd
import pytest

from llm_attack import Plan, evaluate
from llm_attack.base.errors import UsageError
from llm_attack.suite import results
from llm_attack.suite.analysis.conditions import by_name, steps_told
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.doctor import doctor
from llm_attack.suite.report.words import in_words
from llm_attack.suite.studies import steps

HOW = {"model": "demo", "tasks": "demo_piqa", "limit": 6, "epsilons": "0.5rms", "loss": "choice"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps") / "run"
    plan = Plan(**HOW, attacks="none,fgsm,bim,apgd", steps=[4, 1])
    evaluate(plan, output=folder, progress="quiet")
    return folder


@pytest.fixture(scope="module")
def several(folder):
    return results.load(folder)


def test_names_say_what_differs(several):
    names = [
        *("none", "fgsm@0.5rms", "bim@0.5rms-steps1", "bim@0.5rms-steps4"),
        *("apgd@0.5rms-steps1", "apgd@0.5rms-steps4"),
    ]
    assert list(several.samples["condition"].unique()) == names
    told = {name: int(name[-1]) for name in names[2:]}
    known = several.conditions
    assert steps_told(known) == told
    assert {name: known[name].get("steps") for name in told} == told
    assert known["fgsm@0.5rms"].get("steps") is None
    # without a record, too, also behind a hookpoint
    assert by_name(several.samples)["bim@0.5rms-steps4"].get("steps") == 4
    here = pd.DataFrame([{"condition": "bim@1rms-l2@a.1-steps3", "attack": "bim", "epsilon": 1.0}])
    (strange,) = by_name(here).values()
    assert (strange.get("steps"), strange.get("hookpoint"), strange.get("norm")) == (3, "a.1", "l2")
    assert strange.elsewhere().name == "bim@1rms-l2-steps3"


@pytest.mark.parametrize("n", [1, 4])
def test_each_is_what_a_run_of_its_own_gives(several, n):
    """The same condition, so that `compare` pairs them, with the same answers."""
    alone = evaluate(Plan(**HOW, attacks="bim,apgd", steps=n), progress="quiet")
    for attack in ("bim", "apgd"):
        there = f"{attack}@0.5rms"
        here = f"{there}-steps{n}"
        assert several.conditions[here] == alone.conditions[there]
        assert several.conditions[here] != several.conditions[f"{there}-steps{5 - n}"]
        a, b = (
            np.concatenate(
                list(run.samples.loc[run.samples["condition"] == name, "log_likelihoods"])
            )
            for run, name in ((several, here), (alone, there))
        )
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_report_shows_them(several, folder):
    """A curve over steps, whose numbers are those of the table; words on the most steps."""
    table, known = several.table, several.conditions
    means = table[table["task"] == MEAN].set_index("condition")
    cells = steps.cells(table, known)
    assert cells.heading == ["steps", "bim@0.5rms", "apgd@0.5rms"]
    for n, row in zip((1, 4), cells.rows, strict=True):
        expected = [means.loc[f"{a}@0.5rms-steps{n}", "acc"] for a in ("bim", "apgd")]
        assert [cell.split()[0] for cell in row] == [f"{n}", *(f"{acc:.3f}" for acc in expected)]
    axes = steps.figure(table, known).axes[-1]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    curve = [[n, means.loc[f"bim@0.5rms-steps{n}", "acc"]] for n in (1, 4)]
    assert lines["bim@0.5rms"] == curve
    told = [line for line in in_words(table, known) if line.startswith(("BIM", "APGD"))]
    assert [line.partition(" at ")[0] for line in told] == ["BIM with 4 steps", "APGD with 4 steps"]
    assert (folder / "steps.svg").exists()
    page = (folder / "report.html").read_text("utf-8")
    assert page.count(steps.TITLE.capitalize()) >= 2  # the table and the figure


def test_of_one_number_nothing_is_told():
    plan = Plan(**HOW, attacks="bim", steps=[3])
    assert plan == Plan(**HOW, attacks="bim", steps=3)
    assert plan.plain()["steps"] == 3


def test_doctor_takes_one_number():
    with pytest.raises(UsageError, match="steps=1,2: must be one number for doctor"):
        doctor(Plan(model="demo", loss="choice", steps=[1, 2]), "quiet")
