"""Results do not depend on batch size, order, subset, or on what else is asked."""

import random

import pytest

CASES = [
    {"attack": "random"},
    {"attack": "random", "context": "shared"},
    {"attack": "fgsm"},
    {"attack": "pgd", "steps": 2, "loss": "choice"},
    {"attack": "bim", "steps": 2, "context": "shared"},
]


def ask(lm, requests):
    return [ll for ll, _ in lm.loglikelihood(requests, disable_tqdm=True)]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_batch_size_order_and_subset(make, build, settings):
    task = build("demo_hellaswag", 6)
    one_by_one = ask(make(**settings, batch_size=1), task.instances)
    at_once = ask(make(**settings, batch_size=64), task.instances)
    assert at_once == pytest.approx(one_by_one, abs=2e-4)
    order = list(range(len(task.instances)))
    random.Random(0).shuffle(order)
    shuffled = ask(make(**settings, batch_size=5), [task.instances[i] for i in order])
    assert shuffled == pytest.approx([one_by_one[i] for i in order], abs=2e-4)
    part = build("demo_hellaswag", 2)
    subset = ask(make(**settings, batch_size=8), part.instances)
    assert subset == pytest.approx(one_by_one[: len(subset)], abs=2e-4)


def test_a_part_of_a_question_is_answered_as_the_whole(make, build):
    """A cache may have answered the rest of the question: the attack is still on all choices."""
    task = build("demo_arc_easy", 3)
    lm = make(attack="fgsm", loss="choice")
    whole = ask(lm, task.instances)
    assert ask(lm, task.instances[1::2]) == pytest.approx(whole[1::2], abs=2e-4)


def test_seed_changes_the_draw(make, build):
    task = build("demo_hellaswag", 2)
    first, again, other = (
        ask(make(attack="random", seed=seed), task.instances) for seed in (0, 0, 1)
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("attack", ["random", "fgsm", "bim", "pgd"])
@pytest.mark.parametrize("loss", ["sequence", "choice"])
def test_epsilon_zero_is_the_clean_run_bit_for_bit(make, build, attack, loss):
    task = build("demo_winogrande", 4)
    clean = make(attack="none").loglikelihood(task.instances, disable_tqdm=True)
    lm = make(attack=attack, epsilon=0, loss=loss)
    assert lm.loglikelihood(task.instances, disable_tqdm=True) == clean


def test_repeated_requests_cost_one_answer(make, build):
    task = build("demo_piqa", 2)
    lm = make(attack="fgsm")
    doubled = ask(lm, [r for r in task.instances for _ in range(2)])
    assert doubled[::2] == doubled[1::2] == ask(lm, task.instances)


def test_out_of_memory_halves_the_batch(make, build, monkeypatch):
    task = build("demo_arc_easy", 8)
    lm = make(attack="fgsm", loss="choice", batch_size=32)
    expected = ask(lm, task.instances)
    answer, sizes = lm.engine.answer, []

    def small(questions):
        sizes.append(sum(len(q.requests) for q in questions))
        if sizes[-1] > 8:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return answer(questions)

    monkeypatch.setattr(lm.engine, "answer", small)
    assert ask(lm, task.instances) == pytest.approx(expected, abs=2e-4)
    assert sizes == [32, 16, 8, 8, 8, 8]


def test_other_errors_are_not_taken_for_lack_of_memory(make, build, monkeypatch):
    task = build("demo_arc_easy", 2)
    lm = make()

    def fail(questions):
        raise RuntimeError("something else")

    monkeypatch.setattr(lm.engine, "answer", fail)
    with pytest.raises(RuntimeError, match="something else"):
        ask(lm, task.instances)
