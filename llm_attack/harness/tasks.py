"""Starts lm-eval with the model and the tasks of this project."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from llm_attack._shim import register
from llm_attack.base.device import check_device
from llm_attack.base.errors import UsageError, closest
from llm_attack.base.failures import one_line
from llm_attack.base.folder import check_writable, resolved
from llm_attack.harness import patches
from llm_attack.harness.arguments import check_string

_PACKAGE = Path(__file__).resolve().parent.parent


def tasks_path() -> Path:
    """The folder of our lm-eval YAML files: in an installed package, or beside it in a checkout."""
    installed = _PACKAGE / "tasks"
    return installed if installed.is_dir() else _PACKAGE.parent / "tasks"


def look_up(tasks: Sequence[str], include_path: str | None = None) -> tuple[Any, list[str]]:
    """An lm-eval `TaskManager` that knows `tasks`, and their names.

    Args:
        tasks: names or patterns of tasks, groups and tags.
        include_path: a folder of further tasks, in addition to lm-eval's and ours.

    Returns:
        The manager, and the names of the tasks. Patterns are expanded, and each name appears once.

    Raises:
        UsageError: one of the tasks, or the folder, does not exist.
    """
    ours = tasks_path()
    # the demo needs no other task, and indexing the thousands of files of lm-eval takes seconds
    kinds: list[dict[str, Any]] = [
        {"include_path": [str(ours / "demo")], "include_defaults": False}
    ]
    paths = [str(ours)]
    if include_path is not None:
        if not include_path or not Path(include_path).is_dir():
            raise _no_folder(include_path)
        paths.append(include_path)
        kinds.clear()  # its tasks may have any name, and extend any task of lm-eval
    kinds.append({"include_path": paths})
    for kind in kinds:
        try:
            manager = TaskManager(**kind)
        except Exception as error:  # earlier releases read all files at once
            raise UsageError(
                f"include_path={include_path}: cannot be read ({one_line(error)}); must be a folder"
                " of lm-eval tasks"
            ) from error
        matches = {task: manager.match_tasks([task]) for task in tasks}
        missing = [task for task in tasks if not matches[task]]
        if not missing:
            return manager, list(
                dict.fromkeys(name for names in matches.values() for name in names)
            )
    raise unknown_tasks(missing, manager.all_tasks)


def lm_eval(arguments: Sequence[str]) -> None:
    """Runs lm-eval's own command line with `arguments`. The default model is attacked-hf.

    Raises:
        UsageError: lm-eval or the model refused an argument.
    """
    from lm_eval.__main__ import cli_evaluate  # if it is imported, the model knows that it runs

    register()
    arguments = list(arguments)
    _check(arguments)
    # a subcommand (run, ls, validate) comes first; only run has a model
    command = arguments[:1] if arguments[:1] and not arguments[0].startswith("-") else []
    rest = arguments[len(command) :]
    runs = command in ([], ["run"]) and not {"-h", "--help"} & set(rest)
    if runs and not any(a == "--model" or a.startswith(("--model=", "-M")) for a in rest):
        rest = ["--model", "attacked-hf", *rest]
    sys.argv = ["lm_eval", *command, *rest]
    with patches.tasks_also_in(tasks_path()), patches.templates_compiled_once():
        try:
            cli_evaluate()
        except ValueError as error:
            raise _readable(error) from error


def _check(arguments: Sequence[str]) -> None:
    """Refuses arguments that lm-eval would silently ignore, or would refuse only at the end.

    Raises:
        UsageError: the message names the argument.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for names in (["--device"], ["--include_path"], ["--output_path", "-o"]):
        parser.add_argument(*names, nargs="?")  # lm-eval refuses a missing value
    parser.add_argument("--model_args", "-a", nargs="*", action="extend", default=[])
    given, _ = parser.parse_known_args(list(arguments))
    for text in given.model_args:
        check_string(text)
        for part in text.split(","):
            name = part.partition("=")[0].strip()
            if name in ("batch_size", "max_batch_size", "device"):
                raise UsageError(f"model_args={part}: must be given as --{name}")
    if given.device is not None:
        check_device(given.device)
    if given.include_path is not None and not Path(given.include_path).is_dir():
        raise _no_folder(given.include_path)
    if given.output_path is not None:
        path = resolved(given.output_path, "output_path")
        check_writable(path.parent if path.suffix == ".json" else path, argument="output_path")


def _no_folder(path: str) -> UsageError:
    return UsageError(f"include_path={path}: must be a folder of lm-eval tasks")


def _readable(error: ValueError) -> ValueError:
    """lm-eval's error about a task in one line with the closest name, or the error itself."""
    text = str(error)
    if isinstance(error, UsageError) or not text.startswith("Tasks not found"):
        return error
    missing = text.removeprefix("Tasks not found:").split(".")[0].strip()
    return unknown_tasks(missing.split(", "), TaskManager().all_tasks)


def unknown_tasks(missing: Sequence[str], known: Sequence[str]) -> UsageError:
    """The error for task names that lm-eval does not know."""
    meant = [closest(name, known) for name in missing]
    hint = ", ".join(repr(m) for m in meant if m)
    return UsageError(
        f"tasks={','.join(missing)}: must be tasks, groups or tags of lm-eval"
        f" (lm_eval ls tasks lists them){f'; did you mean {hint}?' if hint else ''}"
    )
