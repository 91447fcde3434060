"""How many tokens make answers wrong: the table of attacks that choose tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llm_attack.attacks.settings import SPARSE, SWAPS
from llm_attack.base.record import write_text
from llm_attack.suite.analysis.tokens import MOST, counts
from llm_attack.suite.report.tables import Cells

TITLE, SIZES = "tokens that change the answer", "sizes of the changes"
EXAMPLES = "changed tokens of the first questions"
FILE = "tokens.md"
_FEW = 5

_NOTES = {
    "token_sparse": "token_sparse: as few tokens as possible, each within epsilon; top token: share"
    " of the fallen questions in which the token with the greatest gradient is among them; the"
    " greedy search begins with it",
    "swap": "swap: every token of the prompt, and every other token in its place",
    "hotflip": "hotflip: the swaps with the greatest first-order gains",
    "gcg": "gcg: greedy coordinate gradient, with as many swaps as its name says",
}


def cells(frame: pd.DataFrame | None) -> dict[str, Cells]:
    """Tables by their titles, a row for each task and condition; none if no attack chooses tokens.

    Args:
        frame: the frame of `tokens.parquet`.
    """
    if frame is None:
        return {}
    table, present = counts(frame), {*frame["attack"]}
    swaps, sparse = bool(present & {*SWAPS}), bool(present & {*SPARSE})
    place = ["task"] * (table["task"].nunique() > 1) + ["condition"]
    heading = [*place, "n", "right", *(f"≤ {n}" for n in range(1, MOST + 1)), "any", "median"]
    heading += ["top token"] * sparse + ["wrong swaps"] * swaps
    rows, sizes = [], []
    for row in table.to_dict("records"):
        of_row = [str(row[name]) for name in place]
        few = [f"{row[f'at_most_{n}']}" for n in range(1, MOST + 1)]
        texts = [*of_row, f"{row['n']}", f"{row['right']}", *few, f"{row['fell']}"]
        texts += [_number(row["median"], "g"), *([_number(row["first"], ".2f")] * sparse)]
        rows.append([*texts, *([_share(row)] * swaps)])
        names = [*_LARGEST, *(_NEAREST if swaps else ())]
        sizes.append([*of_row, *(_number(row[name], ".2f") for name in names)])
    notes = [
        "right: questions that are right without an attack; ≤ 1: those of them for which one token"
        " was enough; any: for which any number was; median: of these, the number of tokens",
        *(note for name, note in _NOTES.items() if name in present),
        *(["wrong swaps: share of the swaps that were tried, with a wrong answer"] * swaps),
    ]
    titles = [*_LARGEST.values(), *(_NEAREST.values() if swaps else ())]
    of_sizes = [
        "RMS, linf: the largest change of a token's embedding, as root mean square and as largest"
        " coordinate; median over the fallen questions, in units of the RMS of the embeddings;"
        " least linf: the smallest of all these questions",
        *([_OF_NEAREST] * swaps),
    ]
    of_titles = {TITLE: Cells(heading, rows, notes)}
    of_titles[SIZES] = Cells([*place, *titles], sizes, of_sizes)
    return of_titles | {EXAMPLES: _examples(frame)}


def _examples(frame: pd.DataFrame) -> Cells:
    """The changed tokens of the first questions that are right without an attack."""
    rows, present = [], {*frame["attack"]}
    right = frame[frame["tokens"].isna() | (frame["tokens"] > 0)]
    for (_, name), group in right.groupby(["task", "condition"], sort=False):
        for row in group.head(_FEW).to_dict("records"):
            pairs = zip(row["old"], row["old"] if row["new"] is None else row["new"], strict=True)
            texts = [quoted(a) if a == b else f"{quoted(a)} → {quoted(b)}" for a, b in pairs]
            place = [str(name), str(row["task"]), str(row["doc_id"])]
            rows.append([*place, ", ".join(texts) or "–", _strongest(row)])
    notes = [
        f"the first {_FEW} questions of each task that are right without an attack; tokens in the"
        " order of the question",
        *([_SALIENT] if present & {*SPARSE} else ()),
        *([_SENSITIVE] if "swap" in present else ()),
    ]
    return Cells(["condition", "task", "question", "tokens", "strongest"], rows, notes)


_SALIENT = (
    "strongest, of token_sparse: the tokens whose change by epsilon raises the loss most, to first"
    " order, each with its share of the sum over all tokens"
)
_SENSITIVE = (
    "strongest, of swap: the tokens with the most wrong answers, each with the share of its swaps"
    " that gave one"
)


def _strongest(row: Mapping[str, Any]) -> str:
    """The tokens with the largest saliency, or with the most swaps that give a wrong answer."""
    if row["attack"] in SPARSE and row["saliency"] is not None:
        shares = np.asarray(row["saliency"], float)
        shares = shares / max(shares.sum(), np.finfo(float).tiny)
    elif row["attack"] == "swap":
        shares = np.asarray(row["wrong"], float) / np.maximum(np.asarray(row["tried"], float), 1)
    else:
        return "–"
    best = (-shares).argsort(kind="stable")[:MOST]
    return ", ".join(f"{quoted(row['of_question'][i])} {shares[i]:.0%}" for i in best) or "–"


def quoted(text: str) -> str:
    """A token's text on one line, in quotes if it has spaces at an end or is none."""
    shown = text.replace("\n", "\\n").replace("|", "\\|")
    return shown if shown.strip() == shown != "" else f"'{shown}'"


# Columns of the table of sizes.
_LARGEST = {"rms": "RMS", "linf": "linf", "least_linf": "least linf"}
_NEAREST = {
    "nearest_rms": "nearest RMS",
    "nearest_linf": "nearest linf",
    "least_nearest": "least nearest",
}
_OF_NEAREST = (
    "nearest RMS, nearest linf: the smallest change of a token by any swap; median over the tokens"
    " of all prompts; least nearest: the smallest of all, as largest coordinate. No smaller ball in"
    " linf contains a swap"
)


def save(shown: Mapping[str, Cells], folder: Path) -> None:
    """Writes `tokens.md`; nothing without attacks that choose tokens."""
    if shown:
        parts = (f"{title.capitalize()}\n\n{cells.markdown()}" for title, cells in shown.items())
        write_text(folder / FILE, "\n".join(parts))


def _share(row: Mapping[str, Any]) -> str:
    """The share of single swaps with a wrong answer."""
    if row["attack"] == "gcg" or pd.isna(row["tried"]) or not row["tried"]:
        return "–"
    return f"{row['wrong'] / row['tried']:.1%}"


def _number(value: Any, form: str) -> str:
    return "–" if value is None or pd.isna(value) else format(value, form)
