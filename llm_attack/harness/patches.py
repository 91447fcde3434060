"""Every patch of lm-eval. All except one are context managers, and act only while they are in use.

The exception is `note_tasks`. It acts as soon as this module is imported, and the model's module
imports it, because requests may be built before the model. Nobody else sees a difference: a
request's equality, text, copies and pickles do not change.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api import model, task
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from tqdm import tqdm

# The mark that distinguishes our wrapper from others; and the attribute for a request's `Noted`.
MARK = "_llm_attack"


@dataclass(frozen=True, eq=False)
class Noted:
    """A question as its task built it.

    The requests themselves hold it. A separate register could never free them, because the task,
    which judges, refers to its requests.

    Attributes:
        task: the task.
        requests: all requests of the question, in the order of the choices.
    """

    task: Task
    requests: list[Instance]

    def __deepcopy__(self, memo: Any) -> Noted:
        return self

    def __reduce__(self) -> Any:
        return type(None), ()  # a request can be pickled, and its task perhaps not


def note(task: Any) -> None:
    """Stores on each request of `task` its `Noted`."""
    questions: dict[Any, Noted] = {}
    for request in task.instances:
        question = questions.setdefault(request.doc_id, Noted(task, []))
        question.requests.append(request)
        setattr(request, MARK, question)
    for question in questions.values():
        question.requests.sort(key=lambda r: r.idx)


def noted(request: Instance) -> Noted | None:
    """The `Noted` that `note` stored on `request`, or None."""
    return getattr(request, MARK, None)


def note_tasks() -> None:
    """Makes every lm-eval task store a `Noted` on the requests that it builds."""
    build = Task.build_all_requests
    if hasattr(build, MARK):
        return

    @functools.wraps(build)
    def build_and_note(self: Task, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        note(self)

    setattr(build_and_note, MARK, True)
    Task.build_all_requests = build_and_note


note_tasks()


@contextmanager
def tasks_built() -> Iterator[list[Any]]:
    """Collects the tasks that build their requests while the context lasts, in order."""
    build, tasks = Task.build_all_requests, []

    @functools.wraps(build)
    def build_and_keep(self: Task, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        tasks.append(self)

    with replaced(Task, build_all_requests=build_and_keep):
        yield tasks


@contextmanager
def templates_compiled_once() -> Iterator[None]:
    """Caches templates. lm-eval compiles them for every question: half of its host time."""
    with replaced(utils.env, from_string=functools.lru_cache(4096)(utils.env.from_string)):
        yield


@contextmanager
def without_bars() -> Iterator[None]:
    """Turns off lm-eval's progress bars, which would break up ours."""

    def silent(*args: Any, **kwargs: Any) -> tqdm:
        return tqdm(*args, **{**kwargs, "disable": True})

    with replaced(model, tqdm=silent), replaced(task, tqdm=silent):
        yield


@contextmanager
def without_inventory() -> Iterator[None]:
    """Stops lm-eval from asking pip, git and the system for versions, which takes seconds.

    run.json has the versions. Git would also complain on the terminal if there is no repository.
    """
    from lm_eval import evaluator  # imported here, because lm-eval may import the model itself

    def nothing(*args: Any) -> None:
        return None

    with replaced(evaluator, add_env_info=nothing, get_git_commit_hash=nothing):
        yield


@contextmanager
def tasks_also_in(folder: Path) -> Iterator[None]:
    """While the context lasts, every `TaskManager` also finds the tasks in `folder`."""
    from lm_eval.tasks import TaskManager

    init = TaskManager.__init__

    @functools.wraps(init)
    def with_ours(self: Any, *args: Any, include_path: Any = None, **kwargs: Any) -> None:
        paths = [include_path] if isinstance(include_path, (str, Path)) else include_path or []
        init(self, *args, include_path=[*paths, str(folder)], **kwargs)

    with replaced(TaskManager, __init__=with_ours):
        yield


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """While the context lasts, `owner` has the attributes `values`."""
    own = {name: vars(owner)[name] for name in values if name in vars(owner)}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            delattr(owner, name)
        for name, value in own.items():
            setattr(owner, name, value)
