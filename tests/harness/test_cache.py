"""lm-eval's response cache never answers for other settings than those it was written under."""

import pytest
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM

from llm_attack.demo import MODEL_PATH
from llm_attack.errors import UsageError


def ask(lm, task):
    return lm.loglikelihood(task.instances)


def test_same_settings_reuse_the_file(make, build, tmp_path, monkeypatch):
    task, file = build("demo_piqa", 3), str(tmp_path / "cache.db")
    first = ask(CachingLM(make(attack="fgsm"), file), task)
    again = CachingLM(make(attack="fgsm", batch_size=2), file)
    monkeypatch.setattr(again.lm.engine, "compute", None)  # nothing may be computed
    assert ask(again, task) == first


@pytest.mark.parametrize(
    "other",
    [
        {"attack": "none"},
        {"attack": "fgsm", "epsilon": 0.02},
        {"attack": "fgsm", "loss": "continuation"},
        {"attack": "fgsm", "seed": 1},
        {"attack": "fgsm", "max_length": 8},
    ],
    ids=str,
)
def test_other_settings_are_refused(make, build, tmp_path, other):
    file = tmp_path / "cache.db"
    ask(CachingLM(make(attack="fgsm"), str(file)), build("demo_piqa", 2))
    (changed,) = set(other) - {"attack"} or {"attack"}
    with pytest.raises(UsageError, match=rf"use_cache=.*cache\.db.*{changed}="):
        CachingLM(make(**other), str(file))


def test_a_file_of_stock_hf_is_refused(make, build, tmp_path):
    file = str(tmp_path / "cache.db")
    ask(CachingLM(HFLM(pretrained=str(MODEL_PATH), device="cpu"), file), build("demo_piqa", 1))
    with pytest.raises(UsageError, match="another model than attacked-hf"):
        CachingLM(make(attack="fgsm"), file)


def test_half_answered_question(exact, build, tmp_path):
    """A run that was killed between two choices: the cached and the new answers belong together."""
    task = build("demo_arc_easy", 3)
    expected = ask(exact(attack="fgsm", loss="choice"), task)
    caching = CachingLM(exact(attack="fgsm", loss="choice"), str(tmp_path / "cache.db"))
    caching.loglikelihood(task.instances[1::4])
    found = ask(caching, task)
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in expected], abs=1e-6)


def test_one_request_in_two_questions(make, build, tmp_path):
    """With the gold known an answer belongs to a question, but the cache knows requests."""
    task = build("demo_arc_easy", 2)
    first, second = task.instances[:4], task.instances[4:8]
    second[0].arguments = first[0].arguments
    lm = make(attack="fgsm", loss="choice")
    answers = ask(lm, task)
    assert answers[0] != answers[4]
    with pytest.raises(UsageError, match="belongs to two"):
        ask(CachingLM(lm, str(tmp_path / "cache.db")), task)
