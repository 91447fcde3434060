"""Wrong calls of every command: one line that names the value, exit code 2, nothing written.

The table is `wrong_inputs.yaml`. All calls run in this process, one after another, in one folder.
"""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pyarrow.parquet as parquet
import pytest
import yaml
from click.testing import CliRunner
from evaluation import said
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from packaging.version import Version

from llm_attack.__main__ import main as program
from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.demo import MODEL_PATH
from llm_attack.harness.model import AttackedHFLM
from llm_attack.suite import render, results
from llm_attack.suite.config import from_yaml
from llm_attack.suite.plan import Plan

SMALL = "--epochs 1 --device cpu -o out"
COMMANDS = {
    "RUN": "run --model demo --tasks demo_piqa --attacks none,random --limit 2 --device cpu -o out",
    "EVAL": "eval --model_args pretrained=demo --tasks demo_piqa --limit 1 --output_path out",
    "EVALUATE": "eval --tasks demo_piqa --limit 1 --output_path out",
    "FIG2": f"reproduce fig2 {SMALL} --network cnn --train_size 64 --test_size 32",
    "FIG4": f"reproduce fig4 {SMALL}",
    "FIG6": f"reproduce fig6 {SMALL}",
}
CASES = yaml.safe_load(Path(__file__).with_suffix(".yaml").with_stem("wrong_inputs").read_text())

TASK = "task: {name}_task\ndataset_path: json\ntest_split: test\n"
TASK += "dataset_kwargs: {{data_files: {{test: {data}.jsonl}}}}\n"
CHOICE = "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: {gold}\n"
TEXT = "doc_to_text: q\ndoc_to_target: a\n"
TASKS = {
    "text": (f"output_type: generate_until\n{TEXT}", "data"),
    "drawn": (
        f"output_type: generate_until\n{TEXT}generation_kwargs: {{do_sample: true}}\n",
        "data",
    ),
    "nowhere": (CHOICE.format(gold="a"), "nowhere"),
    "field": (CHOICE.format(gold="'{{no_such_field}}'"), "data"),
    "template": (CHOICE.format(gold="a").replace("q\n", "'{{ q'\n", 1), "data"),
    "gold": (CHOICE.format(gold="bad"), "data"),
    "empty": (CHOICE.format(gold="a"), "empty"),
    "f1": (CHOICE.format(gold="a") + "metric_list:\n  - metric: f1\n", "data"),
}
YAMLS = {
    "code": b"steps: !!python/object/apply:os.system [ls]\n",
    "deep": b"[" * 5000,
    "binary": b"\xff\xfe\x00\x01",
    "recursive": b"tasks: &a [*a]\n",
    "keys": b"? [a]\n: 1\n",
    "twice": b"steps: 2\nsteps: 3\n",
    "unknown": b"atacks: [none]\n",
    "lists": b"attacks: [[fgsm]]\n",
    "mapping": b"attacks: {fgsm: 1}\n",
    "top": b"- none\n",
    "share": b"steps: 2.7\n",
    "many": b"steps: many\n",
    "quoted": b'steps: "3"\n',
    "limit_text": b"limit: none\n",
    "limit_true": b"limit: true\n",
    "choise": b"loss: choise\n",
    "perhaps": b"fewshot_as_multiturn: perhaps\n",
    "hyphen": b"step_size: 2\nstep-sise: 3\n",
    "numbers": b"epsilons: {a: 1}\n",
    "octal": b"steps: 010\n",
    "underscore": b"steps: 1_0\n",
    "sexagesimal": b"seed: 1:30\n",
    "hexadecimal": b"limit: 0x2\n",
    "a_list": b"limit: [1]\n",
    "model_number": b"model: 5\n",
    "device_number": b"device: 5\n",
    "arguments_number": b"model_args: 5\n",
    "batch_true": b"batch_size: true\n",
    "critical_number": b"critical: 1\n",
    "output_number": b"output: 5\n",
    "shard_number": b"shard: 1\n",
    "positions_number": b"positions: 1\n",
    "not_a_number": b"epsilons: [.nan]\n",
    "null_attacks": b"attacks: null\n",
    "date": b"tasks: 2026-01-01\n",
}


