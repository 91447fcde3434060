"""Turns settings into options of a command, which `--help` shows under headings of groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from llm_attack.base.declare import SettingSpec, declared, is_plain, parts, typed

_LAST = ("engine", "output", "cluster", "")  # groups that come after the others
_WIDEST = 50  # choices with at most so many characters are shown beside the name


def number(kind: type) -> Any:
    """The click type for an int or a float that is written plainly."""
    base = {int: click.INT, float: click.FLOAT}[kind]

    class Plain(type(base)):  # type: ignore[misc]
        def convert(self, value: Any, param: Any, ctx: Any) -> Any:
            if isinstance(value, str) and not is_plain(value):
                self.fail(f"{value!r} is not a valid {self.name}.", param, ctx)
            return super().convert(value, param, ctx)

    return Plain()


class Numbers(click.ParamType):  # type: ignore[type-arg]  # no parameter before click 8.4
    """Numbers separated by commas, as a tuple. `one` is int, float, or the type of each number."""

    def __init__(self, one: Any) -> None:
        self.one = number(one) if isinstance(one, type) else one
        self.name = f"{self.one.name},..."

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str):  # a default, or of a file
            return value
        try:
            several = parts(value) if "," in value else [value]
            return tuple(self.one.convert(part, param, ctx) for part in several)
        except click.BadParameter as error:
            if len(several) > 1:
                self.fail(f"{value!r}: {error.message}", param, ctx)
            raise


def examples(*commands: str) -> str:
    """The end of a `--help`: examples of command lines."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])


class Option(click.Option):
    """An option that `--help` shows under the heading `group`, with its choices."""

    def __init__(
        self, *names: Any, group: str = "", choices: Iterable[str] = (), **more: Any
    ) -> None:
        shown = "|".join(choices)
        if shown:  # not click.Choice: a refusal has the same words wherever the value was given
            more["metavar"] = f"[{shown}]"
        super().__init__(*names, **more)
        self.group = group


class Command(click.Command):
    """A command whose `--help` shows its options under the headings of their groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the groups in the order of their first options; those of `_LAST` come last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(option, "group", ""), []).append(record)
        for name in sorted(groups, key=lambda name: _LAST.index(name) if name in _LAST else -1):
            with formatter.section(f"{name.capitalize()} options" if name else "Options"):
                formatter.write_dl(groups[name])


def of_setting(name: str, about: SettingSpec, note: str = "", **more: Any) -> Option:
    """Makes the option of a setting. `note` is added after its meaning."""
    kind: Any = about.option
    if kind is None and about.kind in (int, float):
        kind = number(about.kind)
    if kind is None:
        kind = click.UNPROCESSED if about.kind is tuple else about.kind  # YAML has lists
    short = len("|".join(about.choices)) <= _WIDEST
    listed = f" One of {', '.join(about.choices)}." * (not short)
    text = f"{about.text}.{listed}{note}"
    choices = about.choices if short else ()
    return Option([f"--{name}"], type=kind, group=about.group, choices=choices, help=text, **more)


def options(kind: Any) -> list[Option]:
    """Makes an option for each setting of a dataclass, with the same name and default."""
    made = []
    for entry, about in declared(kind):
        default = entry.default
        default = typed(default) if isinstance(default, tuple) else default
        shown = None if default != "" else False
        flag = about.kind is bool
        more: dict[str, Any] = {"default": default, "is_flag": flag, "show_default": shown}
        made.append(of_setting(entry.name, about, **more))
    return made
