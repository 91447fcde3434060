"""Gold labels come from the task itself, whatever its form."""

import datasets
import pytest
from lm_eval.api.task import ConfigurableTask

from llm_attack.base.errors import UsageError
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


def raises(doc, results):
    return {"acc": float(results[doc["right"]][0] == 0) / (doc["right"] > 0)}


def never(doc, results):
    return {"acc": 0.0}


def bias(doc, results):
    """Says nothing of right and wrong, as discrim_eval."""
    return {"bias": (results[0][0], "group")}


@pytest.mark.parametrize(
    "config, cause",
    [
        (
            {"doc_to_target": "nowhere to be found"},
            r"has the label 'nowhere to be found', which is none of its choices \('a', 'bb',",
        ),
        (
            {"doc_to_target": "{{right if question == 'one' else 7}}"},
            r"has the label 7, which is none of its choices \(0 to 1\)",
        ),
        (
            {"doc_to_target": lambda doc: doc["right"] or -1},
            r"has the label -1, which is none of its choices \(0 to 1\)",
        ),
        (
            {"doc_to_target": lambda doc: None},
            r"has no label \(doc_to_target gives None\)",
        ),
        (
            {"doc_to_target": lambda doc: doc["right"] or None},
            r"has no label \(doc_to_target gives None\)",
        ),
        (
            {"doc_to_target": lambda doc: [0] if doc["right"] else []},
            r"has no label \(doc_to_target gives \[\]\)",
        ),
        (
            {"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": "word"},
            r"has one continuation and no choices \(output_type: loglikelihood\)",
        ),
        (
            {"doc_to_target": "question", "process_results": raises},
            r"cannot be judged, because process_results of the task raises ZeroDivisionError: .*",
        ),
        (
            {"doc_to_target": "question", "process_results": never},
            r"has no choice that the task's process_results calls right",
        ),
        (
            {"doc_to_target": lambda doc: None, "process_results": bias},
            r"has no label: process_results and doc_to_target give none",
        ),
    ],
)
def test_why_a_question_has_no_gold(config, cause):
    task = task_of(**config)
    with pytest.raises(gold.Unlabelled, match=f"^{cause}"):
        _ = [gold.gold_choices(q) for q in questions(task)]


def test_what_a_task_raises_is_chained():
    task = task_of(doc_to_target="question", process_results=raises)
    with pytest.raises(gold.Unjudged) as caught:
        gold.gold_choices(questions(task)[1])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_one_choice_is_a_choice():
    """As lm-eval scores it."""
    docs = {"question": ["one", "two"], "options": [["a", "b"], ["only"]], "right": [1, 0]}
    task = task_of(
        doc_to_target="right",
        custom_dataset=lambda **_: {"test": datasets.Dataset.from_dict(docs)},
    )
    asked = questions(task)
    assert [gold.gold_choices(q) for q in asked] == [[False, True], [True]]
    assert task.process_results(asked[1][0].doc, [(-3.0, False)])["acc"] == 1


def test_gold_without_the_tasks_metrics():
    """As with --predict_only, which replaces them all."""
    task = task_of(doc_to_target="right")
    task.override_metric("bypass")
    assert [gold.gold_choices(q) for q in questions(task)] == RIGHT


def test_the_loss_says_why_it_cannot_know_the_gold(make):
    """A request of such a task, under a loss that knows the gold."""
    task = task_of(doc_to_target=lambda doc: None)
    task.build_all_requests()
    says = "loss=choice: question 0 of task made_up has no label .*use loss=sequence"
    with pytest.raises(UsageError, match=says):
        make(loss="choice").loglikelihood(task.instances, disable_tqdm=True)


def test_requests_of_no_task(make, build):
    request = build("demo_piqa", 1).instances[0]
    stray = type(request)("loglikelihood", {}, request.args, 0)
    with pytest.raises(UsageError, match="task None"):
        make(loss="choice").loglikelihood([stray], disable_tqdm=True)


@pytest.mark.parametrize(
    "name",
    ["arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa", "winogrande"],
)
@pytest.mark.sampled(3)
def test_real_tasks(build, real_data, name):
    task = build(name, 40)
    for request in task.instances:
        if request.idx == 0:
            doc = request.doc
            expected = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            right = gold.gold_choices(gold.siblings(request))
            assert [i for i, r in enumerate(right) if r] == [int(expected)]
