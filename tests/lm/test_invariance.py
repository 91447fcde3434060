"""Results do not depend on batch size, order, subset, or on other requests."""

import random
import weakref

import pytest
from lm_eval.api.instance import Instance

from llm_attack.lm.engine import engine

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
@pytest.mark.sampled(3)
def test_batch_size_order_and_subset(exact, build, settings):
    """In float64: where rounding decides a sign, an attack in float32 takes another way."""
    task = build("demo_hellaswag", 6)
    one_by_one = ask(exact(**settings, batch_size=1), task.instances)
    at_once = ask(exact(**settings, batch_size=64), task.instances)
    assert at_once == pytest.approx(one_by_one, abs=1e-6)
    order = list(range(len(task.instances)))
    random.Random(0).shuffle(order)
    shuffled = ask(exact(**settings, batch_size=5), [task.instances[i] for i in order])
    assert shuffled == pytest.approx([one_by_one[i] for i in order], abs=1e-6)
    part = build("demo_hellaswag", 2)
    subset = ask(exact(**settings, batch_size=8), part.instances)
    assert subset == pytest.approx(one_by_one[: len(subset)], abs=1e-6)


def test_a_part_of_a_question_is_answered_as_the_whole(exact, build):
    """A cache may have answered the rest of the question: the attack is still on all choices."""
    task = build("demo_arc_easy", 3)
    lm = exact(attack="fgsm", loss="choice")
    whole = ask(lm, task.instances)
    assert ask(lm, task.instances[1::2]) == pytest.approx(whole[1::2], abs=1e-6)


def test_seed_changes_the_draw(reused, build):
    task = build("demo_hellaswag", 2)
    first, again, other = (
        ask(reused(attack="random", seed=seed), task.instances) for seed in (0, 0, 1)
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("attack", ["random", "fgsm", "bim", "pgd"])
@pytest.mark.parametrize("loss", ["sequence", "choice"])
@pytest.mark.sampled(3)
def test_epsilon_zero_is_the_clean_run_bit_for_bit(reused, build, attack, loss):
    task = build("demo_winogrande", 4)
    clean = reused(attack="none").loglikelihood(task.instances, disable_tqdm=True)
    lm = reused(attack=attack, epsilon=0, loss=loss)
    assert lm.loglikelihood(task.instances, disable_tqdm=True) == clean


def test_repeated_requests_cost_one_answer(reused, build):
    task = build("demo_piqa", 2)
    lm = reused(attack="fgsm")
    doubled = ask(lm, [r for r in task.instances for _ in range(2)])
    assert doubled[::2] == doubled[1::2] == ask(lm, task.instances)


@pytest.mark.parametrize("settings", [{"loss": "choice"}, {"loss": "sequence"}], ids=str)
@pytest.mark.sampled(2)
def test_out_of_memory_halves_the_batch(exact, build, monkeypatch, settings):
    task = build("demo_arc_easy", 8)
    lm = exact(attack="fgsm", batch_size=64, **settings)
    expected = ask(lm, task.instances)
    compute, tokens = lm.engine.compute, []

    def small(pack):
        tokens.append(pack.input_ids.numel())
        if tokens[-1] > 100:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return compute(pack)

    monkeypatch.setattr(lm.engine, "compute", small)
    assert ask(lm, task.instances) == pytest.approx(expected, abs=1e-6)
    failed = [n for n in tokens if n > 100]
    assert tokens[: len(failed)] == failed  # none after the first that fits
    assert all(b <= a // 2 for a, b in zip(failed, tokens[1:], strict=False))


def test_a_question_that_does_not_fit_alone_is_an_error(reused, build, monkeypatch):
    task = build("demo_arc_easy", 8)
    lm = reused(loss="choice", batch_size=64)

    def never(pack):
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(lm.engine, "compute", never)
    with pytest.raises(RuntimeError, match="out of memory"):
        ask(lm, task.instances)


def test_other_errors_are_not_taken_for_lack_of_memory(reused, build, monkeypatch):
    lm = reused()

    def fail(pack):
        raise RuntimeError("something else")

    monkeypatch.setattr(lm.engine, "compute", fail)
    with pytest.raises(RuntimeError, match="something else"):
        ask(lm, build("demo_arc_easy", 2).instances)


@pytest.mark.parametrize("settings", [{"loss": "choice"}, {"attack": "none"}, {}], ids=str)
def test_nothing_is_kept_between_batches(reused, build, monkeypatch, settings):
    """When a batch goes to the device, the points and gradients of those before it are gone."""
    task = build("demo_arc_easy", 6)
    lm = reused(batch_size=2, **settings)
    made = []

    class Watched(engine.AttackedBatch):
        def __init__(self, *args, **more):
            assert all(ref() is None for ref in made)
            made.append(weakref.ref(self))
            super().__init__(*args, **more)

    monkeypatch.setattr(engine, "AttackedBatch", Watched)
    ask(lm, task.instances)
    assert len(made) >= 3
    assert made[-1]() is None


@pytest.mark.parametrize("settings", [{}, {"loss": "choice"}], ids=str)
def test_batches_are_bounded(reused, build, monkeypatch, settings):
    """`batch_size` bounds the rows, the budget the tokens, and no row is longer than needed."""
    lm = reused(attack="fgsm", batch_size=3, **settings)
    task = build("demo_arc_easy", 8)
    compute, shapes = lm.engine.compute, []
    lm.tokens_per_batch = 100

    def seen(pack):
        shapes.append(tuple(pack.input_ids.shape))
        assert pack.mask.any(0).all()
        return compute(pack)

    monkeypatch.setattr(lm.engine, "compute", seen)
    ask(lm, task.instances)
    assert all(r == 1 or (r <= 3 and r * length <= 100) for r, length in shapes), shapes
    assert max(rows for rows, _ in shapes) > 1
    lengths = [length for _, length in shapes]
    assert lengths == sorted(lengths, reverse=True)


def test_requests_of_no_task_are_told_apart(reused):
    """Made by hand they have no document, and are not choices of one question."""
    lm = reused(attack="none")
    requests = [Instance("loglikelihood", {}, ("the", word), 0) for word in (" bird", " bed", " a")]
    together = [ll for ll, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    alone = [lm.loglikelihood([request], disable_tqdm=True)[0][0] for request in requests]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(ll, 3) for ll in alone}) == 3
