"""A board: one table for cards with the same questions, and the files that it writes."""

import csv
import io
import json
from pathlib import Path

import pytest
from cards import made

from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.suite.studies import board, card

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cards():
    return [
        made("weak", parameters=2_000_000, robust="0000", clean="0111"),
        made("strong", parameters=135_000_000, robust="0111", clean="1111", family="gpt2"),
        made("flagged", failed=True, robust="0011", clean="1111"),
        made("others", questions="f" * 16, robust="0001", clean="0001"),
    ]


def test_the_cards_are_cards(cards):
    assert [card.faults(each) for each in cards] == [[]] * 4


def test_only_the_same_questions_are_compared_and_the_best_is_first(cards):
    found = board.sets(cards)
    assert sorted([c["model"]["name"] for c in s.cards] for s in found) == [
        ["others"],
        ["strong", "flagged", "weak"],
    ]


def test_of_two_of_the_same_the_newer_counts(cards):
    again = made("weak", robust="0001", clean="0111", date="2027-01-01T00:00:00+00:00")
    again["id"] = cards[0]["id"]
    (one,) = board.sets([again, cards[0]])
    assert one.cards == [again]


def test_the_files(cards, tmp_path):
    names = board.save(cards, tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")} == {
        *names,
        board.MARK,
    }
    large = next(s for s in board.sets(cards) if len(s.cards) == 3)
    rows = list(csv.DictReader(io.StringIO((tmp_path / f"{large.anchor}.csv").read_text())))
    assert [row["name"] for row in rows] == ["strong", "flagged", "weak"]
    assert [float(row["standard-1@0.016rms"]) for row in rows] == [0.75, 0.5, 0]
    assert rows[1]["failed_checks"] == "the gradient is not zero"
    latex = (tmp_path / f"{large.anchor}.tex").read_text()
    assert r"flagged$^*$ & 100.0 (51.0--100.0)" in latex and latex.count(r"\\") == 4
    bibtex = (tmp_path / "board.bib").read_text()
    assert bibtex.count("@misc{llm_attack_") == 4 and "@software{llm_attack," in bibtex
    stored = card.load_card(tmp_path / "models" / f"{cards[1]['id']}.json")
    assert stored == cards[1]


def test_text_of_a_card_is_no_code(tmp_path):
    evil = made("<script>alert(1)</script>", robust="0001", clean="0011")
    evil["submitted_by"] = {"name": "=1+1 }% \\input{x}", "link": "https://a.b/}\\x"}
    board.save([evil], tmp_path)
    for page in tmp_path.rglob("*.html"):
        assert "<script>alert" not in page.read_text()
    bibtex = (tmp_path / "board.bib").read_text()
    assert "\\input" not in bibtex and r"\url{https://a.b/%7d%5cx}" in bibtex


def test_the_commands(cards, tmp_path, capsys):
    paths = []
    for i, each in enumerate(cards):
        paths.append(tmp_path / f"{i}.json")
        paths[-1].write_text(json.dumps(each))
    words = ["board", *map(str, paths), "-o", str(tmp_path / "site")]
    for _ in range(2):  # again into the same folder
        with pytest.raises(SystemExit) as done:
            main(words)
        assert not done.value.code
    assert (tmp_path / "site/index.html").exists()
    paths[0].write_text(json.dumps(cards[0] | {"n": 5}))
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 2
    assert f"card={paths[0]}: n: is not the sum over its tasks" in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        board.check(tmp_path)


def test_the_cards_of_the_repository():
    """Also those of pull requests."""
    paths = sorted((ROOT / "board" / "cards").glob("*.json"))
    assert paths
    for path in paths:
        assert card.faults(json.loads(path.read_text())) == [], path
