"""The notebook and the scripts run without a network, and show what they say."""

import inspect
import json
from contextlib import redirect_stdout
from io import StringIO

import pandas as pd
import pytest
from shown import ROOT
from test_docs import blocks

from examples import model_in_memory, own_attack, two_lm_eval_runs
from llm_attack import Plan, evaluate

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.mark.parametrize("script", [own_attack, model_in_memory, two_lm_eval_runs])
def test_scripts_are_short(script):
    assert len(inspect.getsource(script).splitlines()) < 50


@pytest.mark.slow
def test_own_attack():
    """The function of the page, stronger than one step and than noise."""
    assert inspect.getsource(own_attack.nifgsm) == blocks("how/attack.md")[0]
    table = own_attack.main(limit=50)
    acc = table[table["task"] == "demo_piqa"].set_index("attack")["acc"]
    name = next(name for name in acc.index if name.endswith("nifgsm"))
    assert acc[name] < acc["fgsm"] <= acc["random"]


@pytest.mark.slow
def test_model_in_memory():
    """The accuracies are those of `evaluate`, which loads the model itself."""
    found = model_in_memory.main(limit=20)
    plan = Plan("demo", "demo_piqa", attacks=["none", "fgsm", "bim"], epsilons=["0.1rms"], limit=20)
    table = evaluate(plan, progress="quiet").table
    acc = table[table["task"] == "demo_piqa"].set_index("attack")["acc"]
    assert found == pytest.approx(acc.to_dict())


def test_two_lm_eval_runs(tmp_path, capsys):
    """What it prints of files of lm-eval's form is what a run has in its table."""
    run = ROOT / "results" / "demo" / "sequence"
    samples = pd.read_parquet(run / "samples.parquet")
    for name in ("none", "fgsm@0.01"):
        folder = tmp_path / name / "demo"
        folder.mkdir(parents=True)
        for task, of in samples[samples["condition"] == name].groupby("task"):
            lines = of[["doc_id", "acc"]].to_json(orient="records", lines=True)
            (folder / f"samples_{task}_2026-01-01T00-00-00.000001.jsonl").write_text(lines)
    two_lm_eval_runs.main(tmp_path / "none", tmp_path / "fgsm@0.01")
    printed = capsys.readouterr().out
    table = pd.read_csv(run / "table.csv")
    rows = table[(table["condition"] == "fgsm@0.01") & (table["task"] != "mean")]
    assert len(rows) == 6 and printed.count(" questions, ") == 6
    for row in rows[rows["clusters"] == rows["n"]].itertuples():
        assert (
            f"{row.task}: {row.n} questions, {row.lost:.0f} lost, {row.gained:.0f} gained,"
            f" p = {row.p_mcnemar:.2g}\n"
            f"  change {-row.drop:+.1f} points ({-row.drop_high:+.1f} to {-row.drop_low:+.1f})\n"
            f"  this many questions detect a change of {row.detectable:.1f} points\n"
        ) in printed


@pytest.mark.slow
def test_quickstart(one_index):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names, printed = {}, StringIO()
    with redirect_stdout(printed):
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
    assert set(names["table"].index) == {"none", "random@0.01", "fgsm@0.01", "bim@0.01"}
    assert (names["table"]["n"] == 60).all()
    lines = printed.getvalue().splitlines()
    answers = [line.split("'")[1] for line in lines if " answers " in line]
    right = next(line for line in lines if line.startswith("right is")).removeprefix("right is ")
    assert answers[0] == right != answers[-1]
    # what the loss asks for gets likelier with every step along its gradient
    p = [float(line.split(" = ")[1]) for line in lines if " = " in line]
    assert len(p) == 5
    assert min(p[2:]) > p[0]
    assert p[3] > p[2]
