"""Checks output folders. We write only into a folder that is new, empty, or has our mark.

In a folder with our mark we write only the files that we name, by `record.whole_or_not`. All other
files in it stay as they are.
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

# Errors of the system that another path does not mend.
_MACHINE = {EDQUOT, EIO, ENOSPC}
_TRIED = b"\0" * 4096  # written as a trial, because a full disk has room for an empty file


def resolved(path: str | os.PathLike[str], argument: str = "output") -> Path:
    """Resolves `~`, links and `..` in a path. Creates nothing.

    Code that writes resolves a path once, and then checks and writes the result. A folder that does
    not exist and a following `..` cancel each other, as in `os.path.realpath`.

    Args:
        path: the path as the user typed it.
        argument: the name of the argument.

    Returns:
        The path. It is relative if the given path is relative and leads into the working folder, so
        messages show what the user typed.

    Raises:
        UsageError: it is empty, contains NUL, or one of its links is broken.
        TypeError: it is not a path.
    """
    as_path(argument, path)
    text = os.fspath(path)
    return _followed(os.path.expanduser(text), text, argument)


def resolved_file(path: str | os.PathLike[str], argument: str = "output") -> Path:
    """`resolved` for a file that is written whole. A link with this name is not followed.

    Raises:
        UsageError: as for `resolved`, or the path names a folder.
    """
    as_path(argument, path)
    text = os.fspath(path)
    parent, name = os.path.split(os.path.expanduser(text))
    if text.strip() and name in ("", ".", ".."):
        raise invalid(argument, text, "the name of a file, not of a folder")
    return _followed(parent, text, argument) / name


def _followed(path: str, text: str, argument: str) -> Path:
    """`path` without links and `..`. Messages show `text`, the path as the user typed it."""
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
    """Refuses a pipe, a socket and a device, because reading could go on for ever.

    The pipe of a shell's `<(command)` is allowed. A missing file is left to the code that opens it.

    Args:
        path: path of a file to read.
        argument: the name of the argument.

    Raises:
        UsageError: it is not a file.
    """
    try:
        mode = os.stat(os.path.realpath(path)).st_mode  # the pipe of `<(command)` has no such path
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UsageError(f"{argument}={path}: must be a file, not a pipe or a device")


def check_writable(folder: Path, *names: str, argument: str = "output") -> None:
    """Tries to write files into a folder, which may not exist yet. Leaves nothing behind.

    Args:
        folder: a path from `resolved`.
        names: names of the files to be written.
        argument: the name of the argument.

    Raises:
        UsageError: they cannot be written.
        OSError: the disk is full or broken.
    """
    try:
        above = (folder, *folder.parents)
        nearest = next(path for path in above if path.is_symlink() or path.exists())
        new = folder.relative_to(nearest).parts
        longest = max((len(os.fsencode(draft_of(Path(name)).name)) for name in names), default=0)
        longest = max(longest, *(len(os.fsencode(part)) for part in new), 0)
        with suppress(ValueError, AttributeError):  # some systems do not say
            if longest > os.pathconf(nearest, "PC_NAME_MAX") > 0:
                raise OSError(ENAMETOOLONG, os.strerror(ENAMETOOLONG))
        # nothing is created before all arguments are known to be valid
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
    """Refuses a folder that we must not write into. Creates nothing.

    Args:
        folder: the output folder, from `resolved`.
        marked: gets the names in the folder, and returns whether our mark is among them.
        parts: subfolders that we write into.

    Raises:
        UsageError: it cannot be written, holds files of others, or one of its parts is a link.
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
    """Names in a folder that are neither locks, drafts, nor parts with only these."""
    names: list[str] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name in parts and path.is_dir():
            names += [f"{path.name}/{name}" for name in strangers(path)]
        elif not (path.name.endswith(DRAFT) or _is_lock(path)):
            names.append(path.name)
    return names


def clear_drafts(folder: Path, parts: Sequence[str] = ()) -> None:
    """Deletes the files that processes left behind because they died while they wrote."""
    for part in (folder, *(folder / part for part in parts)):
        for draft in part.glob(f".*{DRAFT}"):
            if not draft.is_dir():
                draft.unlink(missing_ok=True)


def check_same(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Compares the mark in a folder with the mark of the run that is about to write into it.

    Raises:
        UsageError: they differ; the message lists the differences.
    """
    differing = differences(there, here)
    if differing:
        raise UsageError(
            f"output={folder}: contains a run with other settings ({'; '.join(differing)}); must"
            " be another folder, or have the same settings"
        )


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The differences between two marks, one per line."""
    there, here = _flat(there), _flat(here)
    return [
        f"{key}: {_short(there.get(key))} there, {_short(here.get(key))} here"
        for key in {**there, **here}
        if there.get(key) != here.get(key)
    ]


def claim_file(path: Path, first_line: str, what: str, argument: str = "output") -> None:
    """Refuses a file that we must not replace.

    Args:
        path: the output file, from `resolved_file`.
        first_line: the first line of the files that we write under this name.
        what: the kind of file, in words.
        argument: the name of the argument.

    Raises:
        UsageError: it is a link, not a file, or a file with another first line.
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
    # the reader checks the other lines
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
