"""The Dockerfile, which no test builds: its instructions, its files, its command."""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on

ROOT = Path(__file__).parents[1]
KNOWN = {"FROM", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}


def instructions():
    """(instruction, the rest of its line) of the Dockerfile."""
    lines = (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    kept = [line for line in lines if line.strip() and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in kept)]


def of(word):
    return [rest for instruction, rest in instructions() if instruction == word]


def copied(target):
    """Makes in a folder what the image's working folder has before anything is installed."""
    for rest in of("COPY"):
        *sources, place = rest.split()
        for source in sources:
            path = ROOT / source
            assert path.exists(), source
            if path.is_dir():
                leave_out = shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, target / place, ignore=leave_out)
            else:
                assert place == "./"
                shutil.copy(path, target / source)


def test_instructions():
    """A fixed release of Python that the project supports; no root at the end; no shell forms."""
    words = [word for word, _ in instructions()]
    assert words[0] == "FROM" and set(words) == KNOWN
    (image,) = of("FROM")
    name, _, tag = image.partition(":")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    version = tag.partition("-")[0]
    assert name == "python"
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]
    (user,) = of("USER")
    assert f"useradd --create-home {user}" in of("RUN")
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")
    for word in ("ENTRYPOINT", "CMD"):
        (form,) = of(word)
        assert isinstance(json.loads(form), list)
    program, *_ = json.loads(of("ENTRYPOINT")[0])
    assert program in project["scripts"]


@pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling is not installed")
@pytest.mark.slow
def test_what_is_copied_installs_and_runs(tmp_path):
    """`pip install` of the files that are copied and no others, then ENTRYPOINT with CMD."""
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    copied(source)
    install, _ = of("RUN")
    assert install == "pip install --no-cache-dir -c constraints.txt ."
    words = [sys.executable, "-m", *install.split()]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*words, *offline], cwd=source, check=True, capture_output=True)
    words = [*json.loads(of("ENTRYPOINT")[0]), *json.loads(of("CMD")[0])]
    done = subprocess.run(
        [str(target / "bin" / words[0]), *words[1:]],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "reproduce" in done.stdout, done.stderr
    assert (target / "llm_attack" / "tasks").is_dir()


def test_constraints_name_what_the_project_needs():
    pinned = (ROOT / "constraints.txt").read_text("utf-8").lower()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for need in project["dependencies"]:
        name = need.split(">")[0].lower().replace("-", "[-_]")
        assert re.search(rf"^{name}==", pinned, re.MULTILINE), name
