"""Checkpoints of one training: how they are named, and figures of them."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_models import run_of

from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.demo import MODEL_PATH
from llm_attack.suite import results
from llm_attack.suite.analysis import critical
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.plan import Plan
from llm_attack.suite.studies import revisions


def test_plans(tmp_path):
    """Revisions of a model on the hub; subfolders of a local one."""
    hub = revisions.plans(Plan(model="hub/name"), "step1, refs/pr/2")
    assert {name: of.model_args for name, of in hub.items()} == {
        "step1": {"revision": "step1"},
        "refs%2Fpr%2F2": {"revision": "refs/pr/2"},
    }
    assert {of.model for of in hub.values()} == {"hub/name"}
    (tmp_path / "step100").mkdir()
    with pytest.raises(UsageError, match=r"step100 has no config\.json and no adapter_config"):
        revisions.plans(Plan(model=str(tmp_path)), "step100")  # not after others were computed
    (tmp_path / "step100/config.json").touch()
    (local,) = revisions.plans(Plan(model=str(tmp_path)), "step100").values()
    assert (local.model, local.model_args) == (str(tmp_path / "step100"), {})
    with pytest.raises(UsageError, match=r"revisions=step10: .*did you mean 'step100'"):
        revisions.plans(Plan(model=str(tmp_path)), "step10")
    for wrong in ("a,a", " , "):
        with pytest.raises(UsageError, match="must name each checkpoint once"):
            revisions.plans(Plan(model="hub/name"), wrong)
    with pytest.raises(UsageError, match="must not be given with model_args=revision=main"):
        revisions.plans(Plan(model="hub/name", model_args={"revision": "main"}), "a,b")


# What a hub could have, and what no folder of that name may be made of.
@pytest.mark.parametrize(
    "name",
    [
        *("..", ".", "a/../../b", "/etc", "a/", "/a", "a//b", "../x", "a/..", ".git", "a..b"),
        *("a\\b", "a\nb", "a\x00b", "a\x1b[31mb", "a b", "a:b", "a*", "a?", "x.lock", "a.", "@"),
        *("a@{1}", "~a", "\udcff", "revisions.csv", "revisions.png", "é" * 60, "x" * 256),
    ],
)
def test_names_that_no_revision_has(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="revisions=") as error:
        revisions.plans(Plan(model="hub/name"), f"main,{name}")
    assert "\n" not in str(error.value)
    (tmp_path / "local" / "main").mkdir(parents=True)
    with pytest.raises(UsageError, match="revisions="):
        revisions.plans(Plan(model="local"), f"main,{name}")


def test_folders_of_revisions_are_safe_and_no_two_the_same():
    given = [
        *("a/b", "a-b", "a%2Fb", "a%252Fb", "a/b/c", "v1.0", "1f2e3d", "refs/pr/1", "Ünï", "Unï"),
        *("a_b", "a+b", "a=b", "--", "100%", "%2e%2e", "CON", "a'b", 'a"b', "$(x)"),
    ]
    found = revisions.plans(Plan(model="hub/name"), ",".join(given))
    assert [of.model_args["revision"] for of in found.values()] == given
    assert len(found) == len(given)
    for folder in found:
        assert re.fullmatch(r"[\w.%-]+", folder, re.ASCII) and folder.strip(".")
        assert (Path("out") / folder).resolve().parent == Path("out").resolve()


def test_revisions_of_what_has_none(tmp_path):
    """The bundled model, and a file: the same weights would be evaluated twice."""
    (tmp_path / "model.gguf").touch()
    for model in ("demo", str(tmp_path / "model.gguf")):
        with pytest.raises(UsageError, match=f"revisions=step1,step2: .*{model} is neither"):
            revisions.plans(Plan(model=model), "step1,step2")
    done = CliRunner().invoke(
        main, f"run --model demo --revisions step1,step2 -o {tmp_path / 'out'}".split()
    )
    assert done.exit_code == 2 and "needs a model on a hub" in done.output
    assert not (tmp_path / "out").exists()


def test_equal_weights_are_told():
    runs = {name: run_of(name, 1.0, 0.5) for name in ("step1", "step2", "step3")}
    assert revisions.equal(runs) == []
    runs["main"] = replace(runs["step2"])
    (told,) = revisions.equal(runs)
    assert told == "main has the same weights as step2 (hash of step2): they are one checkpoint"
    frame = revisions.along(runs)
    assert told in revisions.cells(frame, revisions.equal(runs)).notes
    assert frame["weights"].nunique() == 3
    # of other weights that have the same hash of none there is nothing to say
    for run in runs.values():
        run.run["fingerprint"] = {}
    assert revisions.equal(runs) == []


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
    assert len(results.load_frames(out / "step1")["samples"]) == 6
    # they are copies of one model
    assert "step1 has the same weights as step2" in " ".join(done.output.split())
    table = (out / "revisions.csv").read_text().splitlines()
    assert len(table) == 1 + 2
    (out / "mine.txt").touch()
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 2 and "contains mine.txt" in again.output
