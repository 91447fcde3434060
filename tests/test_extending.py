"""The diffs of docs/extending.md apply, and what they add works."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from shown import ROOT

DIFFS = dict(
    re.findall(
        r"^## (A new [\w ]+)$.*?^```diff\n(.*?)^```$",
        (ROOT / "docs" / "extending.md").read_text("utf-8"),
        re.MULTILINE | re.DOTALL,
    )
)

USE = """
import torch
from click.testing import CliRunner
from llm_attack.attacks import ATTACKS, NORMS, Attack, perturb
from llm_attack.cli import main
from llm_attack.lm.units import Signal
from llm_attack.lm.settings import AttackSettings


def test_use():
    x, w = torch.zeros(2, 3), torch.tensor([[1.0, -2.0, 3.0], [0.0, 5.0, -4.0]])
    assert ATTACKS["nifgsm"].lookahead
    found = perturb(Attack("nifgsm", 0.5), x, lambda point: (w * point).sum(1))
    assert torch.equal(found, 0.5 * w.sign())

    settings = AttackSettings(loss="lead", norm="l1_token", epsilon="0.5rms", hookpoint="middle")
    assert settings.needs_gold and "l1" in NORMS
    assert settings.resolved(Signal(0.1, 64, 0.9)).epsilon == 0.5 * (0.1 * 64)

    shown = CliRunner().invoke(main, ["run", "--help"])
    assert shown.exit_code == 0 and "--shrink" in shown.output and "nifgsm" in shown.output
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
        "attack",
        "loss",
        "norm",
        "hookpoint",
        "figure",
        "setting",
    ]
    assert all("+++ b/tests/" in diff and "+++ b/llm_attack/" in diff for diff in DIFFS.values())


def test_what_they_add_works(extended):
    """In use, and by the tests that they bring."""
    (extended / "tests" / "test_use.py").write_text(USE)
    tests = ["tests/test_use.py", "tests/attacks/test_closed_form.py::test_many_classes"]
    for diff in DIFFS.values():
        for change in re.split(r"^--- a/", diff, flags=re.MULTILINE)[1:]:
            names = re.findall(r"^\+def (test_\w+)", change, re.MULTILINE)
            tests += [f"{change.splitlines()[0]}::{name}" for name in names]
    assert len(tests) == 8
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--noconftest", *tests],
        cwd=extended,
        env=os.environ | {"PYTHONPATH": str(extended), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout
