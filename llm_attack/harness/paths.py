"""Paths of this machine as another one can read them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lm_eval

from llm_attack.harness.tasks import tasks_path


def portable(value: Any) -> Any:
    """`value`, a text or lists and dictionaries of texts, without absolute paths.

    In a text, what begins with a folder that has a name elsewhere, too, gets that name: `tasks`,
    `llm_attack`, `lm_eval`, `.`, `~`. Of a text that is another path, its last part remains.
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
    """Whether a text, which might be part of a prompt, is a path here."""
    try:
        path = Path(text)
        return path.is_absolute() and len(path.parts) > 2 and path.parent.is_dir()
    except (OSError, ValueError):
        return False
