"""Whose an output is. A folder is new, empty or marked as ours, or nothing is written there.

Of a folder with our mark only files that we name are written, by `record.whole_or_not`; what else
lies there stays as it is.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from errno import EDQUOT, EIO, ENAMETOOLONG, ENOSPC
from pathlib import Path
from typing import Any

from llm_attack.base.errors import UsageError, as_path, invalid
from llm_attack.base.record import DRAFT, draft_of

# Errors of the system that no other path mends.
_MACHINE = {EDQUOT, EIO, ENOSPC}
_TRIED = b"\0" * 4096  # what is written on trial: an empty file has room on a full disk


def resolved(path: str | os.PathLike[str], argument: str = "output") -> Path:
    """Where `path` leads: `~` and links are followed, `..` is taken. Makes nothing.

    Whatever writes resolves a path once, and then checks and writes what this returns. A folder
    that does not exist and a `..` behind it cancel each other, as in `os.path.realpath`.

    Args:
        path: as the user gave it.
        argument: what the user gave it as.

    Returns:
        The path; relative if the given one is and leads into the working folder, so that messages
        show what was typed.

    Raises:
        UsageError: it is empty, has a NUL, or a link in it leads nowhere.
        TypeError: it is no path.
    """
    as_path(argument, path)
    text = os.fspath(path)
    return _followed(os.path.expanduser(text), text, argument)


def resolved_file(path: str | os.PathLike[str], argument: str = "output") -> Path:
    """`resolved` of a file, which is written as a whole; a link of this name is not followed.

    Raises:
        UsageError: as `resolved`, or it names a folder.
    """
    as_path(argument, path)
    text = os.fspath(path)
    parent, name = os.path.split(os.path.expanduser(text))
    if text.strip() and name in ("", ".", ".."):
        raise invalid(argument, text, "the name of a file, not of a folder")
    return _followed(parent, text, argument) / name


def _followed(path: str, text: str, argument: str) -> Path:
    """`path` without links and `..`; `text` is what the user gave, for messages."""
    if not text.strip() or "\0" in text:
        raise invalid(argument, text, "a path, not empty and without NUL")
    try:
        here = followed = Path.cwd()
        for part in Path(path).parts:
            followed = followed.parent if part == ".." else followed / part
            if followed.is_symlink():
                followed = followed.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        reason = getattr(error, "strerror", None) or "its links form a loop"
        raise UsageError(
            f"{argument}={text}: must be a folder or file that can be made or written ({reason})"
        ) from None
    inside = followed.is_relative_to(here) and not Path(path).is_absolute()
    return followed.relative_to(here) if inside else followed


def check_readable(path: str | os.PathLike[str], argument: str) -> None:
    """Refuses a pipe, a socket or a device, from which one could read for ever.

    What a shell puts in place of `<(command)` can be read. A file that is not there is for whoever
    opens it.

    Args:
        path: of a file that is to be read.
        argument: what the user gave it as.

    Raises:
        UsageError: it is none.
    """
    try:
        mode = os.stat(os.path.realpath(path)).st_mode  # that of `<(command)` has no such path
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UsageError(f"{argument}={path}: must be a file, not a pipe or a device")


def check_writable(folder: Path, *names: str, argument: str = "output") -> None:
    """Tries whether files can be written in a folder that may have to be made; leaves nothing.

    Args:
        folder: of `resolved`.
        names: of files that are to be written there.
        argument: what the user gave it as.

    Raises:
        UsageError: they cannot.
        OSError: the disk is full or broken.
    """
    try:
        above = (folder, *folder.parents)
        nearest = next(path for path in above if path.is_symlink() or path.exists())
        new = folder.relative_to(nearest).parts
        longest = max((len(os.fsencode(draft_of(Path(name)).name)) for name in names), default=0)
        longest = max(longest, *(len(os.fsencode(part)) for part in new), 0)
        with suppress(ValueError, AttributeError):  # of a system that does not tell
            if longest > os.pathconf(nearest, "PC_NAME_MAX") > 0:
                raise OSError(ENAMETOOLONG, os.strerror(ENAMETOOLONG))
        # nothing is made before all arguments are known to be good
        with tempfile.TemporaryFile(dir=nearest, prefix=".", suffix=DRAFT) as file:
            file.write(_TRIED)
    except OSError as error:
        if error.errno in _MACHINE:
            raise
        what = f"a file in {folder}" if names else "a folder"
        shown = folder / names[0] if names else folder
        raise UsageError(
            f"{argument}={shown}: must be {what} that can be written, or not exist yet"
            f" ({error.strerror})"
        ) from None


def claim(folder: Path, marked: Callable[[list[str]], bool], parts: Sequence[str] = ()) -> None:
    """Refuses a folder that is not ours to write into; makes nothing.

    Args:
        folder: the output, of `resolved`.
        marked: told the names of what is there, whether among it is our mark.
        parts: subfolders that we write into.

    Raises:
        UsageError: it cannot be written, holds what is not ours, or a part of it is a link.
    """
    check_writable(folder)
    for part in parts:
        if (folder / part).is_symlink():
            raise UsageError(
                f"output={folder}: contains the link {part}; it must be a folder, or not exist yet"
            )
    names = strangers(folder, parts)  # before the mark, which other processes write first
    if names and not marked(names):
        shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
        raise UsageError(
            f"output={folder}: contains {shown}, but no run; must be a new folder, an empty"
            " folder, or the folder of the same run"
        )


def strangers(folder: Path, parts: Sequence[str] = ()) -> list[str]:
    """Names of what is in a folder besides locks, drafts, and parts with nothing but these."""
    names: list[str] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name in parts and path.is_dir():
            names += [f"{path.name}/{name}" for name in strangers(path)]
        elif not (path.name.endswith(DRAFT) or _is_lock(path)):
            names.append(path.name)
    return names


def clear_drafts(folder: Path, parts: Sequence[str] = ()) -> None:
    """Deletes what processes that died in the middle of writing have left."""
    for part in (folder, *(folder / part for part in parts)):
        for draft in part.glob(f".*{DRAFT}"):
            if not draft.is_dir():
                draft.unlink(missing_ok=True)


def check_same(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Compares the mark of the run in a folder with that of the run that is to write there.

    Raises:
        UsageError: they differ; the message says in what.
    """
    differing = differences(there, here)
    if differing:
        raise UsageError(
            f"output={folder}: contains a run with other settings ({'; '.join(differing)}); must"
            " be another folder, or have the same settings"
        )


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The differences between two marks, a line each."""
    there, here = _flat(there), _flat(here)
    return [
        f"{key}: {_short(there.get(key))} there, {_short(here.get(key))} here"
        for key in {**there, **here}
        if there.get(key) != here.get(key)
    ]


def claim_file(path: Path, first_line: str, what: str, argument: str = "output") -> None:
    """Refuses a file that is not ours to replace.

    Args:
        path: the output, of `resolved_file`.
        first_line: of what we write there.
        what: it is, in words.
        argument: what the user gave it as.

    Raises:
        UsageError: it is a link, no file, or a file that begins otherwise.
    """
    try:
        ours = path.is_file() and not path.is_symlink() and _begins(path, first_line)
        free = ours or not (path.exists() or path.is_symlink())
    except OSError:
        free = False
    if not free:
        fault = f"is a link, and not {what}" if path.is_symlink() else f"is not {what}"
        raise UsageError(f"{argument}={path}: {fault}; must be such a file, or not exist yet")


def _begins(path: Path, line: str) -> bool:
    # what stands further on is for the reader
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(len(line) + 1) in ("", f"{line}\n")


def _is_lock(path: Path) -> bool:
    return path.suffix == ".lock" and path.is_file() and path.stat().st_size == 0


def _flat(mark: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mark.items():
        inner = value.items() if isinstance(value, dict) else ()
        flat |= {f"{key}.{name}": part for name, part in inner} or {key: value}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
