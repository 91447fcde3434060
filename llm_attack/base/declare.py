"""Settings are declared once. The fields of a dataclass hold their meaning and allowed values.

Validation, command-line options, tables of the documentation and names in results follow from the
declaration, so a new argument is one line. This module imports only the standard library.
`base.options` makes the options of a command.
"""

from __future__ import annotations

import builtins
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import wraps
from numbers import Integral, Real
from typing import Any, TypeVar

from llm_attack.base.errors import UsageError, hint, invalid


@dataclass(frozen=True)
class SettingSpec:
    """The declaration of a setting.

    Attributes:
        text: its meaning, without a full stop.
        kind: bool, int, float, str, or tuple for a value that may be a list.
        also_type: another allowed type, or several.
        option: the type of the command-line option, as click takes it; `kind` by default.
        group: heading in `--help`.
        choices: the values allowed, if they can be listed.
        minimum: the lowest number allowed.
        exclusive_minimum: whether `minimum` itself is too low.
        allowed: the allowed values in words, if the other attributes do not say them.
        parse: turns the given value into the setting's value, and accepts its own results. It
            returns a value that it cannot read unchanged, and `check` refuses it.
    """

    text: str
    kind: type = str
    also_type: type | tuple[type, ...] | None = None
    option: Any = None
    group: str = ""
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    exclusive_minimum: bool = False
    allowed: str | None = None
    parse: Callable[[Any], Any] | None = None

    def words(self) -> str:
        """The values allowed, in words."""
        if self.allowed is not None:
            return self.allowed
        if self.kind is int:
            return "an integer" + ("" if self.minimum is None else f", {self.minimum:g} or more")
        if self.kind is float:
            bound = "greater than" if self.exclusive_minimum else "at least"
            return "a finite number" + (
                "" if self.minimum is None else f", {bound} {self.minimum:g}"
            )
        minimum = "" if self.minimum is None else f", {self.minimum:g} or more"
        several = f"values, separated by commas{minimum}"
        return {bool: "True or False", str: "a text"}.get(self.kind, several)

    def allows(self, value: Any) -> bool:
        """Whether a value is allowed. A number is not a text, and True is not a number."""
        if self.also_type is not None and isinstance(value, self.also_type):
            return True
        if self.choices:
            return isinstance(value, str) and value in self.choices
        if self.kind is tuple and self.minimum is not None:
            minimum = self.minimum
            return bool(value) and all(self._in_range(part, minimum) for part in value)
        if self.kind in (int, float):
            number = Integral if self.kind is int else Real
            minimum = -sys.float_info.max if self.minimum is None else self.minimum
            return (
                isinstance(value, number)
                and not isinstance(value, bool)
                and self._in_range(value, minimum)
            )
        if self.kind is tuple:
            parts = value if isinstance(value, (list, tuple)) else (value,)
            return all(isinstance(part, (str, Real)) for part in parts)
        return isinstance(value, self.kind)

    def _in_range(self, value: Any, minimum: float) -> bool:
        # not isfinite(), which raises for integers beyond the floats; comparisons with NaN are
        # false
        return minimum <= value <= sys.float_info.max and not (
            self.exclusive_minimum and value == minimum
        )


def setting(default: Any, text: str, **about: Any) -> Any:
    """Declares a field of a dataclass as a setting. None is allowed if it is the default.

    Args:
        default: the default value.
        text: the meaning.
        **about: other attributes of `SettingSpec`. The kind is the annotation's first type by
            default.
    """
    return field(default=default, metadata={"about": (text, about)})


def again(kind: Any, name: str, default: Any) -> Any:
    """Declares the setting `name` of the dataclass `kind` once more, with another default."""
    return field(default=default, metadata=kind.__dataclass_fields__[name].metadata)


def declared(kind: Any) -> Iterator[tuple[Field[Any], SettingSpec]]:
    """The settings of a dataclass or an instance; those that may be positional come first."""
    for entry in sorted(fields(kind), key=lambda entry: entry.kw_only is True):
        if "about" in entry.metadata:
            text, about = entry.metadata["about"]
            kind = getattr(builtins, str(entry.type).split(" | ")[0], tuple)
            yield entry, SettingSpec(text, **{"kind": kind, **about})


def names(kind: Any) -> list[str]:
    """The names of the settings of a dataclass."""
    return [entry.name for entry, _ in declared(kind)]


def parse(settings: Any) -> None:
    """Turns the given settings into their values; for __post_init__, before `check`.

    Settings are frozen. This is the only place where they are set.

    Raises:
        UsageError: a value is not allowed.
    """
    for entry, about in declared(settings):
        if about.parse is not None:
            object.__setattr__(settings, entry.name, about.parse(getattr(settings, entry.name)))


_Kind = TypeVar("_Kind")


def remembers(kind: type[_Kind]) -> type[_Kind]:
    """Makes a dataclass remember what was given: `given` has the names, during __post_init__ too.

    A value that was given may equal the default. Nothing else tells the two apart.
    """
    init: Callable[..., None] = kind.__init__
    signature = inspect.signature(init)

    @wraps(init)
    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind_partial(self, *args, **kwargs) if args else None
        object.__setattr__(self, "given", frozenset(bound.arguments if bound else kwargs))
        init(self, *args, **kwargs)

    kind.__init__ = remembering  # type: ignore[method-assign]
    return kind


def parts(text: str) -> list[str]:
    """The parts of a text between its commas, blank ones included."""
    return [part.strip() for part in text.split(",")]


def listed(value: Any) -> Any:
    """Turns a text with commas, a list or one number into a tuple.

    Other values are returned unchanged.
    """
    if isinstance(value, str):
        return tuple(filter(None, parts(value)))
    if isinstance(value, Real):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def check(settings: Any) -> None:
    """Compares all settings with their declarations; for __post_init__.

    Raises:
        UsageError: a value is not allowed.
    """
    for entry, about in declared(settings):
        value = getattr(settings, entry.name)
        if (value is None and entry.default is None) or about.allows(value):
            continue
        choices = ("True", "False") if about.kind is bool else about.choices
        raise invalid(entry.name, value, choices or about.words())


def check_names(given: Iterable[Any], known: Sequence[str]) -> None:
    """Raises `UsageError`, which suggests the closest name, if a name is unknown."""
    for name in given:
        if name not in known:
            raise UsageError(f"{name}: must be one of {', '.join(known)}{hint(name, known)}")


def is_plain(text: str) -> bool:
    """Whether a number is written plainly. Python also reads `1_0`, ` 1 ` and other digits."""
    return text.isascii() and "_" not in text and text == text.strip()


def underscored(name: str) -> str:
    """The name of a setting, which may be typed with hyphens."""
    return name.replace("-", "_")


# Lets options be typed with hyphens or underscores.
DIALECT = {"token_normalize_func": underscored}


def table(*kinds: Any, without: Iterable[str] = ()) -> str:
    """A Markdown table of settings: name, allowed values, default and meaning.

    Args:
        *kinds: the dataclasses.
        without: names of settings to leave out.
    """
    rows = ["| argument | values | default | meaning |", "|---|---|---|---|"]
    left_out = set(without)
    for entry, about in (pair for kind in kinds for pair in declared(kind)):
        if entry.name in left_out:
            continue
        values = " ".join(f"`{choice}`" for choice in about.choices) or about.words()
        default = typed(entry.default)
        default = f"`{default}`" if default else "–"
        rows.append(f"| `{entry.name}` | {values} | {default} | {about.text}. |")
    return "\n".join(rows) + "\n"


def typed(value: Any) -> str:
    """A value as one types it on a command line; empty for None."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)
