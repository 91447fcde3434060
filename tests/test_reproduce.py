"""The commands of `llm-attack reproduce`: options, presets, records, bad input."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from sketched import sketch

from llm_attack.attacks import ATTACKS
from llm_attack.cli import main
from llm_attack.experiments import FIGURES
from llm_attack.reproduce import PRESET_NAMES
from llm_attack.theory import fig4, fig6
from llm_attack.vision.networks import NETWORKS
from llm_attack.vision.settings import KNOWN

TINY = ["--seeds", "2", "--epochs", "2", "--points", "20", "--test_points", "20", "--device", "cpu"]


def reproduce(*arguments):
    return CliRunner().invoke(main, ["reproduce", *map(str, arguments)])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Default folders are relative: nothing is written into the project. No figure is looked at."""
    monkeypatch.chdir(tmp_path)
    sketch(monkeypatch)


def test_presets():
    """The paper's sizes, and the same as the defaults of the settings."""
    assert tuple(fig4.PRESETS) == tuple(fig6.PRESETS) == PRESET_NAMES
    assert (fig4.PRESETS["paper"].seeds, fig4.PRESETS["paper"].epochs) == (5, 500)
    assert (fig6.PRESETS["paper"].seeds, fig6.PRESETS["paper"].epochs) == (10, 1000)
    assert len(fig6.PRESETS["paper"].embedding_sizes) == 3


def test_fig4_in_the_default_folder():
    done = reproduce("fig4", *TINY)
    assert done.exit_code == 0, done.output
    run = json.loads(Path("out/fig4/run.json").read_text())
    assert run["command"] == f"llm-attack reproduce fig4 --preset quick {' '.join(TINY)}"
    assert run["settings"] | {"seeds": 2, "epochs": 2, "device": "cpu"} == run["settings"]
    assert run["settings"]["epsilon"] == fig4.PRESETS["quick"].epsilon
    assert set(run["seconds"]) == {"training", "figure", "all"}
    assert {"torch", "llm-attack"} <= set(run["versions"])
    assert run["hardware"]["cores"]
    assert len(run["results"]["last_epoch"]["dx_predicted"]) == 2
    assert set(pd.read_csv("out/fig4/curves.csv").seed) == {0, 1}


def test_fig6_in_a_folder_of_ones_own():
    options = ["--embedding_sizes", "1,2", "--seeds", "1", "--epochs", "1", "--device", "cpu"]
    done = reproduce("fig6", *options, "-o", "out", "--preset", "paper")
    assert done.exit_code == 0, done.output
    run = json.loads(Path("out/run.json").read_text())
    expected = f"llm-attack reproduce fig6 --preset paper {' '.join(options)} -o out"
    assert sorted(run["command"].split()) == sorted(expected.split())
    assert run["settings"]["embedding_sizes"] == [1, 2]
    assert run["settings"]["width"] == fig6.PRESETS["paper"].width
    assert set(run["seconds"]) == {"size 1", "size 2", "all"}
    assert not Path("out", "fig6").exists() and not Path("results").exists()


@pytest.fixture
def shortened(monkeypatch):
    """The experiments with fewer seeds and epochs than their settings say; the settings seen."""
    train, run_kind, seen = fig4.train, fig6.run_kind, []

    def short(settings):
        seen.append(settings)
        return replace(settings, seeds=1, epochs=1)

    monkeypatch.setattr(fig4, "train", lambda settings: train(short(settings)))
    monkeypatch.setattr(fig6, "run_kind", lambda words, n, s: run_kind(words, n, short(s)))
    return seen


def test_all(monkeypatch, shortened):
    """Each figure once, in its own folder, with the preset and the options."""
    both = [command for command in FIGURES if command.name in ("fig4", "fig6")]
    monkeypatch.setattr("llm_attack.experiments.FIGURES", both)
    done = reproduce("all", "--preset", "paper", "-o", "out", "--seed", 7, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in Path("out").iterdir()) == ["fig4", "fig6"]
    known = ["fig1", "fig2", "fig4", "fig5", "fig6", "relation", "tradeoff"]
    known += ["factors", "declines", "toys"]
    assert [command.name for command in FIGURES] == known
    for name, presets in (("fig4", fig4.PRESETS), ("fig6", fig6.PRESETS)):
        settings = json.loads(Path("out", name, "run.json").read_text())["settings"]
        assert settings["seed"] == 7
        assert settings["epochs"] == presets["paper"].epochs
    assert {settings.seed for settings in shortened} == {7}


@pytest.mark.parametrize("preset", PRESET_NAMES)
@pytest.mark.sampled(2)
def test_a_preset_is_what_runs(shortened, preset):
    reproduce("fig6", "--preset", preset)
    wanted = fig6.PRESETS[preset]
    assert [(s.seeds, s.epochs) for s in shortened] == [(wanted.seeds, wanted.epochs)] * 3
    assert {s.device for s in shortened} <= {"cpu", "cuda"}


@pytest.mark.parametrize("command", FIGURES, ids=lambda command: command.name)
def test_help_is_of_sentences_that_name_what_is_allowed(command):
    texts = {option.name: option.help.partition("  [")[0] for option in command.params}
    for text in texts.values():
        assert re.fullmatch(r"[A-Z].*\.", text)
    in_ball = [name for name, kind in ATTACKS.items() if not kind.minimal]
    networks = [*NETWORKS, "package.module:function"]
    named = {"attack": in_ball, "attacks": KNOWN, "network": networks}
    for name in named.keys() & texts.keys():
        allowed = re.split(r": |One of ", texts[name])[-1].partition(". ")[0].rstrip(".")
        assert set(re.split(", | or ", allowed)) == set(named[name])


def test_hyphens_are_as_good_as_underscores():
    done = reproduce("fig4", *(option.replace("_p", "-p") for option in TINY))
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["fig4", "--preset", "papr"], "--preset"),
        (["fig4", "--epochs", "0"], "epochs=0: must be an integer, 1 or more"),
        (["fig4", "--epochs", "many"], "--epochs"),
        (["fig4", "--attack", "fgms"], "attack=fgms: .* did you mean 'fgsm'"),
        (["fig4", "--device", "gpu"], "device='gpu': must be cpu, cuda"),
        (["fig4", "--device", "meta:x"], "device='meta:x': must be cpu, cuda"),
        (["fig4", "--epoch", "3"], "--epochs"),
        (["fig4", "-o", "file"], "output=file: must be a folder"),
        (["fig4", "-o", "file/sub"], "output=file/sub: must be a folder"),
        (["fig6", "--embedding_sizes", "8,x"], "'x' is not a valid integer"),
        (["fig6", "--embedding_sizes", "8,0"], r"embedding_sizes=\(8, 0\): must be .*1 or more"),
        (["fig6", "--words", "none.csv"], "words=none.csv: must be a CSV file"),
        (["fig5000"], "fig5000"),
        (["fig3"], "Fig. 3 is llm-attack run"),
        (["fig3", "--preset", "paper", "--help"], "Fig. 3 is llm-attack run"),
    ),
)
def test_bad_input(arguments, message, tmp_path):
    (tmp_path / "file").write_text("kept")
    done = reproduce(*arguments)
    assert done.exit_code == 2, done.output
    assert re.search(message, done.output)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    "arguments", (["--help"], ["reproduce", "--help"], ["reproduce", "fig4", "-h"])
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'pandas', 'scipy', 'matplotlib', 'numpy', 'lm_eval', 'datasets'}\n"
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules))))\n"
        "from llm_attack.cli import main; main(sys.argv[1:])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("heavy: []\n")
    assert "reproduce" in done.stdout
