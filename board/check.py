"""Checks submitted cards: their form, hashes and plausibility, and a few questions again.

    python board/check.py [CARDS...] [--rerun 10]

Without cards, it checks all in `board/cards`. The exit code is 1 if something is wrong with a card.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any

from llm_attack import load_card
from llm_attack.base.errors import UsageError
from llm_attack.base.failures import one_line

CARDS = Path(__file__).parent / "cards"
_DIFFERENT = 0.05  # share of the answers that may differ, because rounding decides a few
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HARMLESS = {"revision", "subfolder", "dtype", "max_length", "add_bos_token", "prefix_token_id"}
_KEPT = ("num_fewshot", "apply_chat_template", "system_instruction", "fewshot_as_multiturn")


def cannot_repeat(card: dict[str, Any]) -> str | None:
    """The reason why a card is not repeated here; None if it is.

    A card may come from anybody. Some arguments of a model run code, and a path leads to this
    machine. So the model must be the bundled one, or on the hub.
    """
    source, arguments = card["model"]["source"], card["settings"].get("model_args") or {}
    if source != "demo" and not _HUB.fullmatch(source):
        return f"model={source}: is not on the hub"
    strange = sorted({*arguments} - _HARMLESS)
    if strange:
        return f"model_args={strange[0]}=...: is not one of {', '.join(sorted(_HARMLESS))}"
    if not all(isinstance(value, (str, int)) for value in arguments.values()):
        return "model_args: must be texts and numbers"
    return None


def rerun(card: dict[str, Any], n: int) -> str | None:
    """Repeats the first questions of a card; returns the differences in one line, or None.

    Args:
        card: the result of `load_card`.
        n: about how many questions, over all tasks; at least one of each.
    """
    from llm_attack import robust_accuracy

    names = [task["name"] for task in card["tasks"]]
    settings = {k: v for k in _KEPT if (v := card["settings"].get(k)) not in (None, False)}
    found = robust_accuracy(
        card["model"]["source"],
        tasks=names,
        version=card["standard"],
        limit=math.ceil(n / len(names)),
        progress="quiet",
        model_args=card["settings"].get("model_args") or {},
        **settings,
    )
    if found["model"]["weights"] != card["model"]["weights"]:
        return "weights: the model that is loaded has others"
    pairs = [
        pair
        for here, there in zip(_rows(found), _rows(card), strict=True)
        for name in names
        for pair in zip(here[name]["right"], there[name]["right"], strict=False)
    ]
    differing = sum(here != there for here, there in pairs)
    if differing > _DIFFERENT * len(pairs):
        return f"{differing} of {len(pairs)} answers differ when they are repeated"
    return None


def _rows(card: dict[str, Any]) -> list[dict[str, Any]]:
    return [card["clean"]["tasks"], *(row["tasks"] for row in card["robust"])]


def check(path: Path, n: int) -> list[str]:
    """The faults of a card, a line each."""
    try:
        card = load_card(path)
    except UsageError as error:
        return [str(error)]
    if not n:
        return []
    why = cannot_repeat(card)
    if why is not None:
        print(f"{path}: not repeated ({why})")
        return []
    try:
        wrong = rerun(card, n)
    except OSError as error:  # the model cannot be loaded here
        print(f"{path}: not repeated ({one_line(error)})")
        return []
    except Exception as error:
        return [f"card={path}: cannot be repeated ({one_line(error)})"]
    return [] if wrong is None else [f"card={path}: {wrong}"]


def main() -> int:
    """Checks the cards and returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("cards", nargs="*", type=Path, default=sorted(CARDS.glob("*.json")))
    parser.add_argument("--rerun", type=int, default=0, metavar="N", help="questions to repeat")
    given = parser.parse_args()
    wrong = [line for path in given.cards for line in check(path, given.rerun)]
    print(*wrong, f"{len(given.cards)} cards checked", sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
