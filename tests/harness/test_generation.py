"""Text under several conditions at once equals the text under each condition by itself."""

import pickle

import pytest

from llm_attack.lm.settings import AttackSettings

CONDITIONS = [
    {"attack": "none"},
    {"attack": "random", "epsilon": 0.05},
    {"attack": "fgsm", "epsilon": 0.02},
    {"attack": "fgsm", "epsilon": 0.05},
    {"attack": "bim", "epsilon": 0.05, "steps": 2},
    {"attack": "fgsm", "epsilon": 0.05, "hookpoint": "model.layers.1"},
]


@pytest.fixture(scope="module")
def requests(build):
    """Prompts of different lengths, one of them twice."""
    some = build("demo_answers", 5).instances
    return [*some, some[2]]


@pytest.fixture(scope="module")
def alone(exact, requests):
    """For each condition, its texts by lm-eval's own way.

    Without the blank at their end: lm-eval decodes what follows a stop sequence before it cuts it
    off, and whether the tokenizer writes a blank depends on that.
    """
    found, lm = [], exact(batch_size=1)
    for condition in CONDITIONS:
        lm.use(AttackSettings(**condition))
        found.append([text.rstrip() for text in lm.generate_until(requests, disable_tqdm=True)])
    return found


def texts(batches, result):
    """For each condition, the texts in the order of the requests."""
    found = {}
    for prompts in batches:
        for answered in result(prompts).answered:
            for index in answered.question.answers[0]:
                found[index] = [answer.rstrip() for (answer,) in answered.answers]
    return [list(of) for of in zip(*(found[i] for i in sorted(found)), strict=True)]


@pytest.fixture(scope="module")
def together(exact):
    lm = exact(**CONDITIONS[0], batch_size=3)
    lm.use(*(AttackSettings(**condition) for condition in CONDITIONS))
    return lm


def test_conditions_together_are_each_alone(together, requests, alone):
    batches = together.prompts(requests)
    assert [len(prompts.texts) for prompts in batches] == [3, 2]  # equal prompts once
    assert texts(batches, together.generated) == alone
    assert len({tuple(of) for of in alone}) > 3  # else they would show little


def test_diagnostics_are_of_the_prompts(together, requests):
    result = together.generated(together.prompts(requests)[0])
    tokens = sum(len(a.question.requests[0].tokens) for a in result.answered)
    elements = [d.elements for d in result.diagnostics]
    assert elements == [0, *[tokens * together.model.config.hidden_size] * 5]
    assert all(answered.alignment is not None for answered in result.answered)


def test_batches_of_prompts_travel(together, requests):
    (first, *_) = together.prompts(requests)
    assert pickle.loads(pickle.dumps(first)) == first


def test_a_batch_that_runs_out_of_memory_is_halved(together, requests, alone, monkeypatch):
    generate = type(together)._continued

    def small(self, context, *arguments, **options):
        if len(context) > 1:
            raise RuntimeError("CUDA out of memory.")
        return generate(self, context, *arguments, **options)

    monkeypatch.setattr(type(together), "_continued", small)
    assert texts(together.prompts(requests), together.generated) == alone


def test_nothing_is_left_behind(together, requests):
    before = {name: vars(together)[name] for name in vars(together)}
    together.generated(together.prompts(requests)[0])
    assert vars(together).keys() == before.keys()
    assert together.batch_size == 3
    assert together._kept is None