def bomb():
    """Nine names, each nine times the one before: a few bytes that would be gigabytes."""
    lines = ["a: &a [x]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join(lines).encode()


def models(folder):
    """Copies of the bundled model, each broken in one way."""
    whole = (MODEL_PATH / "model.safetensors").read_bytes()
    strange = {"model_type": "wibble", "architectures": ["Wibble"]}
    t5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    broken = {
        "no_config": ("config.json", None),
        "bad_config": ("config.json", b"{"),
        "list_config": ("config.json", b"[]"),
        "unknown_kind": ("config.json", json.dumps(strange).encode()),
        "encoder_decoder": ("config.json", json.dumps(t5).encode()),
        "no_weights": ("model.safetensors", None),
        "bad_weights": ("model.safetensors", b"abc"),
        "cut_weights": ("model.safetensors", whole[:-1000]),
        "no_tokenizer": ("tokenizer.json", None),
        "bad_tokenizer": ("tokenizer.json", b"{"),
    }
    for name, (file, content) in broken.items():
        shutil.copytree(MODEL_PATH, folder / name)
        (folder / name / file).unlink()
        if content is not None:
            (folder / name / file).write_bytes(content)


def runs(folder):
    """A finished run, and copies of it, each broken in one way."""
    done = CliRunner().invoke(main, shlex.split(COMMANDS["RUN"].replace("-o out", "-o good")))
    assert done.exit_code == 0, done.output
    samples = pd.read_parquet("good/samples.parquet")
    record = json.loads(Path("good/run.json").read_text())
    broken = {
        "run_cut": ("run.json", b'{"command": "llm'),
        "run_list": ("run.json", b"[]"),
        "run_attacks": ("run.json", json.dumps(record | {"attacks": 3}).encode()),
        "run_warnings": ("run.json", json.dumps(record | {"warnings": 3}).encode()),
        "run_no_samples": ("samples.parquet", None),
        "run_bad_samples": ("samples.parquet", b"PAR1xxxx"),
        "run_no_column": ("samples.parquet", samples.drop(columns="acc")),
        "run_renamed": ("samples.parquet", samples.rename(columns={"hookpoint": "hookpoinu"})),
        "run_text": ("samples.parquet", samples.assign(acc="x")),
        "run_twice": ("samples.parquet", pd.concat([samples, samples])),
        "run_strange": ("samples.parquet", samples.assign(doc_id=samples["doc_id"] + 50)),
        "run_none": ("samples.parquet", samples.iloc[:0]),
    }
    for name, (file, content) in broken.items():
        shutil.copytree("good", name)
        path = folder / name / file
        path.unlink()
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            content.to_parquet(path)


def cards(folder):
    """A card, and copies of it, each broken in one way; a run whose checks are damaged."""
    text = next(Path(__file__).parents[1].glob("board/cards/demo-*.json")).read_text()
    card = json.loads(text)
    name = json.dumps(card["model"]["name"])
    broken = {
        "card": text,
        "card_cut": text[:-100],
        "card_list": "[]",
        "card_deep": "[" * 100_000,
        "card_nan": text.replace('"limit": 10', '"limit": NaN'),
        "card_infinite": text.replace('"limit": 10', '"limit": 1e999'),
        "card_huge": json.dumps(card | {"model": card["model"] | {"parameters": 10**400}}),
        "card_schema": text.replace('"card_version": 1', '"card_version": 2'),
        "card_standard": text.replace('"standard": "standard-1"', '"standard": "standard-99"', 1),
        "card_twice": text.replace('"card_version": 1', '"card_version": 1, "card_version": 1'),
        "card_renamed": text.replace(f'"name": {name}', '"name": "a\\u0000b"', 1),
        "card_robust": json.dumps(card | {"robust": card["robust"][::-1]}),
        "card_unchecked": json.dumps(card | {"checks": []}),
        "card_script": json.dumps(
            card | {"submitted_by": {"name": "a", "link": "javascript:alert(1)"}}
        ),
    }
    for file, content in broken.items():
        Path(f"{file}.json").write_text(content)
    os.mkfifo("pipe.json")
    shutil.copytree("good", "run_checks")
    record = json.loads(Path("good/run.json").read_text())
    Path("run_checks/run.json").write_text(json.dumps(record | {"checks": [3]}))


@pytest.fixture(scope="module")
def world(tmp_path_factory, one_index):
    """The folder in which all is wrong, as the working directory."""
    folder = tmp_path_factory.mktemp("world")
    before = Path.cwd()
    os.chdir(folder)
    Path("file").write_text("mine")
    Path("empty").mkdir()
    questions = [{"q": q, "a": 0, "c": ["x", "y"], "bad": 7} for q in "ab"]
    Path("data.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    Path("empty.jsonl").write_text("")
    Path("tasks").mkdir()
    Path("broken").mkdir()
    Path("broken", "broken.yaml").write_text("task: [\n")
    for name, (text, data) in TASKS.items():
        Path("tasks", f"{name}.yaml").write_text(TASK.format(name=name, data=data) + text)
    for name, content in {**YAMLS, "bomb": bomb()}.items():
        Path(f"{name}.yaml").write_bytes(content)
    models(folder)
    runs(folder)
    cards(folder)
    with pytest.MonkeyPatch.context() as patch:
        # a figure is drawn on trial for the first of hundreds of runs
        patch.setattr(render, "try_out", functools.cache(render.try_out))
        yield folder
    os.chdir(before)


def contents(folder):
    """What files there are, and when each was written: quicker than to read them all every time."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {
        path: (stat.st_size, stat.st_mtime_ns, stat.st_ino) if path.is_file() else None
        for path, stat in found.items()
    }


@pytest.fixture(scope="module")
def untouched(world):
    return contents(world)


def words_of(command):
    first, _, rest = command.partition(" ")
    return shlex.split(f"{COMMANDS.get(first, first)} {rest}")


@pytest.mark.parametrize("case", CASES, ids=[case["command"] for case in CASES])
@pytest.mark.sampled(8)
def test_wrong_input(case, world, untouched, monkeypatch):
    if "words" in case and Version(version("lm-eval")) < Version("0.4.12"):
        pytest.skip(f"words {case['words']}")
    for name, value in case.get("environment", {}).items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(main, words_of(case["command"]))
    now = contents(world)
    shutil.rmtree("out", ignore_errors=True)  # of a case that is not refused
    lines = said(done.stderr)
    assert done.exit_code == 2, (done.output, done.exception)
    assert re.search(case["says"], lines[-1]), lines
    assert "Traceback" not in done.output
    if not case["command"].startswith("EVAL"):  # lm-eval has a log and bars of its own
        (line,) = lines
        assert line.startswith("error: ")
    assert now == untouched


def test_there_are_many():
    assert len({json.dumps(case) for case in CASES}) == len(CASES) >= 550


def test_traceback_is_shown_when_asked_for(world):
    done = CliRunner().invoke(main, ["run", "--steps", "0", "--traceback"])
    assert done.exit_code == 2
    assert "Traceback" in done.stderr and done.stderr.splitlines()[-1].startswith("error: steps=0")


def test_what_nobody_expected(world, monkeypatch):
    """It says where its traceback is, and has an exit code of its own."""

    def broken(*_, **__):
        raise RuntimeError("three\nlines\nlong")

    monkeypatch.setattr("llm_attack.suite.commands.report", broken)
    done = CliRunner().invoke(main, ["report", "good"])
    assert done.exit_code == 70
    (line,) = done.stderr.splitlines()
    found = re.fullmatch(r"error: unexpected RuntimeError: three lines long; see (\S+)", line)
    log = Path(found[1])
    assert "in broken" in log.read_text()
    log.unlink()


def test_errors_of_the_system(world, monkeypatch):
    """A full disk is no mistake of the user's."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llm_attack.suite.commands.report", full)
    done = CliRunner().invoke(main, ["report", "good"])
    assert (done.exit_code, done.stderr) == (1, "error: [Errno 28] No space left on device\n")


class _Reached(Exception):
    """All arguments were accepted."""


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40))
@example(text="max_length=99999999999999999999999999999999")
@example(text="dtype=\x00")
@example(text="attack=none,attack=fgsm")
def test_any_text_as_model_arguments(text, monkeypatch):
    """Refused as bad input, or passed on to lm-eval."""

    def reached(*_, **__):
        raise _Reached

    monkeypatch.setattr(HFLM, "__init__", reached)
    try:
        plan = Plan("demo", model_args=text)
    except UsageError as error:
        assert "\n" not in str(error).strip("\n")
        return
    with pytest.raises((UsageError, _Reached)) as caught:
        AttackedHFLM("demo", **plan.model_args)
    assert caught.type is UsageError or plan.model_args.keys() & {""} == set()


