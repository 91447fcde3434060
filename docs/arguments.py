"""The tables of `arguments.md`: what the settings say of themselves where they are declared.

Run by `python docs/arguments.py`, which writes the page anew; the text round the tables stays.
"""

from __future__ import annotations

import re
from pathlib import Path

from llm_attack.base.declare import names, table
from llm_attack.lm.settings import AttackSettings, EngineSettings
from llm_attack.suite.plan import Plan

PAGE = Path(__file__).with_name("arguments.md")


def tables() -> dict[str, str]:
    """Markdown tables by the names that the page's marks give them."""
    shared = {*names(AttackSettings), *names(EngineSettings)} - {"steps"}  # a run takes several
    return {
        "attacked-hf": table(AttackSettings, EngineSettings),
        "run": table(Plan, without=shared),
    }


def renewed(page: str) -> str:
    """The page with each table in place of what stands between its marks."""
    for name, text in tables().items():
        mark, end = f"<!-- {name} -->\n", "<!-- end -->"
        old = rf"{re.escape(mark)}.*?{end}"
        page = re.sub(old, lambda _, new=f"{mark}\n{text}\n{end}": new, page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
