"""The package's words, the user's own words, and their encoding."""

import os
import re
import unicodedata
from pathlib import Path

import pytest

from llm_attack.base.errors import UsageError
from llm_attack.theory.lexicon import COLUMNS, LABELS, LEAST, OWN, encode, load_words


def test_our_words():
    words = load_words()
    assert tuple(words.columns) == COLUMNS
    assert len(words) == sum(1 for _ in OWN.open(encoding="utf-8")) - 1  # none was left out
    counts = words.groupby(["language", "label"]).size()
    assert counts.to_dict() == {(lang, label): 400 for lang in ("en", "zh") for label in LABELS}
    assert not words.duplicated(["language", "word"]).any()
    english = words[words.language == "en"].word
    assert all(re.fullmatch("[a-z]{3,}", word) for word in english)
    chinese = "".join(words[words.language == "zh"].word)
    assert all(unicodedata.name(c).startswith("CJK UNIFIED IDEOGRAPH") for c in chinese)


def rows(**extra):
    """Enough words of each label, as lines of a file, and others."""
    lines = [f"word{label}{i},en,{label}" for label in LABELS for i in range(LEAST)]
    return [*lines, *extra.get("more", [])]


@pytest.fixture
def file(tmp_path):
    def write(lines, header="word,language,label", encoding="utf-8"):
        path = tmp_path / "words.csv"
        path.write_text("\n".join([header, *lines]), encoding=encoding)
        return str(path)

    return write


def test_words_of_ones_own(file):
    """Columns in any order, others ignored, spaces stripped, the same row twice kept once."""
    lines = [",".join(reversed(line.split(","))) + ",note" for line in rows()]
    more = ["neutral,en,null,x", " neutral ,en, nan,", "positive,zh,好,", "positive,zh,好,again"]
    words = load_words(file([*lines, *more], header="label,language,word,source"))
    assert tuple(words.columns) == COLUMNS
    assert len(words) == 3 * LEAST + 3
    assert words.iloc[-3:].to_numpy().tolist() == [
        ["null", "en", "neutral"],
        ["nan", "en", "neutral"],
        ["好", "zh", "positive"],
    ]


def test_the_same_word_in_two_languages(file):
    assert len(load_words(file(rows(more=["gift,en,positive", "gift,de,negative"])))) == 32


@pytest.mark.parametrize(
    ("header", "lines", "message"),
    (
        ("word,language,labl", rows(), "columns word, language, label; did you mean 'label' by"),
        ("text,language,label", rows(), "must have the columns word, language, label"),
        ("", [], "must be a CSV file in UTF-8"),
        ("word,language,label", [], "at least 10 words of each label; negative has 0"),
        ("word,language,label", rows()[1:], "at least 10 words of each label; negative has 9"),
        ("word,language,label", rows()[:-1], "at least 10 words of each label; positive has 9"),
        (
            "word,language,label",
            rows(more=["fine,en,positiv"]),
            "label of 'fine'=positiv: .* did you mean 'positive'",
        ),
        ("word,language,label", rows(more=["fine,en,"]), "label of 'fine'=: must be one of"),
        ("word,language,label", rows(more=[",en,neutral"]), "row 31 has none"),
        (
            "word,language,label",
            rows(more=["fine,en,positive", "fine,en,neutral"]),
            "one label; 'fine' has more",
        ),
        ("word,language,label", rows(more=["a,b,c,d,e"]), "must be a CSV file"),
    ),
)
def test_bad_files(file, header, lines, message):
    with pytest.raises(UsageError, match=f"words=.*{message}") as error:
        load_words(file(lines, header))
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(file, tmp_path):
    for path in (str(tmp_path / "missing.csv"), str(tmp_path)):
        with pytest.raises(UsageError, match=f"words={path}: must be a CSV file"):
            load_words(path)
    with pytest.raises(UsageError, match="must be a CSV file in UTF-8"):
        load_words(file(rows(more=["好,zh,positive"]), encoding="gbk"))


def test_encoding():
    ids, count = encode(["ab", "好", "cab"])
    assert ids.tolist() == [[1, 2, 0], [4, 0, 0], [3, 1, 2]]
    assert count == 5


def test_every_word_has_a_code_of_its_own():
    words = load_words().word.drop_duplicates().tolist()
    ids, count = encode(words)
    assert len({tuple(row) for row in ids.tolist()}) == len(words)
    assert ids.max() == count - 1
    assert ((ids > 0).sum(1)).tolist() == [len(word) for word in words]


def test_a_large_list():
    folder = os.environ.get("LLM_ATTACK_TEST_DATA")
    path = Path(folder or "", "words", "words_strict.csv")
    if not folder or not path.exists():
        pytest.skip("LLM_ATTACK_TEST_DATA has no words")
    assert len(load_words(str(path))) == 8741
