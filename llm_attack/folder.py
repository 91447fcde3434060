"""Whose an output is. A folder is new, empty or marked as ours, or nothing is written there.

Of a folder with our mark only files that we name are written, by `record.whole_or_not`; what else
lies there stays as it is.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_attack.errors import UsageError
from llm_attack.record import DRAFT


def claim(folder: Path, marked: Callable[[list[str]], bool], parts: Sequence[str] = ()) -> None:
    """Refuses a folder that is not ours to write into; makes nothing.

    Args:
        folder: the output, which may itself be a link to a folder.
        marked: told the names of what is there, whether among it is our mark.
        parts: subfolders that we write into.

    Raises:
        UsageError: it cannot be written, holds what is not ours, or a part of it is a link.
    """
    _check_writable(folder)
    for part in parts:
        if (folder / part).is_symlink():
            raise UsageError(
                f"output={folder}: {part} there is a link; must be a folder, or not exist yet"
            )
    names = strangers(folder, parts)  # before the mark, which other processes write first
    if names and not marked(names):
        shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
        raise UsageError(
            f"output={folder}: holds {shown}, and no mark of a run; must be a new folder, an empty"
            " one, or that of the same run"
        )


def strangers(folder: Path, parts: Sequence[str] = ()) -> list[str]:
    """Names of what is in a folder besides locks, drafts, and parts with nothing but these."""
    found: list[str] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name in parts and path.is_dir():
            found += [f"{path.name}/{name}" for name in strangers(path)]
        elif not (path.name.endswith(DRAFT) or _is_lock(path)):
            found.append(path.name)
    return found


def clear_drafts(folder: Path, parts: Sequence[str] = ()) -> None:
    """Deletes what processes that died in the middle of writing have left."""
    for part in (folder, *(folder / part for part in parts)):
        for draft in part.glob(f".*{DRAFT}"):
            draft.unlink(missing_ok=True)


def check_same(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Compares the mark of the run in a folder with that of the run that is to write there.

    Raises:
        UsageError: they differ; the message says in what.
    """
    differing = differences(there, here)
    if differing:
        raise UsageError(
            f"output={folder}: holds a run with other settings ({'; '.join(differing)}); must be"
            " the same run, or another folder"
        )


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between two marks, a line each."""
    there, here = _flat(there), _flat(here)
    return [
        f"{key}: {_short(there.get(key))} there, {_short(here.get(key))} here"
        for key in {**there, **here}
        if there.get(key) != here.get(key)
    ]


def claim_file(path: Path, first_line: str) -> None:
    """Refuses a file that is not ours to replace.

    Args:
        path: the output.
        first_line: of what we write there.

    Raises:
        UsageError: it is a link, no file, or a file that begins otherwise.
    """
    try:
        ours = path.is_file() and not path.is_symlink() and _begins(path, first_line)
        free = ours or not (path.exists() or path.is_symlink())
    except OSError:
        free = False
    if not free:
        raise UsageError(
            f"output={path}: is not of a comparison; must be a file of one, or not exist yet"
        )


def _begins(path: Path, line: str) -> bool:
    # what stands further on is for the reader
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(len(line) + 1) in ("", f"{line}\n")


def _is_lock(path: Path) -> bool:
    return path.suffix == ".lock" and path.is_file() and path.stat().st_size == 0


def _check_writable(folder: Path) -> None:
    try:
        above = (folder, *folder.parents)
        nearest = next(path for path in above if path.is_symlink() or path.exists())
        # nothing is made before all arguments are known to be good
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UsageError(
            f"output={folder}: must be a folder that can be written, or not exist yet"
            f" ({error.strerror})"
        ) from None


def _flat(mark: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mark.items():
        inner = value.items() if isinstance(value, dict) else ()
        flat |= {f"{key}.{name}": of for name, of in inner} or {key: value}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
