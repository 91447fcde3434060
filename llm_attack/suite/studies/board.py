"""A board: cards of many models as pages that need no server and no network.

Models are compared only if they answered the same questions under the same version of a standard.
Each such set has its own table and figure. Text from cards is escaped. A content security policy
allows only the script and the styles of the page, and no connections.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from llm_attack.base.errors import UsageError
from llm_attack.base.record import as_csv, write_json, write_text
from llm_attack.suite.report.paper import BIBTEX, escaped

_HERE = Path(__file__).parent
MARK = "board.json"  # the file that marks a folder as a board
MODELS = "models"
_FLAG = "⚠"

Card = Mapping[str, Any]


class Set(NamedTuple):
    """Cards that can be compared.

    Attributes:
        name: standard and tasks.
        anchor: name of its part of the page and of its files.
        cards: the cards, the best first.
        conditions: names of the standard's conditions.
    """

    name: str
    anchor: str
    cards: list[Card]
    conditions: list[str]


def sets(cards: Iterable[Card]) -> list[Set]:
    """Groups cards by standard and questions. If two have the same identity, the newer one counts.

    Args:
        cards: results of `load_card`.
    """
    newest: dict[str, Card] = {}
    for card in sorted(cards, key=lambda card: str(card["date"])):
        newest[card["id"]] = card
    grouped: dict[tuple[Any, ...], list[Card]] = {}
    for card in newest.values():
        asked = tuple(sorted((t["name"], t["questions"], t["n"]) for t in card["tasks"]))
        grouped.setdefault((card["standard"], asked), []).append(card)
    found = []
    for number, (standard, asked) in enumerate(sorted(grouped, key=str), 1):
        members = grouped[standard, asked]
        members.sort(key=lambda card: (-_robust(card, _middle(card)), card["model"]["name"]))
        names = ", ".join(name for name, _, _ in asked)
        n = sum(n for *_, n in asked)
        conditions = [row["condition"] for row in members[0]["robust"]]
        title = f"{standard}: {names} ({n} questions)"
        found.append(Set(title, f"set-{number}", members, conditions))
    return found


def _middle(card: Card) -> str:
    """The condition of the figure, which also sorts tables: the one of the middle amplitude."""
    last = card["robust"][-1]["attack"]
    ladder = [row for row in card["robust"] if row["norm"] == "linf" and row["attack"] == last]
    return str(ladder[len(ladder) // 2]["condition"])


def _robust(card: Card, condition: str) -> float:
    rows = (row for row in card["robust"] if row["condition"] == condition)
    return float(next(rows)["accuracy"]["value"])


def frame(members: Set) -> pd.DataFrame:
    """A row per model: its properties, and each accuracy with its interval."""
    rows = []
    for card in members.cards:
        model = card["model"]
        row = {key: model[key] for key in ("name", "family", "parameters", "revision", "weights")}
        row |= {"standard": card["standard"], "n": card["n"], "date": card["date"]}
        row["failed_checks"] = "; ".join(card["failed_checks"])
        for name, part in _accuracies(card):
            row |= {name: part["value"], f"{name} low": part["low"], f"{name} high": part["high"]}
        rows.append(row)
    return pd.DataFrame(rows)


def _accuracies(card: Card) -> list[tuple[str, Mapping[str, float]]]:
    robust = [(str(row["condition"]), row["accuracy"]) for row in card["robust"]]
    return [("none", card["clean"]["accuracy"]), *robust]


def latex(members: Set) -> str:
    """The table of a set for a paper; accuracies in percent, with their 95 % intervals."""
    heads = ["Model", "Clean", *members.conditions]
    lines = [
        f"% {escaped(members.name)}; a board of llm-attack",
        rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        r"\hline",
        " & ".join(map(escaped, heads)) + r" \\",
        r"\hline",
    ]
    for card in members.cards:
        cells = [
            f"{100 * p['value']:.1f} ({100 * p['low']:.1f}--{100 * p['high']:.1f})"
            for _, p in _accuracies(card)
        ]
        flag = "$^*$" if card["failed_checks"] else ""
        lines.append(" & ".join([escaped(card["model"]["name"]) + flag, *cells]) + r" \\")
    lines += [r"\hline", r"\end{tabular}"]
    if any(card["failed_checks"] for card in members.cards):
        lines.append("% * failed a check: its accuracy is an upper bound that may be far off")
    return "\n".join(lines) + "\n"


def bibtex(cards: Iterable[Card]) -> str:
    """An entry for each card, and the entries for this program."""
    entries = []
    for card in cards:
        by = card["submitted_by"] or {}
        model = escaped(card["model"]["name"])
        lines = [f"@misc{{llm_attack_{card['id']},"]
        if by.get("name"):
            lines.append(f"  author = {{{{{escaped(by['name'])}}}}},")
        lines.append(f"  title = {{Robust accuracy of {model} under {escaped(card['standard'])}}},")
        if by.get("link"):
            lines.append(f"  howpublished = {{\\url{{{_address(by['link'])}}}}},")
        entries.append("\n".join([*lines, f"  year = {{{str(card['date'])[:4]}}},", "}"]))
    version = next((c["package"]["version"] for c in cards), None) or ""
    return "\n\n".join([*entries, BIBTEX.replace("VERSION", escaped(version))])


def _address(link: str) -> str:
    """An address without characters that would end its argument in LaTeX."""
    return re.sub(r"[\\{}%#\s]", lambda found: f"%{ord(found[0]):02x}", link)


def check(folder: Path) -> None:
    """Refuses a folder that holds other files than a board.

    Raises:
        UsageError: the folder is a file, or has files and is no board.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output={folder}: is a file; must be a folder")
    if (folder / MODELS).is_symlink():
        raise UsageError(
            f"output={folder}: {MODELS} is a link; must be a folder of the board's own"
        )
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise UsageError(
            f"output={folder}: holds other files; must be a new folder, or one of a board"
        )


