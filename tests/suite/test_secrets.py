"""No secret reaches a file or a screen, no cell is a formula, no path is of this machine."""

import csv
import io
import json
import logging
import re
import shutil
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from evaluation import said
from lm_eval.tasks import TaskManager

import llm_attack
from llm_attack import Plan, evaluate
from llm_attack.base.declare import setting
from llm_attack.base.errors import UsageError
from llm_attack.base.record import as_csv, without_formulas, write_json
from llm_attack.base.redact import HIDDEN, is_secret, redacted
from llm_attack.cli import main
from llm_attack.harness.cache import guard
from llm_attack.harness.judge import as_json
from llm_attack.harness.paths import portable
from llm_attack.reproduce import PRESET_NAMES, figure_command
from llm_attack.suite import render, results
from llm_attack.suite.analysis import summary
from llm_attack.suite.evaluate import command
from llm_attack.suite.report import tables

SHAPES = [
    "hf_" + "aB3" * 11,
    "sk-" + "aB3" * 12,
    "sk-proj-" + "aB3_" * 4 + "aB3" * 8,
    "ghp_" + "aB3" * 12,
    "github_pat_" + "aB3_" * 9,
    "AKIA" + "AB34" * 4,
    "xoxb-1234567890-abcdef",
    "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.c2lnbmF0dXJl",
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llm_attack.suite.report.figures.draw_all", lambda *_: [])


# -- secrets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    assert redacted(f"with {shape}, and") == f"with {HIDDEN}, and"
    assert redacted({"note": [(shape, 1)], shape: None}) == {"note": [(HIDDEN, 1)], HIDDEN: None}


@pytest.mark.parametrize(
    "name",
    ["token", "hf_token", "HF-TOKEN", "use_auth_token", "huggingface_token", "password",
     "my_passwd", "openai_api_key", "aws_secret_access_key", "client_secret", "credentials"],
)  # fmt: skip
def test_names(name):
    assert is_secret(name)
    assert redacted({name: 12345}) == {name: HIDDEN}
    assert redacted({name: {"a": "b"}}) == {name: HIDDEN}
    assert redacted({name: True, "x": {name: None}}) == {name: True, "x": {name: None}}
    assert redacted(f"a=1,{name}=abc/d,b=2") == f"a=1,{name}={HIDDEN},b=2"
    assert redacted(f"got {{'{name}': 'abc'}}") == f"got {{'{name}': '{HIDDEN}'}}"
    assert redacted(f"{name}=True") == f"{name}=True"


def test_urls():
    assert redacted("at https://me:p@ss@host:80/x?a@b") == f"at https://{HIDDEN}@host:80/x?a@b"
    assert (
        redacted("https://host/x?access_token=abc&b=1")
        == f"https://host/x?access_token={HIDDEN}&b=1"
    )


@pytest.mark.parametrize(
    "text",
    ["prefix_token_id=5,add_bos_token=True", "think_end_token=</think>", "tokens: 12", "l2_token",
     "hf-internal-testing/tiny", "sk-learn-based-models/of-some-kind", "https://host:80/a@b",
     "git@github.com:me/it.git", "nearest_token_unchanged", "models/tokenizer=fast",
     "AKIA is short"],
)  # fmt: skip
def test_what_is_no_secret(text):
    assert redacted(text) == text
    assert redacted({text: text}) == {text: text}


SECRET = "never-to-be-seen"
TOKEN = SHAPES[0]


def plan(token, password):
    given = {
        "token": token,
        "proxies": {"https": f"https://me:{password}@proxy"},
        "code_revision": TOKEN,
    }
    return Plan("demo", "demo_piqa", attacks="none", limit=2, device="cpu", model_args=given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a run whose model was given secrets."""
    folder = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_attack.suite.report.figures.draw_all", lambda *_: [])
        patch.setattr("llm_attack.suite.evaluate.discard", lambda _: None)
        evaluate(plan(SECRET, SECRET), output=folder, progress="quiet")
    return folder


def seen(text):
    return SECRET in text or TOKEN in text


def test_no_file_of_a_run_has_a_secret(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"run.json", "report.html", "results_none.json", "fingerprint.json"} <= {
        path.name for path in files
    }
    assert not [path for path in files if seen(path.read_bytes().decode("latin-1"))]
    run = json.loads((folder / "run.json").read_text())
    shown = {
        "token": HIDDEN,
        "proxies": {"https": f"https://{HIDDEN}@proxy"},
        "code_revision": HIDDEN,
    }
    assert run["settings"]["model_args"] == shown
    assert f"token={HIDDEN}" in run["command"]


def test_another_token_is_the_same_run(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, "out")
    monkeypatch.setattr("llm_attack.suite.evaluate.execute", None)  # nothing may be computed
    other = plan("another", "another")
    without = {key: value for key, value in other.model_args.items() if key != "token"}
    for same in (other, replace(other, model_args=without)):
        found = evaluate(same, output="out", progress="quiet")
        assert not seen(json.dumps(found.run))
    with pytest.raises(UsageError, match="seed: 0 there, 1 here"):
        evaluate(
            Plan("demo", "demo_piqa", attacks="none", limit=2, device="cpu", seed=1), output="out"
        )


def test_a_report_hides_what_an_older_run_has_kept(folder):
    shutil.copytree(folder, "out")
    run = json.loads(Path("out/run.json").read_text())
    run["settings"]["model_args"] = {"token": SECRET}
    run["command"] = f"llm-attack run --model_args token={SECRET}"
    Path("out/run.json").write_text(json.dumps(run))
    render.render(results.load(Path("out")), Path("out"), results.load(Path("out")).run)
    assert HIDDEN in Path("out/report.html").read_text()
    assert not seen(Path("out/report.html").read_text())


def test_the_command_to_go_on_has_no_secret():
    words = command(plan(SECRET, SECRET), Path("out"))
    assert not seen(" ".join(words))
    assert f"token={HIDDEN}" in words[words.index("--model_args") + 1]


def test_the_model_reports_no_secret(make):
    lm = make(token=SECRET, revision="main")
    assert not seen(json.dumps([lm.get_model_info(), lm.attack_info()], default=str))


def test_messages_have_no_secret():
    url = f"https://me:{SECRET}@host/model"
    for words in (["--model", url], ["--model_args", f"token={SECRET},dtipe=x"], ["--loss", TOKEN]):
        done = CliRunner().invoke(main, ["run", "--model", "demo", "--tasks", "demo_piqa", *words])
        assert done.exit_code == 2 and not seen(done.output), done.output
        assert said(done.stderr)[0].startswith("error: ")


def test_a_cache_has_no_secret():
    cache = {}
    guard(cache, {"token": SECRET, "seed": 0}, "file")
    guard(cache, {"token": "another", "seed": 0}, "file")
    assert not seen(str(cache))
    with pytest.raises(UsageError, match="seed=0 there, seed=1 now"):
        guard(cache, {"token": SECRET, "seed": 1}, "file")


def test_json_has_no_secret(tmp_path):
    write_json(tmp_path / "file", {"path": Path(TOKEN), "url": f"https://me:{SECRET}@host"})
    assert not seen((tmp_path / "file").read_text())


@dataclass(frozen=True)
class Settings:
    dataset: "str" = setting("digits", "Data set")
    seed: "int" = setting(0, "Seed")
    device: "str | None" = setting("cpu", "Device")


def test_experiments_have_no_secret():
    """And go on in their folder with another password."""
    presets = {name: Settings() for name in PRESET_NAMES}
    tiny = figure_command("tiny", presets, lambda settings, folder: {"seconds": {}})
    for password in (SECRET, "another"):
        done = CliRunner().invoke(tiny, ["--dataset", f"https://me:{password}@host", "-o", "out"])
        assert done.exit_code == 0, (done.output, done.exception)
        text = Path("out/run.json").read_text()
        assert text.count(f"https://{HIDDEN}@host") == 2 and not seen(text)


# -- cells -----------------------------------------------------------------------------------------

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "＝1+1", "＋1", "－1", "＠SUM(A1)", "﹦1", "−1"]
FORMULAS += [
    f"{blank}=1" for blank in (" ", "\u00a0", "\u3000", "\u200b", "\ufeff", "\0", '"', ' " ')
]
FORMULAS += [f"x{cell}=1" for cell in "\t\n;|"] + [
    "x; +1",
    "x;y;\u200b＠1",
    ";=1",
    "|=1",
    "\t=1",
    "\n-1",
]
PLAIN = ["a=b", "1-2", "x;y", "a, -1", "x|y", "'=1", "", "fgsm@0.01", "ünïcode ＝", "a\nb"]


def cells(text):
    """What spreadsheets make of a line that has this text as its only cell, however they split."""
    (row,) = csv.reader(io.StringIO(text, newline=""), lineterminator="\n")
    found = [*row]
    for separator in ";\t|\n":
        found += text.split(separator)
        found += next(csv.reader([text.replace("\n", " ")], delimiter=separator), [])
    return found


@pytest.mark.parametrize("text", FORMULAS)
def test_no_spreadsheet_finds_a_formula(text):
    frame = pd.DataFrame({"x": [text], "y": [1]})
    line = as_csv(frame, "%g").partition("\n")[2].removesuffix(",1\n")
    for cell in cells(line):
        plain = unicodedata.normalize("NFKC", cell).replace("\0", "").replace("\ufeff", "")
        assert not re.match(r'[\s"\u200b]*[=+@\u2212-]', plain), (text, cell)
    again = "".join(next(csv.reader(io.StringIO(line, newline=""))))  # pandas 2 ends at \0
    assert again.replace("'", "") == text
    assert as_csv(pd.DataFrame({"x": [again]}), "%g").removesuffix("\n") == f"x\n{line}"


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_formula_stays_as_it_is(text):
    assert without_formulas(pd.DataFrame({"x": [text]}))["x"][0] == text


@pytest.mark.parametrize("end", ["\r", "\r\n", "\x85", "\u2028", "\v", "\f", "\x1c"])
def test_ends_of_lines_are_those_that_csv_quotes(end):
    assert as_csv(pd.DataFrame({"x": [f"a{end}=1"]}), "%g") == 'x\n"a\n\'=1"\n'


def test_every_csv_file_is_without_formulas():
    """No module writes one by itself; `tables` formats numbers of its own."""
    package = Path(llm_attack.__file__).parent
    own = {p.name for p in package.rglob("*.py") if ".to_csv(" in p.read_text("utf-8")}
    assert own == {"record.py", "tables.py"}


LEADING = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1"]


def test_texts_are_no_formulas(frames):
    names = {name: (4, 2) for name in [*LEADING, "a=b", "1-2", "x\r=1"]}
    samples, _ = frames(names, {"none": 1.0, "fgsm@0.01": -1.0})
    table = summary.summarise(samples)
    rows = list(csv.DictReader(io.StringIO(tables.csv(table), newline="")))
    wanted = {f"'{name}" for name in LEADING[:4]} | {"'\t'=1", "'\n'=1"}
    wanted |= {"a=b", "1-2", "x\n'=1", "mean"}
    assert {row["task"] for row in rows} == wanted
    assert any(row["drop"].startswith("-") or row["margin_change"].startswith("-") for row in rows)
    assert all(float(row["acc"]) >= 0 for row in rows)


def test_numbers_stay_numbers():
    frame = pd.DataFrame(
        {"text": ["-1", "x", None], "number": [-1.5, np.nan, 2.0], "n": [-1, 2, 3]}
    )
    found = without_formulas(frame)
    assert found["text"].tolist()[:2] == ["'-1", "x"] and pd.isna(found["text"][2])
    pd.testing.assert_frame_equal(found[["number", "n"]], frame[["number", "n"]])


def test_a_cell_of_markdown_is_one_cell():
    cells = tables.Cells(["task", "a|b"], [["x|y\nz", "1"], ["\\|", "2"]], ["note"])
    lines = cells.markdown().splitlines()
    assert lines == [
        r"| task | a\|b |", "| --- | ---: |", r"| x\|y z | 1 |", r"| \\\| | 2 |", "", "- note",
    ]  # fmt: skip


# -- paths -----------------------------------------------------------------------------------------


def test_results_of_lm_eval_have_no_path_of_this_machine(folder):
    text = (folder / "lm_eval" / "results_none.json").read_text()
    found = json.loads(text)
    assert found["config"]["model"] == "llm_attack/demo/model"
    metadata = found["configs"]["demo_piqa"]["metadata"]
    source = "tasks/demo/demo_piqa.yaml"  # which earlier releases of lm-eval do not note
    assert metadata.get("config_source", source) == source
    for path in (Path(main.callback.__code__.co_filename).parents[1], Path.home(), folder.parent):
        assert f"{path}/" not in text


def test_paths_are_named_from_folders_that_have_names(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "here").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "here")
    other = tmp_path / "other" / "data.json"
    other.parent.mkdir()
    lm_eval = Path(__import__("lm_eval").__file__).parent
    texts = {
        f"json:{home}/here/x.json": "json:./x.json",
        f"{home}/models/x": "~/models/x",
        f"{home}-of-another/x": f"{home}-of-another/x",
        f"{lm_eval}/tasks/arc/arc_easy.yaml": "lm_eval/tasks/arc/arc_easy.yaml",
        str(other): "data.json",
        "Question: {{a}}/b\nAnswer:": "Question: {{a}}/b\nAnswer:",
        "/": "/",
        "a\0b": "a\0b",
    }
    for text, wanted in texts.items():
        assert portable({text: [text, 1]}) == {wanted: [wanted, 1]}
    assert json.loads(as_json({"x": other, "samples": 1})) == {"x": "data.json"}


def test_a_task_of_ones_own(tmp_path, monkeypatch):
    """Where its file and its data lie stays on this machine."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "data.json").write_text('{"q": "a", "a": "x", "b": "y"}\n' * 2)
    (folder / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {folder}/data.json}}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: '{{[a, b]}}'\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(
        "llm_attack.harness.tasks.TaskManager",
        lambda **kind: TaskManager(**kind | {"include_defaults": False}),
    )
    own = Plan("demo", "own", attacks="none", include_path=str(folder), device="cpu")
    evaluate(own, output="out", progress="quiet")
    text = Path("out/lm_eval/results_none.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["configs"]["own"]["dataset_kwargs"] == {"data_files": "data.json"}
