"""The tests of the tests: small faults in the code, one at a time, that some test has to notice.

mutmut makes the faults (a changed sign, a missing argument, another constant, ...). Each is tried
in a separate process, forked from one that has imported the libraries. No file is changed. mutmut
leaves out properties and the tables of a module, because it changes functions in place. This script
tries them, too.

    python tests/mutants.py --output FILE [--limit N] [--again] [module ...]
"""

from __future__ import annotations

import argparse
import difflib
import gc
import hashlib
import importlib
import importlib.abc
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from typing import Any, NamedTuple

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import MutationVisitor
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import IgnoredCode

ROOT = Path(__file__).parents[1]

# Of each module the tests that are to notice, as pytest's arguments: quick ones, in one process.
TESTS = {
    "attacks.norms": ["attacks/test_norms.py", "attacks/test_closed_form.py"],
    "attacks.apgd": ["attacks/test_apgd.py"],
    "attacks.loop": [f"attacks/test_{name}.py" for name in ("closed_form", "properties", "apgd")],
    "attacks.draws": ["attacks/test_draws.py", "attacks/test_norms.py"],
    "attacks.settings": ["attacks/test_settings.py", "attacks/test_closed_form.py"],
    "lm.packing.pack": ["lm/test_pack.py"],
    "lm.packing.trie": ["lm/test_pack.py"],
    "lm.engine.scoring": [
        "lm/test_scoring.py",
        "lm/test_definitions.py",
        "-k",
        "scoring or look_up",
    ],
    "lm.losses": ["lm/test_losses.py"],
    "stats": ["suite/test_inference.py"],
    "suite.analysis.summary": ["suite/test_summary.py", "-k", "not imports_neither"],
    "suite.run.store": ["suite/test_store.py"],
}

# What all of them import, but for the package itself.
LIBRARIES = (
    "_hypothesis_pytestplugin",
    "hypothesis.extra.numpy",
    "lm_eval.tasks._index",
    "numpy.testing",
    "pandas",
    "pytest",
    "scipy.stats",
    "statsmodels.stats.proportion",
    "torch",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gemma2", "gpt2", "llama")),
)

# What tests may take with a fault, if they take t seconds without: SLOWER * t + SECONDS, of the
# processor's time and of a clock's.
SLOWER, SECONDS = 8, 10


class _Everywhere(MutationVisitor):
    """Also in functions with a decorator; but not in texts, whose wording is nobody's promise."""

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.SimpleString) and " " in node.value:
            return True
        if isinstance(node, cst.FunctionDef):
            node = node.with_changes(decorators=[])
        return super()._skip_node_and_children(node)


class Faults:
    """All that mutmut knows for a source, in the order of the source."""

    def __init__(self, source: str) -> None:
        wrapper = MetadataWrapper(cst.parse_module(source))
        visitor = _Everywhere(mutation_operators, IgnoredCode(set(), set(), set()))
        self.source, self._module = source, wrapper.visit(visitor)
        self._changes = visitor.mutations
        self._positions = wrapper.resolve(PositionProvider)

    def __len__(self) -> int:
        return len(self._changes)

    def changed(self, number: int) -> str:
        """The source with one fault."""
        change = self._changes[number]
        return self._module.deep_replace(change.original_node, change.mutated_node).code

    def shown(self, number: int) -> str:
        """The line's number, and the lines that differ without and with the fault."""
        line = self._positions[self._changes[number].original_node].start.line
        both = self.source.splitlines(), self.changed(number).splitlines()
        differing = (line for line in difflib.ndiff(*both) if line[0] in "+-")
        return "\n".join([f"line {line}", *differing])


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module from the source given."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name, self.path, self.source = name, path, source

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return spec_from_loader(name, self) if name == self.name else None

    def get_filename(self, _: str) -> str:
        return str(self.path)

    def get_data(self, _: str) -> bytes:
        return self.source.encode()


class Took(NamedTuple):
    """Seconds."""

    cpu: float
    clock: float


