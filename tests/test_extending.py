"""The content of docs/extending.md works: the user's own functions, and diffs of the package."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from shown import ROOT

from llm_attack import Plan, evaluate
from llm_attack.attacks import Attack, perturb
from llm_attack.lm.engine.choices import ChoiceScores
from llm_attack.lm.losses import LOSSES, known_loss
from llm_attack.lm.packing.questions import Question, Request
from llm_attack.lm.units import UNITS, known_unit

PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
FUNCTIONS = re.findall(r"^```python\n(def (\w+).*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
DIFFS = dict(
    re.findall(r"^## (A new [\w ]+)$.*?^```diff\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
)

USE = """
from click.testing import CliRunner
from llm_attack.attacks import NORMS
from llm_attack.cli import main
from llm_attack.lm.units import Signal
from llm_attack.lm.settings import AttackSettings


def test_use():
    settings = AttackSettings(loss="choice", norm="l1_token", epsilon="0.5rms", hookpoint="middle")
    assert settings.needs_gold and "l1" in NORMS
    assert settings.resolved(Signal(0.1, 64, 0.9)).epsilon == 0.5 * (0.1 * 64)

    shown = CliRunner().invoke(main, ["run", "--help"])
    assert shown.exit_code == 0 and "--shrink" in shown.output
    assert AttackSettings(attack="bim", shrink=0.5).attack_in_units.shrink == 0.5
"""


def apply(diff, folder, *options):
    """`git apply`, as in a folder that belongs to no repository."""
    done = subprocess.run(
        ["git", "apply", *options, "-"],
        cwd=folder,
        env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)},
        input=diff,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the project with all diffs, each of which applies to the present code by itself."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path_factory.mktemp("extended")
    for name in ("llm_attack", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for diff in DIFFS.values():
        apply(diff, folder, "--check")
    for diff in DIFFS.values():
        apply(diff, folder)
    return folder


def test_diffs_are_found():
    assert [title.removeprefix("A new ") for title in DIFFS] == [
        "norm",
        "hookpoint",
        "figure",
        "setting",
    ]
    assert all("+++ b/tests/" in diff and "+++ b/llm_attack/" in diff for diff in DIFFS.values())


def test_diffs_apply(extended):
    for diff in DIFFS.values():
        for name in re.findall(r"^\+\+\+ b/(.+)$", diff, re.MULTILINE):
            assert (extended / name).read_bytes() != (ROOT / name).read_bytes()


@pytest.mark.slow
def test_what_they_add_works(extended):
    """In use, and by the tests that they bring."""
    (extended / "tests" / "test_use.py").write_text(USE)
    tests = ["tests/test_use.py"]
    for diff in DIFFS.values():
        for change in re.split(r"^--- a/", diff, flags=re.MULTILINE)[1:]:
            names = re.findall(r"^\+def (test_\w+)", change, re.MULTILINE)
            tests += [f"{change.splitlines()[0]}::{name}" for name in names]
    assert len(tests) == 6
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--noconftest", *tests],
        cwd=extended,
        env=os.environ | {"PYTHONPATH": str(extended), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The functions in files of their own, in the working folder."""
    assert [name for _, name in FUNCTIONS] == ["nifgsm", "lead", "median_peak"]
    modules = ("my_attacks", "my_losses", "my_units")
    for (code, _), module in zip(FUNCTIONS, modules, strict=True):
        (tmp_path / f"{module}.py").write_text(code)
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_attack_is_that_of_torchattacks(own):
    torchattacks = pytest.importorskip("torchattacks", reason="make attack-libs")
    torch.manual_seed(0)
    layers = torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    network = torch.nn.Sequential(*layers).double().eval()
    x, labels = torch.rand(5, 3, 2, 2).double(), torch.tensor([0, 1, 2, 0, 1])
    theirs = torchattacks.NIFGSM(network, eps=0.1, alpha=0.02, steps=5, decay=0.7)

    def loss(point):
        return torch.nn.functional.cross_entropy(network(point), labels, reduction="none")

    attack = Attack("my_attacks:nifgsm", 0.1, steps=5, step_size=0.02, decay=0.7)
    found = perturb(attack, x, loss, bounds=(0, 1))
    torch.testing.assert_close(found, theirs(x, labels), rtol=0, atol=1e-12)


def test_the_loss_on_numbers(own):
    assert known_loss("my_losses:lead")
    requests = [Request((1, 2, i), 1) for i in range(3)]
    choices = ChoiceScores([Question(requests, [[0], [1], [2]], [False, True, False])])
    found = LOSSES["my_losses:lead"].value(torch.tensor([-1.0, -4.0, -2.0]), choices)
    assert found.tolist() == [2.5]


def test_the_scale_on_numbers(own):
    assert known_unit("my_units:median_peak")
    peaks = torch.tensor([[1.0, 0.0], [-5.0, 2.0], [0.5, 2.0]])
    assert UNITS["my_units:median_peak"].measured(peaks) == 2


def test_a_run_with_all(own, one_index):
    """The command of the page, with the loss: its answers are worse, and say by what."""
    plan = Plan("demo", "demo_piqa", attacks=["none", "my_attacks:nifgsm"], limit=20)
    of_peak = replace(plan, epsilon_unit="my_units:median_peak", epsilons=0.2, limit=4)
    result = evaluate(of_peak, progress="quiet")
    assert "my_attacks:nifgsm@0.2my_units:median_peak" in result.conditions
    result = evaluate(replace(plan, loss="my_losses:lead", epsilons="0.3rms"), progress="quiet")
    mean = result.table[result.table["task"] == "mean"].set_index("attack")["acc"]
    assert mean["my_attacks:nifgsm"] < mean["none"]
