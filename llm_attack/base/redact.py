"""Hides secrets before they reach a file or a screen. Names, shapes and parts of URLs show them.

This module imports only the standard library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

# Whole names, because `prefix_token_id`, `think_end_token` and others like them are no secrets.
_NAME = (
    r"(?:\w+[_-])?(?:(?:hf|hub|huggingface|auth|access|api|bearer|refresh|session|secret|user|github)[_-]?token"
    r"|password|passwd|passphrase|secret|(?:secret|api|access|private)[_-]?key|credentials?)"
    r"|token|pwd|auth|authorization"
)
_SECRET = re.compile(_NAME, re.IGNORECASE)

# `use_auth_token=True` says that a secret exists, and is none itself.
_PLAIN = r"(?!(?:true|false|none|null)\b)"
_PAIR = re.compile(rf"(?<![\w-])({_NAME})(=|['\"]:\s?)(['\"]?){_PLAIN}[^\s,;&'\"]+", re.IGNORECASE)
_URL = re.compile(r"(?<=://)[^\s/@:]*:[^\s/]*(?=@)")
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{10,}"
    r"|sk-(?:[A-Za-z0-9]+[_-])*[A-Za-z0-9]{16,}[\w-]*"
    r"|gh[opsru]_[A-Za-z0-9]{10,}|github_pat_\w{10,}|glpat-[\w-]{10,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{12,}"
    r"|xox[a-z]-[\w-]{10,}|AIza[\w-]{30,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+"
    r")"
)


def is_secret(name: object) -> bool:
    """Whether a value with this name is a secret, which files and screens must not show."""
    return _SECRET.fullmatch(str(name)) is not None


def redacted(value: Any) -> Any:
    """Hides every secret in `value`, which is a text, or lists and dictionaries of any depth."""
    if isinstance(value, str):
        text = _URL.sub(HIDDEN, value)
        text = _PAIR.sub(rf"\1\2\3{HIDDEN}", text)
        return _SHAPES.sub(HIDDEN, text)
    if isinstance(value, Mapping):
        return {
            redacted(key): HIDDEN if is_secret(key) and _hides(part) else redacted(part)
            for key, part in value.items()
        }
    if isinstance(value, list):
        return list(map(redacted, value))
    if isinstance(value, tuple):
        return tuple(map(redacted, value))
    return value


def _hides(value: Any) -> bool:
    return not (value is None or isinstance(value, bool) or value == "")


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `settings` without secrets, because numbers do not depend on them."""
    return {name: redacted(value) for name, value in settings.items() if not is_secret(name)}
