"""Cards that were made to deceive, or to break what reads them: each is refused in one line."""

import copy
import importlib.util
import json
import os
from pathlib import Path

import pytest
from cards import made

from llm_attack.base.errors import UsageError
from llm_attack.suite.studies import board, plausible
from llm_attack.suite.studies.card import load_card

ROOT = Path(__file__).parents[2]


def renamed(card, **model):
    """Another model, with the identity that belongs to it."""
    card["model"] |= model
    card["id"] = plausible.identity(card["standard"], card["model"], card["tasks"])


def retask(card, **task):
    card["tasks"][0] |= task
    renamed(card)


def narrow(card):
    part = card["robust"][0]["tasks"]["demo_piqa"]
    part |= {"low": part["value"], "high": part["value"]}


def swapped(card):
    """A board would show each number under the other's heading."""
    card["robust"].reverse()


def gained(card):
    for row in card["robust"]:
        row |= made("x", clean="1111", robust="1111")["robust"][0] | {
            key: row[key] for key in ("condition", "attack", "norm", "epsilon")
        }


CHANGES = {
    "parameters": (lambda c: renamed(c, parameters=10**400), "parameters"),
    "no parameters": (lambda c: renamed(c, parameters=0), "parameters"),
    "a name with a line": (lambda c: renamed(c, name="a\nb"), "control character"),
    "half a character": (lambda c: renamed(c, name="\ud800"), "control character"),
    "a name that turns": (lambda c: renamed(c, name="a\u202eb"), "turns the direction"),
    "no name": (lambda c: renamed(c, name=""), "model.name"),
    "a long name": (lambda c: renamed(c, name="x" * 300), "model.name"),
    "a task in a folder": (lambda c: retask(c, name="../evil"), "tasks.0.name"),
    "the questions of nobody": (lambda c: retask(c, questions="0x"), "tasks.0.questions"),
    "a script": (lambda c: c.update(submitted_by={"name": "a", "link": "javascript:alert(1)"}),
                 "submitted_by"),
    "a link with a quote": (lambda c: c.update(submitted_by={"name": "a", "link": "https://a'b"}),
                            "link="),
    "no checks": (lambda c: c.update(checks=[]), "checks: must be the 4 of standard-1"),
    "fewer checks": (lambda c: c["checks"].pop(), "checks: must be the 4 of standard-1"),
    "another unit": (lambda c: c["robust"][0]["epsilon"].update(unit="absolute"),
                     "robust: must have the 6 conditions of standard-1, in order"),
    "another order": (swapped, "robust: must have the 6 conditions of standard-1, in order"),
    "one condition twice": (lambda c: c["robust"].__setitem__(1, c["robust"][0]), "robust: must"),
    "an attack of nobody": (lambda c: c["robust"][0].update(broken_by={"<b>": 2}), "broken_by"),
    "a narrow interval": (narrow, "demo_piqa: the interval is not Wilson's"),
    "right under attack alone": (gained, "2 questions are right that were wrong without an attack"),
    "a list for a card": (lambda c: c.update(standard=["standard-1"]), "standard="),
    "a text for numbers": (lambda c: c.update(robust="x"), "robust"),
    "a number for a text": (lambda c: c.update(warnings=[1]), "warnings"),
}  # fmt: skip


@pytest.fixture
def card():
    return copy.deepcopy(made("m", clean="0011", robust="0001"))


