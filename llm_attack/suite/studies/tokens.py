"""How many tokens make answers wrong: the table of attacks that choose tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from llm_attack.attacks.settings import SPARSE, SWAPS
from llm_attack.base.record import write_text
from llm_attack.suite.analysis.tokens import MOST, counts
from llm_attack.suite.report.tables import Cells

TITLE = "tokens that change the answer"
FILE = "tokens.md"

_NOTES = {
    "token_sparse": "token_sparse: as few tokens as possible, each within epsilon; top token: share"
    " of the fallen questions in which the token with the greatest gradient is among them",
    "swap": "swap: every token of the prompt, and every other token in its place",
    "hotflip": "hotflip: the swaps with the greatest first-order gains",
    "gcg": "gcg: greedy coordinate gradient, with as many swaps as its name says",
}
_SIZES = (
    "RMS and linf: median over the fallen questions of the largest change of a token's embedding,"
    " as root mean square and as largest coordinate; both in units of the RMS of the embeddings"
)


def cells(frame: pd.DataFrame | None) -> Cells | None:
    """A row for each task and condition; None if no attack chooses tokens.

    Args:
        frame: the frame of `tokens.parquet`.
    """
    if frame is None:
        return None
    table, present = counts(frame), {*frame["attack"]}
    swaps, sparse = bool(present & {*SWAPS}), bool(present & {*SPARSE})
    heading = ["task", "condition", "n", "right", *(f"≤ {n}" for n in range(1, MOST + 1)), "any"]
    heading += ["median", "RMS", "linf", "least linf"]
    heading += ["top token"] * sparse + ["wrong swaps", "nearest RMS", "nearest linf"] * swaps
    rows = []
    for row in table.to_dict("records"):
        texts = [str(row["task"]), str(row["condition"])]
        texts += [f"{row[name]}" for name in ("n", "right")]
        texts += [f"{row[f'at_most_{n}']}" for n in range(1, MOST + 1)]
        texts += [f"{row['fell']}", _number(row["median"], "g")]
        texts += [_number(row[name], ".2f") for name in ("rms", "linf", "least_linf")]
        texts += [_number(row["first"], ".2f")] * sparse
        of_swaps = [_share(row), *(_number(row[f"nearest_{x}"], ".2f") for x in ("rms", "linf"))]
        rows.append([*texts, *(of_swaps * swaps)])
    notes = [
        "right: questions that are right without an attack; ≤ 1: those of them for which one token"
        " was enough; any: for which any number was; median: of these, the number of tokens",
        _SIZES,
        *(note for name, note in _NOTES.items() if name in present),
    ]
    if swaps:
        notes += [
            "wrong swaps: share of the swaps that were tried, with a wrong answer",
            "nearest RMS: median over the tokens of the prompts of the smallest change of their"
            " embedding by a swap; nearest linf: the smallest change of any, as largest coordinate."
            " A ball in linf with a smaller radius contains no swap",
        ]
    return Cells(heading, rows, notes)


def save(shown: Cells | None, folder: Path) -> None:
    """Writes `tokens.md`; nothing without attacks that choose tokens."""
    if shown is not None:
        write_text(folder / FILE, f"{TITLE.capitalize()}\n\n{shown.markdown()}")


def _share(row: Mapping[str, Any]) -> str:
    """The share of single swaps with a wrong answer."""
    if row["attack"] == "gcg" or pd.isna(row["tried"]) or not row["tried"]:
        return "–"
    return f"{row['wrong'] / row['tried']:.1%}"


def _number(value: Any, form: str) -> str:
    return "–" if value is None or pd.isna(value) else format(value, form)
