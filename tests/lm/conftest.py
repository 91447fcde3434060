"""Requests of the demo tasks and the bundled model under any settings."""

import functools

import pytest
from lm_eval.tasks import TaskManager, get_task_dict
from reference import Reference

from llm_attack.lm import gold
from llm_attack.lm.model import AttackedHFLM
from llm_attack.suite.harness import tasks_path

DEMO = ["arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa", "winogrande"]


@pytest.fixture(scope="session", autouse=True)
def quick(one_index):
    """For all tests here."""


@pytest.fixture(scope="session")
def build(one_index):
    """build(task, limit): a task of lm-eval with its requests."""
    gold.note_tasks()
    manager = TaskManager(include_path=str(tasks_path()))

    def built(name, limit=4):
        (task,) = get_task_dict([name], manager).values()
        task.set_config("num_fewshot", 0)
        task.build_all_requests(limit=limit)
        return task

    return built


@pytest.fixture(scope="session")
def make():
    """make(attack=..., ...): the bundled model under these settings, on the CPU in float32."""

    def made(**arguments):
        arguments = {"device": "cpu", "batch_size": 8, "pretrained": "demo", **arguments}
        return AttackedHFLM(**arguments)

    return made


@pytest.fixture(scope="session")
def exact(make):
    """make() in float64, so that no sign is a matter of rounding."""
    return functools.partial(make, dtype="float64", softmax_dtype="float64")


@pytest.fixture(scope="session")
def reference():
    return Reference("demo")
