"""The table of quantised formats in docs/architectures.md, for the libraries that are installed."""

import re
from pathlib import Path

import pytest
from formats import CASES, measured

PAGE = Path(__file__).parents[2] / "docs/architectures.md"


def table():
    """(library, format): the two verdicts, without what the machine may change."""
    part = re.search(r"<!-- measured: formats -->(.*?)<!-- end -->", PAGE.read_text("utf-8"), re.S)
    rows = [line.strip("| ").split(" | ") for line in part[1].strip().splitlines()[2:]]
    return {(library.split()[0], name): plainly(verdicts) for name, library, *verdicts in rows}


def plainly(verdicts):
    return [verdict.partition(";")[0] for verdict in verdicts]


def test_every_row_is_tried():
    assert table().keys() == CASES.keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case).replace(" ", "_"))
def test_the_verdicts_of_the_table(case):
    row = measured(case)
    if row is None:
        pytest.skip(f"{case[0]} is not installed, or this machine has other kernels")
    assert table()[case] == plainly(row[2:])
