"""The table of `architectures.md`: the results of the tests for each architecture that they know.

`python docs/architectures.py` writes the page again. The text around the table stays.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "lm")]

from networks import ARCHITECTURES, REFUSED, measured, refusal  # noqa: E402

PAGE = Path(__file__).with_name("architectures.md")
HEAD = ["architecture", "layout", "losses", "embedding", "block", "notes"]


def table() -> str:
    """The table in Markdown: a row per architecture."""
    rows = [HEAD, ["---"] * len(HEAD), *map(measured, ARCHITECTURES)]
    for kind in REFUSED:
        reason = refusal(kind).rpartition(": ")[2]
        rows.append([f"`{kind}`", *["–"] * 4, f"refused: {reason}"])
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


def renewed(page: str) -> str:
    """The page with the table between its marks."""
    start, end = "<!-- measured -->\n", "<!-- end -->"
    old = f"{re.escape(start)}.*?{end}"
    new = f"{start}\n{table()}\n\n{end}"
    return re.sub(old, lambda _: new, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