@pytest.mark.parametrize("with_schema", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_crafted(name, with_schema, card, tmp_path, monkeypatch):
    """Where jsonschema is not installed, too; there some of the form is not looked at."""
    if not with_schema:
        monkeypatch.setattr(plausible, "find_spec", lambda name: None)
    change, says = CHANGES[name]
    assert plausible.faults(card) == []
    change(card)
    path = tmp_path / "card.json"
    path.write_text(json.dumps(card))
    try:
        load_card(path)
    except UsageError as error:
        assert "\n" not in str(error) and (says in str(error) or not with_schema)
    else:
        of_form = {"no name", "a long name", "a number for a text"}
        of_form |= {"a task in a folder", "the questions of nobody"}
        assert not with_schema and name in of_form
        board.save([card], tmp_path / "site")  # what is shown is no worse than odd


TEXTS = {
    "nothing": (b"", "cannot be read"),
    "no JSON": (b"{", "cannot be read"),
    "no UTF-8": (b"\xff\xfe{}", "cannot be read"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "NaN": (b'{"card_version": NaN}', "NaN is no finite number"),
    "infinite": (b'{"card_version": 1e999}', "1e999 is no finite number"),
    "twice": (b'{"n": 1, "n": 2}', "the key n occurs twice"),
    "a list": (b"[]", "must be a card of llm-attack"),
    "of another version": (b'{"card_version": 2}', "must be a card of llm-attack"),
    "giant": (b" " * (2**25 + 1), "more than 33,554,432 bytes"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_files(name, tmp_path):
    content, says = TEXTS[name]
    path = tmp_path / "card.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=says) as error:
        load_card(path)
    assert str(error.value).startswith(f"card={path}: ") and "\n" not in str(error.value)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing.json", Path("/dev/zero")):
        with pytest.raises(UsageError, match="card="):
            load_card(path)


def test_text_in_bibtex_is_no_command(card, tmp_path):
    card["package"]["version"] = "1} \\input{x}"
    board.save([card], tmp_path)
    assert "\\input" not in (tmp_path / "board.bib").read_text()


def test_a_linked_folder_is_not_written(card, tmp_path):
    (tmp_path / "mine").mkdir()
    board.save([card], tmp_path / "site")
    models = tmp_path / "site" / board.MODELS
    for path in models.iterdir():
        path.unlink()
    models.rmdir()
    models.symlink_to(tmp_path / "mine")
    with pytest.raises(UsageError, match="is a link"):
        board.check(tmp_path / "site")


@pytest.fixture(scope="module")
def checker():
    spec = importlib.util.spec_from_file_location("check_cards", ROOT / "board/check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("source", "arguments", "says"),
    [
        ("demo", {}, None),
        ("org/model", {"revision": "main", "dtype": "bfloat16"}, None),
        ("org/model", {"trust_remote_code": True}, "model_args=trust_remote_code=...: is not one"),
        ("org/model", {"peft": "evil/adapter"}, "model_args=peft=...: is not one of"),
        ("org/model", {"revision": {"a": 1}}, "model_args: must be texts and numbers"),
        ("../models/mine", {}, "model=../models/mine: is not on the hub"),
        ("/etc", {}, "model=/etc: is not on the hub"),
        ("org/../mine", {}, "model=org/../mine: is not on the hub"),
    ],
)
def test_a_card_makes_nobody_run_its_code(checker, card, source, arguments, says):
    card["model"]["source"] = source
    card["settings"]["model_args"] = arguments
    why = checker.cannot_repeat(card)
    assert why is None if says is None else why.startswith(says)


def test_a_card_that_cannot_be_repeated_is_one_line(checker, card, tmp_path, monkeypatch, capsys):
    path = tmp_path / "card.json"
    card["model"]["source"] = "demo"
    path.write_text(json.dumps(card))

    def broken(*given):
        raise KeyError("demo_piqa")

    monkeypatch.setattr(checker, "rerun", broken)
    assert checker.check(path, 0) == []
    assert checker.check(path, 10) == [f"card={path}: cannot be repeated (KeyError: 'demo_piqa')"]


@pytest.mark.slow
def test_our_card_is_repeated(checker):
    card = load_card(checker.CARDS / "demo-standard-1.json")
    assert checker.rerun(card, 6) is None
    for row in (card["clean"], *card["robust"]):
        for task in row["tasks"].values():
            task["right"] = task["right"].translate(str.maketrans("01", "10"))
    assert checker.rerun(card, 6) == "42 of 42 answers differ when they are repeated"
