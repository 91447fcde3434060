"""The tables of `architectures.md`: the results of the tests for each architecture and format.

`python docs/architectures.py` writes the page again. The text around the tables stays. A format
whose library is not installed keeps its row.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("", "lm", "harness")]

import encoder_decoder  # noqa: E402
import formats  # noqa: E402
import multimodal  # noqa: E402
import networks  # noqa: E402
import published  # noqa: E402

PAGE = Path(__file__).with_name("architectures.md")
TABLES = {
    "causal": (
        ["architecture", "layout", "losses", "embedding", "block", "notes"],
        networks.measured,
        networks.ARCHITECTURES,
    ),
    "encoder-decoder": (
        ["architecture", "losses", "embedding", "block of each part", "notes"],
        encoder_decoder.measured,
        encoder_decoder.PAIRS,
    ),
    "multimodal": (
        ["architecture", "loaded by `hf` from a folder", "embedding"],
        multimodal.measured,
        multimodal.MULTIMODAL,
    ),
    "formats": (
        ["format", "library", "on a CPU", "`--dequantize`"],
        formats.measured,
        formats.CASES,
    ),
    "published": (
        ["code like that of", "what it does", "what happens"],
        published.measured,
        published.FAMILIES,
    ),
}


def table(name: str, before: str) -> str:
    """A table in Markdown: a row per architecture.

    Args:
        name: a key of `TABLES`.
        before: the table on the page. What cannot be measured here keeps its row.
    """
    head, measured, kinds = TABLES[name]
    known = dict(zip(kinds, before.splitlines()[2:], strict=False))
    lines = [_line(head), _line(["---"] * len(head))]
    for kind in kinds:
        row = measured(kind)
        lines.append(known[kind] if row is None else _line(row))
    return "\n".join(lines)


def _line(row: list[str]) -> str:
    return f"| {' | '.join(row)} |".replace("|  |", "| |")


def renewed(page: str) -> str:
    """The page with each table between its marks."""
    for name in TABLES:
        start, end = f"<!-- measured: {name} -->\n\n", "\n\n<!-- end -->"
        before = page.partition(start)[2].partition(end)[0]
        page = page.replace(f"{start}{before}{end}", f"{start}{table(name, before)}{end}")
    return page


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
