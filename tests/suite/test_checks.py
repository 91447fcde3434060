"""Checks at the start of a run of a standard: with little memory, and in several processes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llm_attack.lm.packing.questions import Question, Request
from llm_attack.suite.run import checks, execute
from llm_attack.suite.run.execute import Processes
from llm_attack.suite.run.work import Work


@pytest.fixture(scope="module")
def prepared(make):
    """A model and a batch of four questions with a right answer each."""
    lm = make(attack="fgsm", loss="margin")
    asked = [[Request((5, 6, 7 + i + j), 1, 1) for i in range(2)] for j in range(4)]
    questions = [Question(each, [[0], [1]], [True, False]) for each in asked]
    (batch,) = lm.engine.batches(questions, 8)
    return lm, batch


def limited(lm, monkeypatch, room):
    """A device that has memory for this number of questions; it lists what was tried."""
    pack, tried = lm.engine.pack, []

    def packed(batch):
        tried.append(len(batch.questions))
        if tried[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return pack(batch)

    monkeypatch.setattr(lm.engine, "pack", packed)
    monkeypatch.setattr(checks, "clear_device_cache", lambda **_: None)  # it collects all garbage
    return tried


def test_fewer_questions_with_less_memory(prepared, monkeypatch):
    """The checks are those of the questions that fit."""
    lm, batch = prepared
    expected = checks.at_start(lm, replace(batch, questions=batch.questions[:1]))
    tried = limited(lm, monkeypatch, 1)
    assert checks.at_start(lm, batch) == expected
    assert tried == [4, 2, 1]
    assert expected[-1]["figure"] == "zero in every coordinate for 0 of 1 points"


@pytest.mark.parametrize("divides, tried", [(True, [4, 2, 1]), (False, [4])])
def test_no_memory_at_all(prepared, monkeypatch, divides, tried):
    """Processes that hold parts of one model compute the same, so none of them takes less."""
    lm, batch = prepared
    monkeypatch.setattr(lm.engine, "layout", replace(lm.engine.layout, divides=divides))
    seen = limited(lm, monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        checks.at_start(lm, batch)
    assert seen == tried


@pytest.mark.parametrize(
    "who, checked",
    [
        (Processes(0, 1), True),
        (Processes(0, 2, member=1), True),  # its parts of the sums are needed
        (Processes(1, 2), False),
        (Processes(1, 2, member=1), False),
    ],
)
def test_all_parts_of_a_model_take_part(prepared, who, checked):
    lm, batch = prepared
    plan = SimpleNamespace(standard="any")
    run = SimpleNamespace(plan=plan, lm=lm, work=[Work(("task", 0), batch, [])])
    assert len(execute._checked(run, who)) == 3 * checked
