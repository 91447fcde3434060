"""The numbers that the documentation shows are those of the results in the repository."""

import re
import subprocess
import sys

import pandas as pd
import pytest
from shown import ROOT

# Folder -> the page, and what stands there before the table of accuracies.
SHOWN = {
    "smollm2-135m": ("README.md", "## What it finds"),
    "smollm2-135m-bim-0.01": ("docs/fig3.md", "### At 0.01"),
    "smollm2-135m-bim": ("docs/fig3.md", "### At 0.7 RMS"),
    "smollm2-135m-choice": ("docs/fig3.md", "## What would the amplitude"),
    "demo": ("docs/demo.md", "`make demo` prints"),
    "demo-choice": ("docs/demo.md", "With the gold known"),
}


def tables(text):
    """Rows of cells of each Markdown table, without its rule."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
        ]
        yield [rows[0], *rows[2:]]


@pytest.mark.parametrize("folder", SHOWN)
def test_accuracies(folder):
    page, place = SHOWN[folder]
    text = (ROOT / page).read_text("utf-8")
    heading, *rows = next(tables(text[text.index(place) :]))
    found = pd.read_csv(ROOT / "results" / folder / "table.csv").set_index(["task", "condition"])
    assert [row[0] for row in rows] == list(found.index.unique("task"))
    for task, *cells in rows:
        for condition, cell in zip(heading[1:], cells, strict=True):
            if condition == "baseline":
                expected = found.loc[(task, "none"), "baseline"]
            else:
                expected = found.loc[(task, condition), "acc"]
            assert float(cell) == pytest.approx(expected, abs=5.1e-4), (task, condition)


@pytest.mark.parametrize("folder", ["smollm2-135m", "smollm2-135m-bim", "smollm2-135m-bim-0.01"])
def test_tables_of_fig3(folder):
    command = [sys.executable, "docs/fig3.py", f"results/{folder}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = list(tables((ROOT / "docs" / "fig3.md").read_text("utf-8")))
    made = list(tables(printed))
    assert len(made) == 4
    for table in made:
        assert table in page
