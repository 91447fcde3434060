"""Checkpoints of one training: which they are, and what is drawn of them."""

import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from test_models import run_of

from llm_attack.cli import main
from llm_attack.demo import MODEL_PATH
from llm_attack.errors import UsageError
from llm_attack.suite import critical, frames, revisions
from llm_attack.suite.plan import Plan
from llm_attack.suite.summary import MEAN


def test_plans(tmp_path):
    """Revisions of a model on the hub; subfolders of a local one."""
    hub = revisions.plans(Plan(model="hub/name"), "step1, refs/pr/2")
    assert {name: of.model_args for name, of in hub.items()} == {
        "step1": {"revision": "step1"},
        "refs-pr-2": {"revision": "refs/pr/2"},
    }
    assert {of.model for of in hub.values()} == {"hub/name"}
    (tmp_path / "step100").mkdir()
    (local,) = revisions.plans(Plan(model=str(tmp_path)), "step100").values()
    assert (local.model, local.model_args) == (str(tmp_path / "step100"), {})
    with pytest.raises(UsageError, match=r"revisions=step10: .*did you mean 'step100'"):
        revisions.plans(Plan(model=str(tmp_path)), "step10")
    for wrong in ("a,a", " , ", "a/b,a-b"):
        with pytest.raises(UsageError, match="must name checkpoints, each once"):
            revisions.plans(Plan(model="hub/name"), wrong)
    with pytest.raises(UsageError, match="must not be given with model_args=revision=main"):
        revisions.plans(Plan(model="hub/name", model_args={"revision": "main"}), "a,b")


def test_along():
    """Steps are numbers of the names; epsilons in RMS; cosines with their interval."""
    runs = {f"step{n}": run_of(f"s{n}", n / 1e3, 0.1, seed=n, rms=0.2) for n in (3000, 200, 1000)}
    for run in runs.values():
        draw = np.random.default_rng(1)
        run.samples["cosine"] = draw.normal(-0.1, 0.01, len(run.samples))
        run.samples["critical_epsilon"] = np.where(
            run.samples["condition"] == "none", np.nan, draw.uniform(0, 0.01, len(run.samples))
        )
    frame = revisions.along(runs)
    assert frame["step"].tolist() == [3000, 200, 1000]
    for row in frame.to_dict("records"):
        half = critical.robustness(runs[row["model"]].samples)
        of = half[half["task"] == MEAN].iloc[0]
        assert row["critical"] == pytest.approx(of["median"] / 0.2)
        assert row["critical_high"] == pytest.approx(of["median_high"] / 0.2)
        assert row["cosine_low"] < -0.1 < row["cosine_high"] < -0.09
    drawn = revisions.figure(frame)
    assert len(drawn.axes) == 3
    clean = drawn.axes[0].lines[0]
    assert clean.get_xdata().tolist() == [200, 1000, 3000]
    assert list(clean.get_ydata()) == [frame["clean"][i] for i in (1, 2, 0)]
    unnamed = revisions.along(dict(zip(("a", "main", "z1"), runs.values(), strict=True)))
    assert unnamed["step"].tolist() == [0, 1, 2]


def test_as_its_user_runs_it(tmp_path):
    for name in ("step1", "step2"):
        shutil.copytree(MODEL_PATH, tmp_path / "model" / name)
    out = tmp_path / "out"
    command = f"run --model {tmp_path / 'model'} --tasks demo_piqa --limit 3 --attacks none,fgsm"
    words = [*command.split(), "--device", "cpu", "--revisions", "step2,step1", "-o", str(out)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == {
        *("step1", "step2", "revisions.csv", "revisions.png", "revisions.svg")
    }
    assert len(frames.load(out / "step1")["samples"]) == 6
    table = (out / "revisions.csv").read_text().splitlines()
    assert len(table) == 1 + 2
    (out / "mine.txt").touch()
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 2 and "holds mine.txt" in again.output