def tried(module: str, source: str, clean: Took | None) -> tuple[str, Took]:
    """What a module's tests say of a source, and how long they took.

    Returns:
        `killed`, `survived`, or `timeout`: much longer than `clean`.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = _run(module, source, clean, folder)
            finally:
                os._exit(code)
        _, status, usage = os.wait4(child, 0)
    took = Took(usage.ru_utime + usage.ru_stime, time.monotonic() - began)
    if os.WIFSIGNALED(status):
        late = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM)
        return "timeout" if late else "killed", took
    return "killed" if os.WEXITSTATUS(status) else "survived", took


def _run(module: str, source: str, clean: Took | None, folder: str) -> int:
    import pytest

    if clean is not None:
        cpu, clock = (round(SLOWER * of + SECONDS) for of in clean)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        signal.alarm(clock)
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    sys.meta_path.insert(0, _Changed(f"llm_attack.{module}", _path(module), source))
    options = ["-x", "-q", "--tb=no", "--hypothesis-profile=repeatable"]
    plugins = ["-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin"]
    os.chdir(ROOT / "tests")
    return int(pytest.main([*options, *plugins, f"--basetemp={folder}/tests", *TESTS[module]]))


def examine(module: str, limit: int, found: dict[str, Any], again: bool) -> Iterator[str]:
    """Tries faults of a module, in an order drawn with a fixed seed, until `limit` were.

    Args:
        module: a key of `TESTS`.
        limit: how many.
        found: of before, and what is found is put there: `faults` that there are, and by their
            numbers the `verdicts` and the changes that `survived`.
        again: first try those again that survived.

    Yields:
        What there is to say after each.
    """
    source = _path(module).read_text()
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    if found.get("source") != digest:
        found.clear()
    faults = Faults(source)
    found |= {"source": digest, "faults": len(faults), "verdicts": {}, "survived": {}} | found
    order = [*range(len(faults))]
    random.Random(0).shuffle(order)
    if again:
        for number in found["survived"]:
            del found["verdicts"][number]
        found["survived"] = {}
    todo = [number for number in order[:limit] if str(number) not in found["verdicts"]]
    verdict, took = tried(module, source, None)
    if verdict != "survived":
        raise SystemExit(f"{module}: its tests fail without a fault")
    yield f"{module}: {len(todo)} of {len(faults)} faults; its tests take {took.cpu:.1f} s"
    for number in todo:
        verdict, _ = tried(module, faults.changed(number), took)
        found["verdicts"][str(number)] = verdict
        if verdict == "survived":
            found["survived"][str(number)] = faults.shown(number)
        yield "" if verdict == "killed" else f"{verdict}: {faults.shown(number)}"


def _path(module: str) -> Path:
    return ROOT / "llm_attack" / (module.replace(".", "/") + ".py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", choices=[[], *TESTS], metavar="module")
    parser.add_argument("--limit", type=int, default=10**6, help="of each module, at most")
    parser.add_argument("--again", action="store_true", help="those that survived before, too")
    parser.add_argument("--output", type=Path, help="JSON, where it goes on", required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # forks have no threads of their own
    sys.path.insert(0, str(ROOT))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.dont_write_bytecode = False  # the tests are compiled once
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # forks need not look through what is there for good
    output = arguments.output
    known = json.loads(output.read_text()) if output.exists() else {}
    for module in arguments.modules or TESTS:
        found = known.setdefault(module, {})
        for line in examine(module, arguments.limit, found, arguments.again):
            if line:
                print(line, flush=True)
            output.write_text(json.dumps(known, indent=1) + "\n")
    print(table(known))


def table(known: dict[str, Any]) -> str:
    """Markdown of what was found."""
    rows = ["| module | faults | tried | killed | out of time | survived | noticed |"]
    rows.append("|---" * 7 + "|")
    for module, found in known.items():
        of = Counter(found["verdicts"].values())
        noticed = 1 - of["survived"] / of.total()
        counts = (found["faults"], of.total(), of["killed"], of["timeout"], of["survived"])
        rows.append(f"| `{module}` | {' | '.join(map(str, counts))} | {noticed:.0%} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
