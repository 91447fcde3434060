"""The tables of `arguments.md`, from the declarations of the settings.

`python docs/arguments.py` writes the page again. The text around the tables stays.
"""

from __future__ import annotations

import re
from pathlib import Path

from llm_attack.base.declare import names, table
from llm_attack.lm.settings import AttackSettings, EngineSettings
from llm_attack.suite.plan import Plan

PAGE = Path(__file__).with_name("arguments.md")


def tables() -> dict[str, str]:
    """Markdown tables by the names in the page's marks."""
    shared = {*names(AttackSettings), *names(EngineSettings)} - {
        "steps",
        "cells",
        "swaps",
    }  # a run takes several
    return {
        "attacked-hf": table(AttackSettings, EngineSettings),
        "run": table(Plan, without=shared),
    }


def renewed(page: str) -> str:
    """The page with each table between its marks."""
    for name, text in tables().items():
        mark, end = f"<!-- {name} -->\n", "<!-- end -->"
        old = rf"{re.escape(mark)}.*?{end}"
        page = re.sub(old, lambda _, new=f"{mark}\n{text}\n{end}": new, page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
