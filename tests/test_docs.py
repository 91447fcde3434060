"""The commands and code of the documentation run."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import pairwise

import click
import pytest
from click.testing import CliRunner
from shown import PAGES, ROOT, commands, rule_of

from llm_attack.cli import main
from llm_attack.demo import MODEL_PATH

SHOWN = list(dict.fromkeys(c for page in PAGES for c in commands(page.read_text("utf-8"))))


def blocks(name):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def own_task(folder):
    """Writes the questions and the task of `docs/how/task.md`."""
    text = (ROOT / "docs/how/task.md").read_text(encoding="utf-8")
    (questions, task) = re.findall(r"```(?:json|yaml)\n(.*?)```", text, re.DOTALL)
    (folder / "my_tasks").mkdir()
    (folder / "capitals.jsonl").write_text(questions)
    (folder / "my_tasks" / "capitals.yaml").write_text(task)


@pytest.fixture
def one_task(monkeypatch):
    """The example's settings, with fewer questions."""
    import llm_attack
    from llm_attack.suite.evaluate import evaluate

    def fewer(plan):
        return evaluate(replace(plan, limit=6), progress="quiet")

    monkeypatch.setitem(vars(llm_attack), "evaluate", fewer)


def test_library(one_task):
    evaluation, loaded, attack, *_ = blocks("library.md")
    names = {}
    exec(evaluation, names)
    assert set(names["table"].index.get_level_values("condition")) == {
        "none",
        "random@0.005",
        "random@0.01",
        "fgsm@0.005",
        "fgsm@0.01",
    }
    assert len(names["samples"]) == 6 * 5
    assert {"question", "choices"} <= set(names["samples"])
    assert list(names["wide"]) == sorted(names["table"].index.unique("condition"))
    exec(loaded, names)
    assert names["result"].run["model_name"] == "half" and len(names["result"].samples) == 6 * 2
    (loaded,) = blocks("how/model.md")
    exec(loaded, names)
    assert len(names["result"].samples) == 6 * 4
    exec(attack, names)
    assert 0 < (names["attacked"] - names["x"]).abs().max() <= 8 / 255 + 1e-6


def test_recipes_of_tokens(monkeypatch, tmp_path):
    """The recipes of `docs/library.md`: twenty lines at most, and what the page says of them."""
    start, norms, nearest, universal, saving = blocks("library.md")[3:]
    assert all(block.count("\n") <= 20 for block in (norms, nearest, universal, saving))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(start, names)
    log_loss, ids, clean, attacked = (names[n] for n in ("log_loss", "ids", "clean", "attacked"))
    assert log_loss(attacked, ids) > log_loss(clean, ids)
    exec(norms, names)
    assert names["norms"].square().sum().sqrt() == pytest.approx(0.2, abs=1e-6)
    assert names["norms"][-1] == 0 and (names["norms"][:-1] > 0).all()
    exec(nearest, names)
    matrix = names["embedding"].weight
    for i, token in enumerate(ids[0]):
        others = (matrix - clean[0, i]).norm(dim=-1)
        others[token] = float("inf")
        assert names["gaps"][i] == pytest.approx(float(others.min()), rel=1e-3)
        found = (matrix - attacked[0, i]).norm(dim=-1)
        assert found[names["nearest"][i]] == pytest.approx(float(found.min()), rel=1e-3)
    exec(universal, names)
    zero, control, direction = names["losses"]
    assert direction > control and direction > zero
    assert names["direction"].norm() == pytest.approx(0.1, abs=1e-6)
    assert names["control"].norm() == pytest.approx(0.1, abs=1e-6)
    exec(saving, names)
    assert (tmp_path / "perturbations.safetensors").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Of the pages as they stand; those of the site are checked as it is built."""
    for path in re.findall(r"\]\(([^):#]+)[)#]", page.read_text("utf-8")):
        assert (page.parent / path).exists(), path


def exists(name):
    """Whether `part.module.name` of the package is there."""
    parts = name.removeprefix("llm_attack.").split(".")
    for n in range(len(parts), -1, -1):
        module = ".".join(["llm_attack", *parts[:n]])
        with suppress(ImportError):
            found = import_module(module)
            break
    for part in parts[n:]:
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    """Modules, functions, classes of the package, and files and folders of the checkout."""
    text = page.read_text("utf-8")
    rooms = "attacks|lm|harness|suite|vision|theory|demo|inference|reproduce"
    names = set(re.findall(rf"`(llm_attack\.[a-z]\w*(?:\.\w+)*|(?:{rooms})(?:\.\w+)+)`", text))
    files = (".bib", ".py", ".csv", ".json", ".yaml", ".md", ".png", ".svg", ".parquet", ".html")
    for name in (name for name in names if not name.endswith(files)):
        assert exists(name), name
    for path in set(re.findall(r"`((?:llm_attack|tests|docs|benchmarks|results)/[\w./-]+)`", text)):
        assert (ROOT / path).exists(), path


def test_arguments_are_those_declared():
    """`python docs/arguments.py` writes the page anew."""
    spec = spec_from_file_location("arguments", ROOT / "docs" / "arguments.py")
    arguments = module_from_spec(spec)
    spec.loader.exec_module(arguments)
    page = arguments.PAGE.read_text("utf-8")
    assert all(table in page for table in arguments.tables().values())
    assert arguments.renewed(page) == page
    assert arguments.renewed(page.replace("| `steps` |", "| `stops` |")) == page


PAGE = """
    make demo          # all of it
    llm-attack run --model demo \\
      -o DIR

