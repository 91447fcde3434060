"""The table of `architectures.md`: the results of the tests for each architecture that they know.

`python docs/architectures.py` writes the page again. The text around the table stays.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "lm")]

import encoder_decoder  # noqa: E402
import multimodal  # noqa: E402
import networks  # noqa: E402

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
}


def table(name: str) -> str:
    """A table in Markdown: a row per architecture."""
    head, measured, kinds = TABLES[name]
    rows = [head, ["---"] * len(head), *map(measured, kinds)]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


def renewed(page: str) -> str:
    """The page with each table between its marks."""
    for name in TABLES:
        start, end = f"<!-- measured: {name} -->\n", "<!-- end -->"
        new = f"{start}\n{table(name)}\n\n{end}"
        page = re.sub(f"{re.escape(start)}.*?{end}", lambda _, new=new: new, page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
