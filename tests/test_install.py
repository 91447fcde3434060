"""Files that pip installs and removes in a fresh environment; stock `lm_eval` finds the model.

The fresh environment sees torch, transformers and lm-eval through a line in its own `.pth` file.
The interpreter does not start the `.pth` files of folders that it reaches in this way. So only the
installation of this test is started.
"""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed")
pytest.importorskip("build", reason="build is not installed")
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

import llm_attack

ROOT = Path(__file__).parents[1]
LM_EVAL = Path(sysconfig.get_path("scripts"), "lm_eval")


def call(*command, cwd):
    """What a command prints, run away from the source tree; it has to succeed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


class Environment:
    """A fresh virtual environment, with the present one's libraries in reach."""

    def __init__(self, root):
        self.root = root
        venv.create(root, with_pip=False)  # pip is among the libraries in reach
        self.python = root / "bin" / "python"
        packages = call(
            self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=root
        )
        self.packages = Path(packages.strip())
        libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (self.packages / "zz_libraries.pth").write_text("\n".join(libraries))

    def run(self, *arguments):
        return call(self.python, *arguments, cwd=self.root)

    def pip(self, *arguments):
        return self.run("-m", "pip", "--disable-pip-version-check", *arguments)

    def ours(self):
        """Files and folders of this project, by their names."""
        found = (path.relative_to(self.root) for path in self.root.rglob("*llm*attack*"))
        return {path for path in found if path.parts[0] != "out"}

    def check_started(self):
        """The shim ran at start, compiled; lm-eval then knows the name, the package stays out."""
        code = "import sys; print(sys.modules['_llm_attack_shim'].__spec__.cached)"
        cached = Path(self.run("-c", code).strip())
        assert cached.parent == self.packages / "__pycache__"
        assert cached.exists()
        code = (
            "import lm_eval.models, sys; from lm_eval.api.registry import MODEL_REGISTRY as models;"
            "print('attacked-hf' in models, 'llm_attack' in sys.modules)"
        )
        assert self.run("-c", code).splitlines()[-1] == "True False"

    def check_entry_points(self):
        code = (
            "from importlib.metadata import distribution;"
            "print(*((e.group, e.name, e.value) for e in distribution('llm-attack').entry_points))"
        )
        assert set(self.run("-c", code).strip().replace(") (", ")\n(").splitlines()) == {
            "('console_scripts', 'llm-attack', 'llm_attack.__main__:main')",
            "('lm_eval.models', 'attacked-hf', 'llm_attack.harness.model:AttackedHFLM')",
        }
        assert (self.python.parent / "llm-attack").exists()

    def check_lm_eval(self, tasks):
        """The literal console script of lm-eval runs an attack, end to end."""
        printed = self.run(
            *(LM_EVAL, "--model", "attacked-hf", "--model_args", "pretrained=demo,attack=fgsm"),
            *("--include_path", tasks, "--tasks", "demo_piqa", "--limit", "4"),
        )
        assert "|demo_piqa|" in printed.replace(" ", "")

    def check_uninstall(self):
        self.pip("uninstall", "--yes", "llm-attack")
        assert self.ours() == set()
        assert self.run("-c", "import sys; print('_llm_attack_shim' in sys.modules)") == "False\n"


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "environment")


def relative_files(folder):
    """Files below a folder that belong to the source, as paths relative to it."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix() for path in files}


def build(folder, *kinds):
    """The wheel that `python -m build` makes of the source tree."""
    command = (sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", folder, ROOT)
    call(*command, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("tree"), "--wheel")


def expected_files():
    """What a wheel has in the folder of the package."""
    return relative_files(ROOT / "llm_attack") | {
        f"tasks/{name}" for name in relative_files(ROOT / "tasks")
    }


def test_the_wheel_holds_the_package_and_its_tasks(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {name.removeprefix("llm_attack/") for name in names if name.startswith("llm_attack/")}
    assert package == expected_files()
    assert {"_llm_attack_shim.py", "llm_attack_shim.pth"} <= names


@pytest.mark.slow
def test_wheel(environment, wheel):
    environment.pip("install", "--no-index", "--no-deps", wheel)

    installed = environment.packages
    assert relative_files(installed / "llm_attack") == expected_files()
    for name in ("_llm_attack_shim.py", "llm_attack_shim.pth"):
        assert (installed / name).read_text() == (ROOT / name).read_text()

    environment.check_entry_points()
    environment.check_started()
    environment.check_lm_eval(installed / "llm_attack" / "tasks")
    environment.check_uninstall()


@pytest.mark.slow  # the tests themselves run in an editable install
def test_editable(environment):
    environment.pip("install", "--no-index", "--no-deps", "--no-build-isolation", "-e", ROOT)
    assert not (environment.packages / "llm_attack").exists()
    code = "import llm_attack; print(llm_attack.__file__)"
    assert environment.run("-c", code).strip() == str(ROOT / "llm_attack" / "__init__.py")

    environment.check_entry_points()
    environment.check_started()
    environment.check_lm_eval(ROOT / "tasks")
    environment.check_uninstall()


@pytest.mark.slow
def test_source_distribution_builds_the_same_wheel(wheel, tmp_path):
    # neither kind named: by way of an sdist
    assert build(tmp_path).read_bytes() == wheel.read_bytes()
    (archive,) = tmp_path.glob("*.tar.gz")
    call(sys.executable, "-m", "tarfile", "-e", archive, tmp_path, cwd=tmp_path)
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    call(sys.executable, "docs/pages.py", tmp_path / "site", cwd=source)  # no link leads nowhere


def test_links_of_the_readme_hold_away_from_the_repository(monkeypatch):
    """On a package index there is no file beside the README."""
    address = "https://github.com/somebody/llm_attack"
    monkeypatch.delenv("REPOSITORY", raising=False)
    plain = ProjectMetadata(str(ROOT), PluginManager()).core
    monkeypatch.setenv("REPOSITORY", f"{address}/")
    known = ProjectMetadata(str(ROOT), PluginManager()).core

    assert plain.readme == (ROOT / "README.md").read_text("utf-8")
    assert list(plain.urls) == ["Paper"]
    links = re.findall(r"\]\(([^)]+)\)", known.readme)
    assert len(links) == len(re.findall(r"\]\(", plain.readme)) > 20
    assert all(link.startswith("https://") for link in links)
    inside = re.compile(rf"{address}/(blob|raw)/v{llm_attack.__version__}/([^#]+)(#.*)?")
    ours = [inside.fullmatch(link) for link in [*links, *known.urls.values()] if address in link]
    files = [match for match in ours if match]
    assert all((ROOT / match[2]).is_file() for match in files)
    kinds = {Path(match[2]).suffix: match[1] for match in files}
    assert kinds[".md"] == "blob" and kinds[".png"] == "raw"
    assert {"Repository", "Documentation", "Changelog", "Issues"} < set(known.urls)


@pytest.mark.parametrize("address", ["http://github.com/a/b", "github.com/a/b", "https://x.org"])
def test_an_address_that_is_none(address, monkeypatch):
    monkeypatch.setenv("REPOSITORY", address)
    with pytest.raises(ValueError, match=re.escape(f"REPOSITORY={address}: must be the https")):
        _ = ProjectMetadata(str(ROOT), PluginManager()).core.urls
