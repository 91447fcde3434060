"""Patches of lm-eval affect only our part, and only while it is in use."""

import copy
import functools
import gc
import pickle
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import datasets
import pytest
from lm_eval import utils
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from llm_attack.base.errors import UsageError
from llm_attack.harness import gold, patches
from llm_attack.harness.tasks import tasks_path

DOCS = {"question": ["one", "two"], "options": [["a", "bb"], ["c", "dd"]], "right": [1, 0]}


def task_of(**config):
    defaults = {
        "task": "made_up",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_dict(DOCS)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "options",
        "doc_to_target": "right",
        "num_fewshot": 0,
    }
    return ConfigurableTask(config={**defaults, **config})


def built(**config):
    """Requests whose task nobody but they know."""
    task = task_of(**config)
    task.build_all_requests()
    return task.instances


def gold_of(requests):
    return [gold.gold_choices(gold.siblings(r)) for r in requests if r.idx == 0]


def test_requests_outlive_their_task():
    requests = built()
    gc.collect()
    assert gold_of(requests) == [[False, True], [True, False]]


@pytest.mark.slow  # a process that has imported nothing
def test_requests_built_before_the_model():
    """The import is enough. In a process of its own: here a model may have been made before."""
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from llm_attack.harness.model import AttackedHFLM
        from test_patches import built
        requests = built()
        lm = AttackedHFLM("demo", device="cpu", loss="choice")
        print(len(lm.loglikelihood(requests, disable_tqdm=True)))
        """
    command = [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).parent)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "4\n"


def test_two_tasks_of_one_name(make):
    """Their questions are their own, and so are their gold labels."""
    first, second = built(), built(doc_to_target="{{1 - right}}")
    assert gold_of(first) == [[False, True], [True, False]]
    assert gold_of(second) == [[True, False], [False, True]]
    lm = make(loss="choice")
    alone = [lm.loglikelihood(part, disable_tqdm=True) for part in (first, second)]
    together = lm.loglikelihood([*first, *second], disable_tqdm=True)
    assert [ll for ll, _ in together] == pytest.approx([ll for a in alone for ll, _ in a], abs=1e-4)


def test_built_again_the_old_requests_keep_their_siblings():
    task = task_of()
    task.build_all_requests()
    old = task.instances
    task.build_all_requests(limit=1)
    assert gold.siblings(old[3])[1] is old[3]
    assert gold.siblings(task.instances[0])[0] is task.instances[0]


def test_tasks_go_with_their_requests():
    requests = built()
    task = weakref.ref(gold.task_of(requests[0]))
    gc.collect()
    assert task() is not None
    del requests
    gc.collect()
    assert task() is None


def test_nobody_sees_the_note():
    """Equality, text, copies and pickles of a request are what they were."""
    first, second = built(), built()
    assert first[0] == second[0] and repr(first[0]) == repr(second[0])
    assert pickle.loads(pickle.dumps(first[0])) == first[0]
    copied = copy.deepcopy(first[0])
    assert copied == first[0] and gold.task_of(copied) is gold.task_of(first[0])


def test_wrappers_of_others(monkeypatch):
    """Whoever else wraps lm-eval's functions is not taken for us."""
    build = Task.build_all_requests
    while hasattr(build, "__wrapped__"):
        build = build.__wrapped__
    calls = []

    @functools.wraps(build)
    def theirs(self, *args, **kwargs):
        calls.append(self)
        build(self, *args, **kwargs)

    monkeypatch.setattr(Task, "build_all_requests", theirs)
    patches.note_tasks()
    assert gold_of(built()) == [[False, True], [True, False]]
    assert len(calls) == 1
    ours = Task.build_all_requests
    patches.note_tasks()
    assert Task.build_all_requests is ours  # once is enough


def test_wrapped_task_manager(monkeypatch):
    init = TaskManager.__init__

    @functools.wraps(init)
    def theirs(self, *args, **kwargs):
        init(self, *args, **kwargs)

    monkeypatch.setattr(TaskManager, "__init__", theirs)
    with patches.tasks_also_in(tasks_path()):
        assert "demo_piqa" in TaskManager().all_tasks
    assert TaskManager.__init__ is theirs


def test_without_an_attack_templates_are_lm_evals_own(make, build):
    make(attack="none").loglikelihood(build("demo_piqa", 2).instances, disable_tqdm=True)
    assert not hasattr(utils.env.from_string, "cache_info")


def test_templates_compiled_once():
    with patches.templates_compiled_once():
        assert utils.env.from_string("{{a}}") is utils.env.from_string("{{a}}")
        assert utils.apply_template("{{a}} b", {"a": 1}) == "1 b"
    assert utils.env.from_string("{{a}}") is not utils.env.from_string("{{a}}")


def test_requests_of_no_task():
    request = built()[0]
    stray = type(request)("loglikelihood", {}, request.args, 0)
    with pytest.raises(UsageError, match="task None"):
        gold.siblings(stray)
