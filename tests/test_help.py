"""The output of `--help`: options under the headings of their groups, with their choices."""

import re

import click
import pytest
from click.testing import CliRunner

from llm_attack.attacks.settings import StepSettings
from llm_attack.base.declare import declared
from llm_attack.cli import main
from llm_attack.experiments import FIGURES
from llm_attack.suite.plan import Plan

COMMANDS = {
    "run": ["run"],
    "doctor": ["doctor"],
    **{str(command.name): ["reproduce", str(command.name)] for command in FIGURES},
}


def shown(words):
    done = CliRunner().invoke(main, [*words, "--help"], terminal_width=80)
    assert done.exit_code == 0
    return done.output


def under_headings(text):
    """The names of options by the headings that they stand under."""
    parts = re.split(r"^(\w[\w ]*):$", text, flags=re.MULTILINE)[1:]
    names = [re.findall(r"^  (?:-\w, )?--(\w+)", part, re.MULTILINE) for part in parts[1::2]]
    return dict(zip(parts[::2], names, strict=True))


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_every_option_stands_under_a_heading(words):
    text = shown(words)
    found = under_headings(text)
    command = main
    for word in words:
        command = command.get_command(None, word)
    with click.Context(command) as context:
        everything = [max(param.opts, key=len).lstrip("-") for param in command.get_params(context)]
    assert found.pop("Options") == ["help"]
    assert sorted(sum(found.values(), ["help"])) == sorted(everything)
    assert len(found) >= 4 and max(map(len, text.splitlines())) <= 80


def test_headings_of_a_run():
    found = under_headings(shown(["run"]))
    assert list(found) == [
        *(f"{name} options" for name in ("Model", "Task", "Attack", "Threat model")),
        *("Certificate options", "Engine options", "Output options", "Cluster options", "Options"),
    ]
    assert found["Cluster options"] == ["shard", "ray", "ray_workers"]
    assert {about.group for _, about in declared(StepSettings)} == {"attack"}


def test_choices_are_shown():
    text = shown(["run"])
    for entry, about in declared(Plan):
        if about.choices:
            assert f"--{entry.name} [{'|'.join(about.choices)}]" in text
    assert "--progress [bar|json|quiet]" in text
    # as many attacks as there is no room for beside the name
    assert "One of none, random," in " ".join(shown(["reproduce", "fig4"]).split())


def every_command(command, words=()):
    """Each command with a help of its own, and its words."""
    if words[-1:] not in (("eval",), ("fig3",)):  # lm-eval's own, and one that is another command
        yield command, words
    for name in getattr(command, "commands", {}):
        yield from every_command(command.commands[name], (*words, name))


def test_three_examples_each_which_can_be_read():
    """Names and values of options are right; files and folders are the reader's."""
    for command, words in every_command(main):
        if not words:
            continue
        given = [line.strip() for line in (command.epilog or "").splitlines()[2:]]
        assert len(given) == 3 and all(f"  {line}" in shown(words) for line in given), words
        assert len(set(given)) == 3
        for line in given:
            program, *rest = line.split()
            assert program == "llm-attack"
            found = main
            while hasattr(found, "commands"):
                name, *rest = rest
                found = found.commands[name]
            with found.make_context(name, list(rest)) as context:
                known = {param.name for param in found.get_params(context)}
                assert set(context.params) <= known
                if words == ("run",):
                    own = {entry.name for entry, _ in declared(Plan)}
                    Plan(**{k: v for k, v in context.params.items() if k in own})


def test_no_line_of_a_list_is_cut():
    for command, words in every_command(main):
        if hasattr(command, "commands"):
            listed = shown(words).partition("\nCommands:")[2].partition("\n\n")[0]
            assert listed and "..." not in listed and "Fig." not in listed, listed


def test_all_commands_are_listed():
    """Also the experiments, which are imported only when they are asked for."""
    listed = re.findall(r"^  (\w+)  ", shown([]).partition("Commands:")[2], re.MULTILINE)
    assert listed == sorted([*main.commands, "reproduce"])
