"""lm-eval builds the tasks and judges the answers; in between the answers are ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate

from llm_attack.errors import UsageError
from llm_attack.lm.engine import Answer
from llm_attack.lm.model import AttackedHFLM


class _Collected(Exception):
    """Ends lm-eval's evaluation once the requests are known."""


class _Stand(LM):
    """In the model's place: keeps the requests, or gives answers that were computed before."""

    def __init__(self, lm: AttackedHFLM, answers: list[Answer] | None = None) -> None:
        super().__init__()
        self.lm, self.answers = lm, answers
        self.config = lm.config  # where lm-eval finds the model's name
        self.requests: list[Instance] = []

    def loglikelihood(self, requests: list[Instance]) -> list[Answer]:
        self.requests = list(requests)
        if self.answers is None:
            raise _Collected
        return self.answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise _no_choices(requests[0])

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise _no_choices(requests[0])

    @property
    def tokenizer_name(self) -> str:
        return self.lm.tokenizer_name

    def chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return self.lm.chat_template(*args, **kwargs)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        return self.lm.apply_chat_template(*args, **kwargs)


class Judge:
    """Tasks that are loaded and built once, and judged once per condition.

    Args:
        lm: the model; lm-eval asks it for its chat template and its description.
        manager: lm-eval's TaskManager.
        tasks: names of tasks with choices.
        **options: of lm-eval's `simple_evaluate`.
    """

    def __init__(
        self, lm: AttackedHFLM, manager: Any, tasks: Sequence[str], **options: Any
    ) -> None:
        self.lm, self.tasks = lm, list(tasks)
        self.options = {"bootstrap_iters": 0, "log_samples": True, **options}
        self.manager = _LoadedOnce(manager)

    def requests(self) -> list[Instance]:
        """All requests, in lm-eval's order.

        Raises:
            UsageError: a task has no choices.
        """
        stand = _Stand(self.lm)
        with suppress(_Collected):
            self._evaluate(stand)
        for task in self.manager.built:
            # lm-eval builds anew at each evaluation: as costly as judging
            task.build_all_requests = lambda **options: None
        return stand.requests

    def results(self, answers: list[Answer], condition: int) -> dict[str, Any]:
        """lm-eval's results, when these are the answers to `requests()` under a condition."""
        for task in self.manager.built:
            for request in task.instances:
                request.resps.clear()
                request.filtered_resps.clear()
        found = self._evaluate(_Stand(self.lm, answers))
        assert found is not None  # as it is on lm-eval's first process, the only one
        # not by the stand: lm-eval 0.4.9 asks none but its own models
        attack = self.lm.attack_info(condition)
        found["config"] |= {**self.lm.get_model_info(), "attack": attack}
        return found

    def by_name(self) -> dict[str, Any]:
        """The task objects."""
        return {str(task.config.task): task for task in self.manager.built}

    def _evaluate(self, stand: _Stand) -> dict[str, Any] | None:
        with _no_inventory():
            return simple_evaluate(
                stand, tasks=self.tasks, task_manager=self.manager, **self.options
            )


@contextmanager
def _no_inventory() -> Iterator[None]:
    """Saves the seconds in which lm-eval asks pip and the system what there is: see run.json.

    And git, which complains on the terminal where there is no repository.
    """
    names = ("add_env_info", "get_git_commit_hash")
    before = {name: getattr(evaluator, name) for name in names if hasattr(evaluator, name)}
    for name in before:
        setattr(evaluator, name, lambda *args: None)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(evaluator, name, function)


class _LoadedOnce:
    """A TaskManager that returns the same task objects each time."""

    def __init__(self, manager: Any) -> None:
        self._manager, self._loaded = manager, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def load(self, names: Any) -> Any:  # lm-eval from 0.4.10 on
        self._loaded = self._loaded or self._manager.load(names)
        return self._loaded

    def load_task_or_group(self, names: Any) -> Any:  # lm-eval 0.4.9.1 and 0.4.9.2
        self._loaded = self._loaded or self._manager.load_task_or_group(names)
        return self._loaded

    @property
    def built(self) -> list[Any]:
        """The task objects."""
        found: list[Any] = []
        waiting: list[Any] = [self._loaded]
        while waiting:
            item = waiting.pop()
            if isinstance(item, dict):
                waiting.extend(item.values())
            elif hasattr(item, "build_all_requests"):
                found.append(item)
        return found


def _no_choices(request: Instance) -> UsageError:
    return UsageError(f"tasks={request.task_name}: must be a task with choices")
