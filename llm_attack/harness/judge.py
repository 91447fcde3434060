"""lm-eval builds the tasks and judges the answers. The answers come from our engine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.utils import handle_non_serializable

from llm_attack.base.errors import UsageError
from llm_attack.base.failures import one_line
from llm_attack.base.record import finite
from llm_attack.base.redact import redacted
from llm_attack.harness import patches
from llm_attack.harness.halves import Chosen, of_task, only
from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.paths import portable


class _Collected(Exception):
    """Ends lm-eval's evaluation when the requests are known."""


class _Stand(LM):  # type: ignore[misc]  # lm-eval is not typed
    """A stand-in for the model. It stops at the requests, or returns known answers.

    Args:
        lm: the model.
        answers: answers by the `id` of their request; None: it stops.
    """

    def __init__(self, lm: AttackedHFLM, answers: Mapping[int, Any] | None = None) -> None:
        super().__init__()
        self.lm, self.answers = lm, answers
        self.config = lm.config  # lm-eval finds the model's name in it

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        if self.answers is None:
            raise _Collected
        return [self.answers[id(request)] for request in requests]

    loglikelihood_rolling = generate_until = loglikelihood

    @property
    def tokenizer_name(self) -> str:
        return str(self.lm.tokenizer_name)

    def chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return self.lm.chat_template(*args, **kwargs)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        return str(self.lm.apply_chat_template(*args, **kwargs))


class Judge:
    """Tasks that are loaded and built once, and judged once per condition.

    Args:
        lm: the model. lm-eval reads its chat template and its description.
        manager: lm-eval's TaskManager.
        tasks: names of tasks.
        chosen: says which documents of a task are asked; None: all.
        **options: options of lm-eval's `simple_evaluate`.
    """

    def __init__(
        self,
        lm: AttackedHFLM,
        manager: Any,
        tasks: Sequence[str],
        chosen: Chosen | None = None,
        **options: Any,
    ) -> None:
        self.lm, self.tasks, self.chosen = lm, list(tasks), chosen
        self.given, self.options = options, {"bootstrap_iters": 0, "log_samples": True, **options}
        self.manager = _LoadedOnce(manager)
        self.asked: list[Instance] = []

    def of(self, chosen: Chosen | None) -> Judge:
        """A judge of other documents of these tasks."""
        return Judge(self.lm, self.manager.unloaded, self.tasks, chosen, **self.given)

    def requests(self) -> list[Instance]:
        """All requests in lm-eval's order: by type, then by task.

        Raises:
            UsageError: the tasks cannot be built, or their data cannot be loaded.
        """
        tasks: list[Any] = []
        given = "".join(f", {name}={value}" for name, value in self.given.items())
        asked_for = f"tasks={','.join(self.tasks)}{given}"
        try:
            with patches.tasks_built() as tasks, suppress(_Collected):
                self._evaluate(_Stand(self.lm))
        except UsageError:
            raise
        except OSError as error:
            raise UsageError(
                f"{asked_for}: the data of the tasks cannot be loaded ({one_line(error)}); they"
                " must be in the cache of datasets, or on a hub that can be reached"
            ) from error
        except Exception as error:  # a task is a user's YAML and Python: it can raise anything
            raise UsageError(
                f"{asked_for}: cannot be built ({one_line(error)}); must be tasks that lm-eval"
                " can build"
            ) from error
        asked = [r for task in tasks for r in task.instances for _ in range(r.repeats)]
        if not asked:
            raise UsageError(f"{asked_for}: no questions were found; must be tasks with questions")
        for task in tasks:
            _check_all_asked(task, self.options.get("limit"), self.chosen)
            # lm-eval would build the requests again at each evaluation, which costs as much as
            # judging
            task.build_all_requests = lambda **options: None
        types = dict.fromkeys(request.request_type for request in asked)
        self.asked = [r for kind in types for r in asked if r.request_type == kind]
        return self.asked

    def results(self, answers: Sequence[Any], condition: int) -> dict[str, Any]:
        """lm-eval's results for these answers to `requests()`.

        Args:
            answers: one answer per request, in the form for its type. If a request is asked several
                times, its first answer counts.
            condition: number of the condition.
        """
        for request in self.asked:
            request.resps.clear()
            request.filtered_resps.clear()
        pairs = zip(reversed(self.asked), reversed(answers), strict=True)
        results = self._evaluate(_Stand(self.lm, {id(request): a for request, a in pairs}))
        assert results is not None  # this is lm-eval's first process, which gets the results
        # lm-eval 0.4.9 asks only its own models for this, and not the stand-in
        attack = self.lm.attack_info(condition)
        results["config"] |= {**self.lm.get_model_info(), "attack": attack}
        return results

    def _evaluate(self, stand: _Stand) -> dict[str, Any] | None:
        with patches.without_inventory(), only(self.chosen):
            results: dict[str, Any] | None = simple_evaluate(
                stand, tasks=self.tasks, task_manager=self.manager, **self.options
            )
        return results


class _LoadedOnce:
    """A TaskManager that returns the same task objects each time."""

    def __init__(self, manager: Any) -> None:
        self.unloaded, self._loaded = manager, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unloaded, name)

    def load(self, names: Any) -> Any:  # lm-eval from 0.4.12 on
        self._loaded = self._loaded or self.unloaded.load(names)
        return self._loaded

    def load_task_or_group(self, names: Any) -> Any:  # earlier lm-eval
        self._loaded = self._loaded or self.unloaded.load_task_or_group(names)
        return self._loaded


def _check_all_asked(task: Any, limit: float | None, chosen: Chosen | None) -> None:
    """Raises `UsageError` if a question has no requests, because lm-eval fails to judge it."""
    n = len(task.eval_docs)
    if limit is not None:
        n = min(n, int(limit) if limit >= 1 else math.ceil(limit * n))
    asked = range(n) if chosen is None else np.flatnonzero(of_task(chosen, task)[:n]).tolist()
    missing = sorted(set(asked) - {request.doc_id for request in task.instances})
    if missing:
        raise UsageError(
            f"tasks={task.config.task}: question {missing[0]} asks nothing; must be a task in which"
            " every question has choices, a prompt or a text"
        )


def as_json(results: dict[str, Any]) -> str:
    """lm-eval's results without samples, in the form of its own files.

    Functions appear by name instead of address. Paths are relative to a package, the working folder
    or the home folder. Secrets are left out.
    """

    def plain(value: Any) -> Any:
        return getattr(value, "__qualname__", None) or handle_non_serializable(value)

    content = finite({key: value for key, value in results.items() if key != "samples"})
    content = json.loads(json.dumps(content, default=plain))
    return json.dumps(redacted(portable(content)), indent=2, ensure_ascii=False) + "\n"
