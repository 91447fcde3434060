"""The halves of a task's questions: by a hash of each, and together for one source."""

import pytest
from lm_eval.api.task import Task

from llm_attack.base.errors import UsageError
from llm_attack.harness.halves import fitted_half, of_task, only

DOCS = [{"question": f"What is {i}?", "gold": i % 2} for i in range(400)]
SOURCES = [{"goal": f"goal {i // 5}", "sol1": str(i)} for i in range(400)]


def test_about_half_of_the_questions():
    for key in range(3):
        assert 160 < sum(fitted_half(DOCS, key)) < 240  # four standard deviations


def test_the_half_of_a_question_depends_on_it_and_the_key_alone():
    whole = fitted_half(DOCS, 0)
    assert fitted_half(DOCS[::-1], 0) == whole[::-1]
    assert fitted_half(DOCS[50:70], 0) == whole[50:70]
    assert fitted_half([dict(reversed(doc.items())) for doc in DOCS], 0) == whole
    assert fitted_half(DOCS, 1) != whole


def test_questions_of_one_source_are_in_one_half():
    halves = fitted_half(SOURCES, 0)
    by_source = [set(halves[i : i + 5]) for i in range(0, 400, 5)]
    assert all(len(half) == 1 for half in by_source)
    assert {True} in by_source and {False} in by_source


def test_only_some_documents_are_asked_and_keep_their_numbers(build):
    task, iterator = build("demo_piqa", 8), Task.doc_iterator

    def even(name, docs):
        assert name == "demo_piqa" and len(docs) > 8
        return [i % 2 == 0 for i in range(len(docs))]

    with only(even):
        assert [i for i, _ in task.doc_iterator(limit=8)] == [0, 2, 4, 6]
        task.build_all_requests(limit=8)
    assert {request.doc_id for request in task.instances} == {0, 2, 4, 6}
    assert of_task(even, task)[:3] == [True, False, True]
    assert Task.doc_iterator is iterator
    with (
        only(lambda name, docs: [False] * len(docs)),
        pytest.raises(UsageError, match="half: task demo_piqa has no such question"),
    ):
        task.build_all_requests(limit=8)
    with only(None):
        assert [i for i, _ in task.doc_iterator(limit=3)] == [0, 1, 2]
