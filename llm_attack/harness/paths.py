"""Rewrites paths of this machine so that another machine can read them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lm_eval

from llm_attack.harness.tasks import tasks_path


def portable(value: Any) -> Any:
    """Removes absolute paths from `value`: a text, or lists and dictionaries of texts.

    A path in a folder that other machines have, too, begins with the name of this folder: `tasks`,
    `llm_attack`, `lm_eval`, `.` or `~`. If the text is another path, only its last part remains.
    """
    return _replaced(value, _names())


def _names() -> list[tuple[re.Pattern[str], str]]:
    package = Path(__file__).resolve().parent.parent
    folders = {"tasks": tasks_path(), package.name: package, "~": Path.home(), ".": Path.cwd()}
    folders["lm_eval"] = Path(lm_eval.__file__).parent
    named = {str(p): name for name, path in folders.items() for p in (path, path.resolve())}
    return [
        (re.compile(rf"(?<![\w./\\-]){re.escape(path)}(?![\w.-])"), named[path])
        for path in sorted(named, key=len, reverse=True)
        if path != Path(path).anchor
    ]


def _replaced(value: Any, names: list[tuple[re.Pattern[str], str]]) -> Any:
    if isinstance(value, dict):
        return {_replaced(key, names): _replaced(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [_replaced(part, names) for part in value]
    if not isinstance(value, str):
        return value
    for path, name in names:
        value = path.sub(name, value)
    return Path(value).name if _is_path(value) else value


def _is_path(text: str) -> bool:
    """Whether a text is a path on this machine. It might also be part of a prompt."""
    try:
        path = Path(text)
        return path.is_absolute() and len(path.parts) > 2 and path.parent.is_dir()
    except (OSError, ValueError):
        return False
