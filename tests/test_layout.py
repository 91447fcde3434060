"""Which part of the package may import which: rooms, and the arrows between them."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import llm_attack

PACKAGE = Path(llm_attack.__file__).parent
ROOT = PACKAGE.name

# The rooms of each storey may import those below it, and whatever is named beside them.
BASE = {"base", "stats"}
LM = {"lm", "lm.packing", "lm.network", "lm.engine"}
ANALYSIS = {"suite.analysis"}
REPORT = {*ANALYSIS, "suite.report"}
RUN = {"suite.plan", "suite.results", "suite.run"}
RESULTS = {"suite.results", "suite.plan"}

ARROWS = {
    "base": set(),
    "stats": set(),
    "_shim": set(),
    "attacks": BASE,
    "demo": BASE,
    "lm.packing": BASE | {"attacks"},
    "lm": BASE | {"attacks", "lm.packing"},
    "lm.network": BASE | {"attacks", "lm", "lm.packing"},
    "lm.engine": BASE | {"attacks", "lm", "lm.packing", "lm.network"},
    "harness": BASE | LM | {"_shim", "attacks", "demo"},
    "suite.plan": BASE | {"attacks", "lm", "harness"},
    "suite.results": BASE | REPORT | {"lm", "suite.plan"},
    "suite.analysis": BASE | {"attacks", "lm", "suite.plan"},
    "suite.run": BASE | LM | RESULTS | ANALYSIS | {"attacks", "harness"},
    "suite.report": BASE | ANALYSIS | {"attacks", "lm"},
    "suite.studies": BASE | REPORT | RESULTS | {"attacks", "lm"},
    "suite": BASE | LM | REPORT | RUN | {"demo", "harness", "suite.studies"},
    "reproduce": BASE,
    "vision": BASE | {"attacks", "reproduce"},
    "theory": BASE | {"attacks", "reproduce", "vision"},
    "experiments": BASE | {"reproduce", "theory", "vision"},
    "cli": BASE | {"", "experiments", "harness", "suite", "suite.plan"},
    "__main__": {"cli"},
}


def name_of(path):
    """The dotted name of a module inside the package, such as `suite.run.store`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py") if "tasks" not in path.parts}


def imported(path):
    """What a file imports, wherever in it: also in functions, and for types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_of(path):
    """The modules of the package that a file imports."""
    for name in imported(path):
        if name.partition(".")[0] == ROOT:
            inside = name.partition(".")[2]
            yield inside if inside in MODULES else inside.rpartition(".")[0]


def room_of(module):
    return max(
        (room for room in ARROWS if module == room or module.startswith(f"{room}.")),
        key=len,
        default="",
    )


def test_every_module_has_a_room():
    assert {room_of(module) for module in MODULES} == ARROWS.keys() | {""}
    assert [module for module in MODULES if not room_of(module)] == [""]


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_point_one_way(room):
    """What a room imports of the package, itself aside; nothing imports the command line."""
    for module, path in MODULES.items():
        if room_of(module) == room:
            rooms = {room_of(other) for other in modules_of(path)} - {room}
            # of the package itself, its version alone
            assert rooms <= ARROWS[room] | {""}, module


def test_the_page_shows_the_arrows():
    """The table of rooms in docs/architecture.md; `base` and `stats` are allowed everywhere."""
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \|[^|]*\|([^|]*)\|$", text.split("## Rooms")[1], re.M)
    shown = {room: set(re.findall(r"`([\w.]+)`", names)) for room, names in rows}
    hidden = {*BASE, "", "_shim", "__main__"}
    assert shown == {room: to - hidden for room, to in ARROWS.items() if room not in hidden - BASE}


def test_no_circles():
    """Also none in functions, and none for types alone."""
    graph = {module: set(modules_of(path)) - {module, ""} for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_module_is_named_as_one_of_pythons_own():
    names = {path.stem for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert not names & sys.stdlib_module_names


def test_one_door_to_lm_eval():
    for path in PACKAGE.rglob("*.py"):
        names = [name for name in imported(path) if name.split(".")[0] == "lm_eval"]
        assert not names or path.parent == PACKAGE / "harness", path


def test_the_attacks_know_torch_alone():
    """And the standard library; of the package, what is at the bottom."""
    for path in (PACKAGE / "attacks").glob("*.py"):
        others = {name.split(".")[0] for name in imported(path)} - sys.stdlib_module_names
        assert others <= {"torch", ROOT}, path


LIGHT = [
    "import llm_attack",
    "import llm_attack.attacks.settings, llm_attack.lm.settings, llm_attack.suite.plan",
    "import llm_attack.suite.results, llm_attack.suite.render, llm_attack.suite.commands",
    *(
        f"from llm_attack.cli import main; main({words!r}, standalone_mode=False)"
        for words in (
            ["--help"],
            ["run", "--help"],
            ["report", "--help"],
            ["compare", "--help"],
            ["doctor", "--help"],
            ["reproduce", "--help"],
            *(["reproduce", name, "--help"] for name in ("fig1", "fig2", "fig4", "fig5", "fig6")),
            ["reproduce", "relation", "--help"],
            ["reproduce", "tradeoff", "--help"],
        )
    ),
]


def test_reading_needs_no_engine():
    """Neither torch nor lm-eval is imported by what only reads, or only says what there is."""
    heavy = "{'torch', 'transformers', 'lm_eval'} & set(sys.modules)"
    lines = [f"{code}\nassert not {heavy}, {code!r}" for code in LIGHT]
    code = "\n".join(["import sys", *lines])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
