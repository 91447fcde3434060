"""Runs with the user's own attack or loss: another source code makes another run."""

import importlib
import linecache
import sys
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from llm_attack import Plan, evaluate
from llm_attack.attacks import ATTACKS, register_attack
from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.lm.losses import LOSSES, register_loss
from llm_attack.suite import results

FILE = "def push(x, loss, ball, keys):\n    return x {sign} ball.epsilon\n"
FILE += "def gap(sums, choices):\n    return {factor} * choices.gap(sums)\n"
OWN = {"attack": "my_functions:push", "loss": "my_functions:gap"}


def forget():
    """As a new process begins."""
    for table in (ATTACKS, LOSSES):
        for name in [name for name, kind in table.items() if kind.function is not None]:
            del table[name]
    sys.modules.pop("my_functions", None)
    importlib.invalidate_caches()
    linecache.clearcache()


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """edit(sign=..., factor=...): writes the user's file anew, for a new process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr("llm_attack.suite.report.figures.draw_all", lambda *_: [])

    def written(sign="+", factor=1):
        (tmp_path / "my_functions.py").write_text(FILE.format(sign=sign, factor=factor))
        forget()

    yield written
    forget()


def plan(kind, **more):
    given = {"attacks": ["none", "random", "fgsm"], "loss": "choice", "limit": 2}
    given |= {"loss": OWN["loss"]} if kind == "loss" else {"attacks": ["none", OWN["attack"]]}
    return Plan("demo", "demo_piqa", device="cpu", **given | more)


@pytest.mark.parametrize(("kind", "changed"), [("attack", {"sign": "-"}), ("loss", {"factor": 2})])
@pytest.mark.sampled(2)
def test_a_file_that_changed_is_another_run(kind, changed, edit):
    edit()
    first = evaluate(plan(kind), output="a", progress="quiet")
    again = evaluate(plan(kind), output="a", progress="quiet")
    assert again.run["timings"] == first.run["timings"]  # it was read
    edit(**changed)
    with pytest.raises(UsageError) as refused:
        evaluate(plan(kind), output="a", progress="quiet")
    source = first.run["fingerprint"]["sources"][OWN[kind]]
    assert f'sources.{OWN[kind]}: "{source}" there, ' in str(refused.value)
    evaluate(plan(kind), output="b", progress="quiet")
    forget()
    done = CliRunner().invoke(main, ["compare", "a", "b", "-o", "c.csv"])
    assert done.exit_code == 0, done.output
    rows = pd.read_csv("c.csv", keep_default_na=False)["condition"].tolist()
    apart = {"attack": [OWN["attack"]], "loss": ["fgsm"]}[kind]
    for name in apart:
        assert f"{name}@0.01" not in rows
        assert any(row.startswith(f"{name}@0.01 ({kind}_source=") for row in rows)
    assert "none" in rows and ("random@0.01" in rows) == (kind == "loss")
    for folder in ("a", "b", "a"):
        done = CliRunner().invoke(main, ["compare", folder, "--leaderboard", "board.csv"])
        assert done.exit_code == 0, done.output
    board = pd.read_csv("board.csv")["condition"].tolist()
    assert board.count(f"{apart[0]}@0.01") == 2 and board.count("worst@0.01") in (0, 2)


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.sampled(2)
def test_equal_files_are_the_same_run(kind, edit):
    edit()
    for folder in "ab":
        evaluate(plan(kind), output=folder, progress="quiet")
        edit()
    marks = [results.load(folder).run["fingerprint"] for folder in "ab"]
    assert marks[0] == marks[1]
    assert results.load("a").conditions == results.load("b").conditions


def test_functions_that_were_registered(edit):
    def run(sign, factor):
        forget()
        register_attack(lambda x, loss, ball, keys: x + sign * ball.epsilon, "push")
        register_loss(lambda sums, choices: factor * choices.gap(sums), "gap")
        of = Plan("demo", "demo_piqa", attacks=["none", "push"], loss="gap", limit=2, device="cpu")
        return evaluate(of, progress="quiet")

    runs = [run(*given) for given in ((1, 1), (1, 1), (-1, 1), (1, 2))]
    marks = [tuple(of.run["fingerprint"]["sources"].values()) for of in runs]
    assert marks[0] == marks[1] and len(set(marks)) == 3
    found = [of.conditions["push@0.01"] for of in runs]
    assert found[0] == found[1] != found[2] and found[0] != found[3]


def test_a_report_elsewhere_needs_no_function(edit):
    """The worst case is there although nothing says any more that the loss knows the gold."""
    edit()
    with_own = plan("loss", attacks=["none", "fgsm", OWN["attack"]])
    evaluate(with_own, output="a", progress="quiet")
    before, stored = Path("a/table.csv").read_text(), Path("a/run.json").read_text()
    forget()
    done = CliRunner().invoke(main, ["report", "a"])
    assert done.exit_code == 0, done.output
    assert Path("a/table.csv").read_text() == before and "worst@0.01" in before
    assert Path("a/run.json").read_text() == stored


@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.sampled(2)
def test_the_worst_of_several(changed, edit):
    """It is another where any of its attacks is."""

    def run(signs):
        forget()
        for name, sign in zip("ab", signs, strict=True):
            register_attack(lambda x, loss, ball, keys, s=sign: x + s * ball.epsilon, name)
        given = {"attacks": ["none", "a", "b"], "loss": "choice", "limit": 2, "device": "cpu"}
        return evaluate(Plan("demo", "demo_piqa", **given), progress="quiet").conditions

    signs = [1, -1]
    found = run(signs)
    signs[changed] = 0
    assert found["worst@0.01"] == run([1, -1])["worst@0.01"] != run(signs)["worst@0.01"]


def test_functions_themselves():
    """What a plan gets in place of a name; a run says by which name it may be asked for again."""

    def push(x, loss, ball, keys):
        return x + ball.epsilon

    def gap(sums, choices):
        return choices.gap(sums)

    name = f"{__name__}:test_functions_themselves.<locals>."
    for attacks in (["none", push], ("none", push)):
        plan = Plan("demo", "demo_piqa", attacks=attacks, loss=gap, limit=2, device="cpu")
        assert plan.attacks == ("none", f"{name}push") and plan.loss == f"{name}gap"
    assert Plan(attacks=push).attacks == (f"{name}push",)
    found = evaluate(plan, progress="quiet")
    assert list(found.conditions) == ["none", f"{name}push@0.01"]
    with pytest.raises(
        UsageError, match=r"loss=.*: must take the arguments sums, or sums and choices"
    ):
        Plan(loss=push)
