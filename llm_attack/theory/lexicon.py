"""Words of three sentiments: the package's list or the user's file, checked and encoded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from llm_attack.base.errors import UsageError, closest, invalid
from llm_attack.base.failures import one_line
from llm_attack.base.folder import check_readable

COLUMNS = ("word", "language", "label")
LABELS = ("negative", "neutral", "positive")
LEAST = 10  # words of each label; with fewer, the test words may lack a label

# 400 English and 400 Chinese words for each label, written for this project.
OWN = Path(__file__).with_name("words.csv")


def load_words(path: str | None = None) -> pd.DataFrame:
    """The words of a CSV file in UTF-8; by default, the package's own.

    Returns:
        A row for each word, with the columns `COLUMNS`. Other columns are left out. Words that a
            language has twice with the same label appear once.

    Raises:
        UsageError: the file cannot be read, lacks a column, has another label than `LABELS`, gives
            a word of a language two labels, or has fewer than `LEAST` words of a label.
    """
    shown = OWN if path is None else path
    check_readable(shown, "words")
    try:
        # as text, because "null" and "nan" are words
        table = pd.read_csv(shown, dtype=str, keep_default_na=False, encoding="utf-8")
    except (OSError, ValueError) as error:  # exceptions of pandas: empty, not UTF-8, not CSV
        text = f"must be a CSV file in UTF-8 ({one_line(error)})"
        raise UsageError(f"words={shown}: {text}") from error
    for column in COLUMNS:
        if column not in table:
            near = closest(column, map(str, table.columns))
            hint = f"; did you mean {column!r} by {near!r}?" if near else ""
            raise UsageError(f"words={shown}: must have the columns {', '.join(COLUMNS)}{hint}")
    table = table[list(COLUMNS)].apply(lambda column: column.str.strip())
    strange = table[~table.label.isin(LABELS)]
    if len(strange):
        first = strange.iloc[0]
        raise invalid(f"words={shown}: label of {first.word!r}", first.label, LABELS)
    if (table.word == "").any():
        row = int((table.word == "").to_numpy().argmax())
        raise UsageError(f"words={shown}: must have a word in every row; row {row + 1} has none")
    table = table.drop_duplicates(ignore_index=True)
    twice = table[table.duplicated(["word", "language"])]
    if len(twice):
        word = twice.iloc[0].word
        raise UsageError(f"words={shown}: must give a word one label; {word!r} has more")
    for label in LABELS:
        count = int((table.label == label).sum())
        if count < LEAST:
            least = f"at least {LEAST} words of each label"
            raise UsageError(f"words={shown}: must have {least}; {label} has {count}")
    return table


def encode(words: Sequence[str], n: int = 1) -> tuple[Tensor, int]:
    """Encodes words as ids of their overlapping pieces of `n` characters.

    A shorter word is one piece.

    Returns:
        (words, most pieces) int64 ids: 1, 2, ... in the order of the pieces' code points, and 0
            after the end of a word. Then the number of ids, including 0.
    """
    rows = [[word[i : i + n] for i in range(max(1, len(word) - n + 1))] for word in words]
    pieces = sorted({piece for row in rows for piece in row})
    number = {piece: i for i, piece in enumerate(pieces, 1)}
    ids = torch.zeros(len(words), max(map(len, rows)), dtype=torch.long)
    for of_word, row in zip(ids, rows, strict=True):
        of_word[: len(row)] = torch.tensor([number[piece] for piece in row])
    return ids, len(pieces) + 1
