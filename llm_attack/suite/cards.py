"""The commands `card` and `board`. They need neither torch nor lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_attack.base.errors import UsageError
from llm_attack.base.folder import check_writable, resolved, resolved_file
from llm_attack.base.record import write_json
from llm_attack.suite import results
from llm_attack.suite.run.progress import written
from llm_attack.suite.studies import board as boards
from llm_attack.suite.studies import card as cards


def card(folder: Path, output: str | None, name: str | None, link: str | None) -> None:
    """The command `llm-attack card`: the card of a finished run."""
    folder = resolved(folder, "folder")
    path = resolved_file(output if output is not None else folder / cards.FILE)
    check_writable(path.parent, path.name)
    if path.exists():
        try:
            cards.load_card(path)
        except UsageError:
            raise UsageError(
                f"output={path}: exists and is no card; must be another file"
            ) from None
    made = cards.of_result(results.load(folder), name, link, f"folder={folder}")
    write_json(path, made)
    written(path)


def board(paths: Sequence[Path], output: str) -> None:
    """The command `llm-attack board`: pages that show cards."""
    folder = resolved(output)
    boards.check(folder)
    check_writable(folder, boards.MARK)
    loaded = [cards.load_card(path) for path in paths]
    boards.save(loaded, folder)
    shown = len({card["id"] for card in loaded})
    written(f"{folder}: index.html, with a page and a card for each of {shown}")