NAMES = st.sampled_from(["steps", "attacks", "tasks", "epsilons", "limit", "model_args", "seed"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES, VALUES, max_size=3))
@example({"epsilons": [[0.1]]})
@example({"tasks": [None]})
@example({"model_args": {"": None}})
def test_any_values_in_a_file(tmp_path, content):
    """Refused as bad input, or a plan of the same values."""
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    try:
        found = Plan(**from_yaml(path))
    except UsageError as error:
        assert str(error)
        return
    if "steps" in content:
        assert found.steps == content["steps"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 40))
def test_damaged_samples_are_refused(world, tmp_path, place, byte, cut):
    """Whatever byte of the file changes, or is missing: never other numbers, never a traceback."""
    whole = results.load_frames(world / "good")
    for name in results.FRAMES:
        shutil.copy(world / "good" / f"{name}.parquet", tmp_path)
    path = tmp_path / "samples.parquet"
    content = bytearray(path.read_bytes())
    content[place % len(content)] = byte
    path.write_bytes(content[: len(content) - cut])
    try:
        found = results.load_frames(tmp_path)
    except UsageError:
        return
    pd.testing.assert_frame_equal(found["samples"], whole["samples"])


@pytest.mark.parametrize("key", ["numpy_type", "field_name", "index_columns", "column_indexes"])
def test_damaged_names_of_the_metadata_are_refused(world, tmp_path, key):
    """pandas looks them up, and knows no file without them."""
    for name in results.FRAMES:
        shutil.copy(world / "good" / f"{name}.parquet", tmp_path)
    path = tmp_path / "samples.parquet"
    table = parquet.read_table(path)
    content = table.schema.metadata[b"pandas"]
    damaged = content.replace(f'"{key}"'.encode(), f'"{key[:-1]}_"'.encode())
    assert damaged != content
    parquet.write_table(table.replace_schema_metadata({"pandas": damaged}), path)
    try:
        found = results.load_frames(tmp_path)
    except UsageError as error:
        assert re.match(rf"{re.escape(str(path))}: cannot be read \(", str(error))
        return
    whole = results.load_frames(world / "good")
    pd.testing.assert_frame_equal(found["samples"], whole["samples"])


@pytest.mark.parametrize(
    ("options", "encoding"),
    [
        ([], "ascii"),  # a terminal that has none of the table's lines
        # without assertions and docstrings; Python compiles all libraries for it
        pytest.param(["-OO"], "utf-8", marks=pytest.mark.slow),
    ],
)
def test_odd_interpreters(world, options, encoding):
    done = subprocess.run(
        [sys.executable, *options, "-m", "llm_attack", "compare", "good", "good"],
        cwd=world,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "demo_piqa" in done.stdout


def test_ctrl_c_while_it_starts(monkeypatch, capsys):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("llm_attack.cli.main", interrupted)
    with pytest.raises(SystemExit) as left:
        program()
    assert left.value.code == 130
    assert capsys.readouterr().err == "stopped\n"
