"""Gold labels come from the task itself, whatever it is made of."""

import datasets
import pytest
from lm_eval.api.task import ConfigurableTask

from llm_attack.errors import UsageError
from llm_attack.harness import gold

DOCS = {
    "question": ["one", "two"],
    "options": [["a", "bb", "ccc"], ["d", "ee"]],
    "right": [2, 0],
    "word": ["ccc", "d"],
    "several": [[0, 2], [1]],
}


def task_of(**config):
    defaults = {
        "task": "made_up",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_dict(DOCS)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "options",
        "num_fewshot": 0,
    }
    return ConfigurableTask(config={**defaults, **config})


def questions(task):
    task.build_all_requests()
    return [gold.siblings(r) for r in task.instances if r.idx == 0]


def judge(doc, results):
    """A metric of the task's own, which alone knows where the gold label is."""
    scores = [ll for ll, _ in results]
    return {"acc": float(scores.index(max(scores)) == doc["right"])}


RIGHT = [[False, False, True], [True, False]]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"doc_to_target": "right"}, RIGHT),
        ({"doc_to_target": "{{right}}"}, RIGHT),
        ({"doc_to_target": "word"}, RIGHT),
        ({"doc_to_target": "several"}, [[True, False, True], [False, True]]),
        ({"doc_to_target": "right", "metric_list": [{"metric": "acc_norm"}]}, RIGHT),
        ({"doc_to_target": "right", "metric_list": [{"metric": "f1"}]}, RIGHT),
        (
            {
                "doc_to_target": "right",
                "metric_list": [{"metric": "acc_mutual_info"}, {"metric": "acc"}],
            },
            RIGHT,
        ),
        ({"doc_to_target": "question", "process_results": judge}, RIGHT),
    ],
    ids=["field", "template", "string", "several", "acc_norm", "f1", "mutual_info", "own_metric"],
)
def test_gold_choices(config, expected):
    task = task_of(**config)
    assert [gold.gold_choices(q) for q in questions(task)] == expected


def test_choices_as_contexts(build):
    task = build("demo_winogrande", 20)
    for request in task.instances[::2]:
        right = gold.gold_choices(gold.siblings(request))
        assert right.index(True) == task.doc_to_text(request.doc) and sum(right) == 1


def test_lengths_are_characters_of_the_choices():
    task = task_of(doc_to_target="right")
    assert [gold.choice_lengths(q) for q in questions(task)] == [[1, 2, 3], [1, 2]]


@pytest.mark.parametrize(
    "config",
    [
        {"doc_to_target": "nowhere to be found"},
        {"doc_to_target": "{{right if question == 'one' else 7}}"},
        {"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": "word"},
    ],
    ids=["unknown", "out of range", "not multiple choice"],
)
def test_no_gold(config):
    task = task_of(**config)
    with pytest.raises(UsageError, match=r"loss=choice: .*made_up.*loss=sequence"):
        _ = [gold.gold_choices(q) for q in questions(task)]


def test_requests_of_no_task(make, build):
    request = build("demo_piqa", 1).instances[0]
    stray = type(request)("loglikelihood", {}, request.args, 0)
    with pytest.raises(UsageError, match="task None"):
        make(loss="choice").loglikelihood([stray], disable_tqdm=True)


@pytest.mark.parametrize(
    "name",
    ["arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa", "winogrande"],
)
def test_real_tasks(build, real_data, name):
    task = build(name, 40)
    for request in task.instances:
        if request.idx == 0:
            doc = request.doc
            expected = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            right = gold.gold_choices(gold.siblings(request))
            assert [i for i, r in enumerate(right) if r] == [int(expected)]
