"""Which part of the package may import which."""

import ast
from pathlib import Path

import pytest

import llm_attack

PACKAGE = Path(llm_attack.__file__).parent
ORDER = ["attacks", "lm", "harness", "suite"]  # each imports those before it


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("part", ORDER)
def test_arrows_point_one_way(part):
    behind = tuple(f"llm_attack.{name}" for name in [*ORDER[ORDER.index(part) + 1 :], "cli"])
    for path in (PACKAGE / part).glob("*.py"):
        assert not [name for name in imported(path) if name.startswith(behind)], path


def test_one_door_to_lm_eval():
    for path in PACKAGE.rglob("*.py"):
        names = [name for name in imported(path) if name.split(".")[0] == "lm_eval"]
        assert not names or path.parent == PACKAGE / "harness", path
