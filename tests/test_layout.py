"""Which part of the package may import which."""

import ast
import sys
from pathlib import Path

import pytest

import llm_attack

PACKAGE = Path(llm_attack.__file__).parent
BOTTOM = {"declare", "drawing", "errors", "failures", "folder", "inference", "record", "redact"}

# Of each part, the parts that it may import; those at the bottom, every one above them may.
ARROWS = {
    "declare": {"errors"},
    "drawing": {"failures", "record"},
    "errors": {"redact"},
    "failures": {"errors", "redact"},
    "folder": {"errors", "record"},
    "record": {"failures", "redact"},
    "inference": set(),
    "redact": set(),
    "reproduce": BOTTOM,
    "attacks": BOTTOM,
    "lm": BOTTOM | {"attacks"},
    "demo": BOTTOM,
    "harness": BOTTOM | {"_shim", "attacks", "demo", "lm"},
    "suite": BOTTOM | {"attacks", "harness", "lm"},
    "vision": BOTTOM | {"attacks", "reproduce"},
    "theory": BOTTOM | {"attacks", "reproduce", "vision"},
    "_shim": set(),
}
ABOVE = {"__init__", "__main__", "cli"}  # which may import every part


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_part_has_its_arrows():
    parts = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/*.py")}
    assert parts - {"tasks", PACKAGE.name} == ARROWS.keys() | ABOVE


@pytest.mark.parametrize("part", ARROWS)
def test_arrows_point_one_way(part):
    """What a part imports of the package, itself aside; nothing imports the command line."""
    for path in [PACKAGE / f"{part}.py", *(PACKAGE / part).rglob("*.py")]:
        names = imported(path) if path.exists() else ()
        parts = {name.split(".")[1] for name in names if name.startswith("llm_attack.")}
        assert parts - {part, "__version__"} <= ARROWS[part], path


def test_no_module_is_named_as_one_of_pythons_own():
    names = {path.stem for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert not names & sys.stdlib_module_names


def test_one_door_to_lm_eval():
    for path in PACKAGE.rglob("*.py"):
        names = [name for name in imported(path) if name.split(".")[0] == "lm_eval"]
        assert not names or path.parent == PACKAGE / "harness", path


def test_the_attacks_know_torch_alone():
    """And the standard library; of the package, what is at the bottom."""
    standard = {
        "__future__",
        "collections",
        "dataclasses",
        "functools",
        "hashlib",
        "math",
        "typing",
    }
    known = standard | {"torch"}
    for path in (PACKAGE / "attacks").glob("*.py"):
        assert {name.split(".")[0] for name in imported(path)} <= {*known, "llm_attack"}, path
