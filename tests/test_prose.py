"""Pages and docstrings are easy to read, as far as a program can see; and the check works."""

import sys

import pytest
from shown import ROOT

sys.path.insert(0, str(ROOT / "tests" / "prose"))

import check

NAMES = [check.name_of(page) for page in check.pages()]


def faults(text):
    return check.measure(text).faults


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_easy_to_read(name):
    assert faults((ROOT / name).read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("limit", "enough", "too_much"),
    [
        ("words in a sentence", "word " * 34 + "end.", "word " * 35 + "end."),
        ("words in a paragraph", "One two three. " * 30, "One two three. " * 30 + "End."),
        ("numbers in a sentence", "It has 1, 2, 3.5 and −4 %.", "It has 1, 2, 3, 4 and 5."),
        ("on the average", "word " * 19 + "end.", "word " * 20 + "end."),
    ],
)
def test_limits(limit, enough, too_much):
    assert not any(limit in fault for fault in faults(enough))
    assert any(limit in fault for fault in faults(too_much))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("its predicate", "Nor could those leave that stand still."),
        ("its predicate", "Kept are numbers, and the figures that a page shows."),
        ("its predicate", "Of the model the hook is removed."),
        ("a question word", "What is special to Fig. 3 stands in `fig3.py`."),
        ("of which", "It takes lm-eval 0.5, of which there is a pre-release."),
        ("that of", "The numbers are those of the first run."),
        ("alone", "It reads the continuation alone."),
        ("but for", "All libraries but for torch are new."),
        ("told", "Older runs are told apart by their name."),
        ("old words", "One gradient foretells the rest."),
        ("negated", "Such a gradient is not uncommon."),
        ("'if'", "It uses cuda where there is one."),
        ("so that", "The rows differ, so that they cannot be shared."),
        ("old words", "| a | b |\n|---|---|\n| 1 | Hence it falls. |"),
    ],
)
def test_constructions(words, text):
    found = faults(text)
    assert len(found) == 1 and words in found[0], found


@pytest.mark.parametrize(
    "text",
    [
        "What does it cost? It costs little.",
        "See Fig. 3, e.g. the left half (Croce et al. 2020, arXiv 2205.01493) and Table 2 of 2021.",
        "    Nor is code read.",
        "```text\nNor is code read.\n```",
        "# What a heading says",
        "`nor` is code, and one word: `a b c d e f g h i j k l m n o p q r s t u v w x y z`.",
    ],
)
def test_what_is_fine(text):
    assert faults(text) == []


SOURCES = sorted((ROOT / "llm_attack").rglob("*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=check.name_of)
def test_texts_and_docstrings_are_easy_to_read(source):
    assert check.faults_of(source.read_text("utf-8")) == []


def in_function(docstring):
    return f'def f():\n    """{docstring}\n    """'


@pytest.mark.parametrize(
    ("words", "docstring"),
    [
        ("words in a sentence", "word " * 35 + "end."),
        ("its predicate", "Nor could those leave that stand still."),
        ("without its noun", "Of each condition the share of zeros."),
        ("without its noun", "A row.\n\n    Args:\n        frame: of `summarise`."),
        ("'if'", "The margin.\n\n    Returns:\n        None where no choice is right."),
        (
            "question word",
            "A row.\n\n    - `one`: its size\n    - `two`: What a model reads is two.",
        ),
    ],
)
def test_docstrings(words, docstring):
    found = check.faults_of(in_function(docstring))
    assert len(found) == 1 and words in found[0], found


@pytest.mark.parametrize(
    "docstring",
    [
        "Reads it.\n\n        Nor is code read.\n\n    It ends.",
        "The codes.\n\n    | 1 | nor |\n    |---|---|",
        "Reads it.\n\n    Args:\n        table: `of nor`.\n        of, where: two numbers.",
        "The columns are:\n\n" + "    - `one`: the size of one\n" * 20,
    ],
)
def test_docstrings_that_are_fine(docstring):
    assert check.faults_of(in_function(docstring)) == []


def test_docstrings_of_attributes():
    assert check.docstrings('"""A."""\nx = 1\n"""B."""\nclass C:\n    """D."""\n    "E."') == [
        "A.",
        "B.",
        "D.",
        "E.",
    ]


def test_command(capsys, monkeypatch):
    """It fails for a page with a fault, and for no other."""
    assert check.main(["docs/files.md"]) == 0
    monkeypatch.setitem(check.RULES["limits"], "paragraph", 5)
    assert check.main(["docs/files.md"]) == 1
    assert "words in a paragraph" in capsys.readouterr().out
