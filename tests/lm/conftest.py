"""Requests of the demo tasks and the bundled model under any settings."""

import pytest
from lm_eval.tasks import TaskManager, get_task_dict
from reference import Reference

from llm_attack.lm import gold
from llm_attack.lm.model import AttackedHFLM
from llm_attack.suite.harness import tasks_path

DEMO = ["arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa", "winogrande"]


@pytest.fixture(scope="session")
def build():
    """build(task, limit): a task of lm-eval with its requests."""
    gold.note_tasks()
    manager = TaskManager(include_path=str(tasks_path()))

    def built(name, limit=4):
        (task,) = get_task_dict([name], manager).values()
        task.set_config("num_fewshot", 0)
        task.build_all_requests(limit=limit)
        return task

    return built


@pytest.fixture
def only_our_tasks(monkeypatch):
    """lm-eval's task managers index our tasks alone; indexing its own thousands takes seconds."""
    build = TaskManager.__init__
    paths = [str(tasks_path())]

    def quick(self, *args, **kwargs):
        build(self, *args, **{**kwargs, "include_path": paths, "include_defaults": False})

    monkeypatch.setattr(TaskManager, "__init__", quick)


@pytest.fixture(scope="session")
def make():
    """make(attack=..., ...): the bundled model under these settings, on the CPU in float32."""

    def made(**arguments):
        arguments = {"device": "cpu", "batch_size": 8, "pretrained": "demo", **arguments}
        return AttackedHFLM(**arguments)

    return made


@pytest.fixture(scope="session")
def reference():
    return Reference("demo")