As `pip install .`, or `llm-attack run
--config suite.yaml`; `lm_eval` alone is a name, and `attack=fgsm` no command. Nor is this:

    from llm_attack import evaluate
    evaluate("demo")

1. In a list, twice:

```bash
make demo
nonsense --now
```
```python
make = "demo"
```
```yaml
make: demo
```
"""


def test_commands_are_found():
    assert commands(PAGE) == [
        "make demo",
        "llm-attack run --model demo -o DIR",
        "nonsense --now",
        "pip install .",
        "llm-attack run --config suite.yaml",
    ]
    with pytest.raises(ValueError, match="neither commands nor Python"):
        commands("\n\n    nonsense --now\n")


def test_commands_of_the_pages():
    """Those that nobody would take out, so that a parser that finds none fails."""
    assert {"make demo", "make bench", "pip install .", "llm-attack report DIR"} <= set(SHOWN)
    assert sum(c.startswith("lm_eval --model attacked-hf") for c in SHOWN) >= 3
    assert sum(c.startswith("llm-attack reproduce") for c in SHOWN) >= 10


@pytest.mark.parametrize("command", SHOWN)
def test_a_rule_knows_it(command):
    assert rule_of(command).reason


@pytest.mark.parametrize(
    "command", ["nonsense --now", "make", "llm-attack rum --model x/y", "python -m llm_attack.x"]
)
def test_a_command_that_no_rule_knows(command):
    with pytest.raises(LookupError, match=re.escape(command)):
        rule_of(command)


@pytest.mark.parametrize("command", [c for c in SHOWN if re.search(r"\bllm.attack .* -", c)])
def test_options_exist(command, monkeypatch, tmp_path):
    """As shown, nothing shortened: the command line takes it; nothing is computed."""
    monkeypatch.setattr(click.Command, "invoke", lambda self, context: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite.yaml").write_text("attacks: [none, fgsm]")
    words = shlex.split(re.split(r"\bllm.attack ", command)[1])
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output


def call(words, cwd):
    """What a command printed; it has to succeed. `python` and the others are those of here."""
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))
    done = subprocess.run(
        words,
        cwd=cwd,
        env=os.environ | {"PATH": path},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with what the commands name: runs, settings, words, and what a checkout has."""
    folder = tmp_path_factory.mktemp("shown")
    settings = {"model": "demo", "tasks": "demo_piqa", "attacks": ["none", "fgsm"], "limit": 4}
    for name in ("DIR", "DIR_A"):
        (folder / "suite.yaml").write_text(json.dumps({**settings, "output": name}))
        call([sys.executable, "-m", "llm_attack", "run", "--config", "suite.yaml"], folder)
    shutil.copytree(folder / "DIR_A", folder / "DIR_B")
    for name in ("step1", "step2"):
        shutil.copytree(MODEL_PATH, folder / "checkpoints" / name)
    (folder / "suite.yaml").write_text(json.dumps({**settings, "output": "of-settings"}))
    rows = [f"{w}{i},en,{w}" for w in ("negative", "neutral", "positive") for i in range(20)]
    (folder / "words.csv").write_text("\n".join(["word,language,label", *rows]))
    (folder / "my_attacks.py").write_text(blocks("how/attack.md")[0])
    own_task(folder)
    for name in ("benchmarks", "docs", "examples", "tasks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", SHOWN)
def test_command(command, prepared, tmp_path):
    """With real data, where they are, the six benchmarks and a small Llama instead of the demo."""
    rule = rule_of(command)
    if find_spec(rule.needs) is None:
        pytest.skip(f"{rule.needs} is not installed")
    data = os.environ.get("LLM_ATTACK_TEST_DATA")
    if rule.data and not data:
        pytest.skip("LLM_ATTACK_TEST_DATA is not set: no real data on this machine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = rule.shortened(
        command,
        {
            "model": f"{data}/models/stories260K" if data else str(MODEL_PATH),
            "prefix": "" if data else "demo_",
            "six": "paper_six" if data else "demo_six",
            "easy": "arc_easy" if data else "demo_arc_easy",
            "default_tasks": "" if data else "--tasks demo_six",
            "include": "" if data else "--include_path tasks",
            "mnist": "mnist" if data else "digits",
            "cifar10": "cifar10" if data else "digits",
            "port": str(port),
            "root": str(ROOT),
        },
    )
    folder = shutil.copytree(prepared, tmp_path / "here", symlinks=True)
    call(words, ROOT if rule.at_root else folder)
    for option, value in pairwise(words):
        if option in ("-o", "--output", "--output_path") and "--help" not in words:
            assert (folder / value).exists(), value