def save(cards: Sequence[Card], folder: Path) -> list[str]:
    """Writes the pages, and the files for download, into `folder`.

    Returns:
        The names of the files, relative to `folder`.
    """
    compared = sets(cards)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODELS).mkdir(exist_ok=True)
    written = []

    def text(name: str, content: str) -> None:
        write_text(folder / name, content)
        written.append(name)

    write_json(folder / MARK, {"board_version": 1, "cards": sorted(c["id"] for c in cards)})
    every = [card for members in compared for card in members.cards]
    for members in compared:
        text(f"{members.anchor}.csv", as_csv(frame(members), "%.6g"))
        text(f"{members.anchor}.tex", latex(members))
    text("board.bib", bibtex(every))
    for card in every:
        write_json(folder / MODELS / f"{card['id']}.json", card)
        written.append(f"{MODELS}/{card['id']}.json")
        page = _page("board_model.html.j2", "", card=card, accuracies=_accuracies(card))
        text(f"{MODELS}/{card['id']}.html", page)
    families = sorted({str(card["model"]["family"]) for card in every})
    figures = {members.anchor: _points(members) for members in compared}
    script = (_HERE / "board.js").read_text("utf-8")
    page = _page(
        "board.html.j2", script, sets=compared, families=families, figures=figures, rows=_accuracies
    )
    text("index.html", page)
    return written


class Point(NamedTuple):
    """A model in the figure: clean and robust accuracy, in the units of the drawing."""

    card: Card
    x: float
    y: float
    low: float
    high: float
    left: float
    right: float


_SIZE = 300.0  # of the drawing, without its frame


def _points(members: Set) -> dict[str, Any]:
    """The content of a set's figure."""
    condition = _middle(members.cards[0])
    points = []
    for card in members.cards:
        clean = card["clean"]["accuracy"]
        robust = next(r["accuracy"] for r in card["robust"] if r["condition"] == condition)
        up = {end: round(_SIZE * (1 - robust[end]), 1) for end in ("value", "low", "high")}
        along = {end: round(_SIZE * clean[end], 1) for end in ("value", "low", "high")}
        ends = up["low"], up["high"], along["low"], along["high"]
        points.append(Point(card, along["value"], up["value"], *ends))
    return {"condition": condition, "points": points, "size": _SIZE}


def _page(name: str, script: str, **content: Any) -> str:
    """A page from its template, with the styles and the script in it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(percent=_percent, size=_size_of)
    style = (_HERE / "board.css").read_text("utf-8")
    page: str = environment.get_template(name).render(
        **content,
        flag=_FLAG,
        models=MODELS,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return page.encode("utf-8", "replace").decode("utf-8")


def _hash(text: str) -> str:
    """The hash of a part of a page, for a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _size_of(n: int | None) -> str:
    """A number of parameters in short form, such as 1.1 B."""
    if n is None:
        return "unknown"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)
