"""`positions`: the right tokens may move, in every layout, and no other moves by a bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import prepared

from llm_attack.base.errors import UsageError
from llm_attack.harness.requests import encode, examples_of, questions_of
from llm_attack.lm.packing.positions import check_positions, of_question, of_request
from llm_attack.lm.packing.questions import Question, Request

SPECS = ["context", "continuation", "question", "not_first", "2:-1", "::3", "90:"]


def test_of_a_request():
    request = Request(tuple(range(10)), n_continuation=3, n_question=6)  # 9 are read
    found = {name: of_request(request, name).nonzero()[0].tolist() for name in [*SPECS, "all"]}
    assert found == {
        "all": [*range(9)],
        "context": [*range(7)],
        "continuation": [7, 8],
        "question": [4, 5, 6, 7, 8],
        "not_first": [*range(1, 9)],
        "2:-1": [*range(2, 8)],
        "::3": [0, 3, 6],
        "90:": [],
    }


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 12), st.sampled_from(SPECS))
def test_cut_at_the_start_the_rest_stays(read, n_continuation, n_question, spec):
    """What is told from the end does not change when a prompt is too long."""
    whole = Request(tuple(range(read + 5)), min(read, n_continuation), n_question)
    cut = Request(whole.tokens[4:], whole.n_continuation, n_question)
    if spec in ("context", "continuation", "question"):
        assert (of_request(whole, spec)[4:] == of_request(cut, spec)).all()


def test_shared_tokens_move_if_they_may_in_each_request():
    """The third token is context in one request, and the other's continuation."""
    requests = [Request((1, 2, 3, 4, 5), 2), Request((1, 2, 3, 4), 2)]
    question = Question(requests, [[0], [1]])
    assert of_question(question, "context").tolist() == [True, True, False, False]
    assert of_question(question, "continuation").tolist() == [False, False, False, True]


@pytest.mark.parametrize("typed", ["", "contxt", "1", "1:2:3:4", "a:b", "::0", "1.5:"])
def test_refused(typed):
    with pytest.raises(UsageError, match=r"positions=.*: must be one of all, context, .*a slice"):
        check_positions(typed)


@pytest.mark.parametrize("attack", ["fgsm", "bim", "gaussian", "blocks", "mifgsm", "critical"])
@pytest.mark.parametrize("packing", ["tree", "off"])
@pytest.mark.parametrize("task", ["demo_arc_challenge", "demo_winogrande"])
@pytest.mark.sampled(6)
def test_elsewhere_nothing_moves(exact, build, attack, packing, task):
    task = build(task, 2)
    options = {"steps": 1, "queries": 3, "rounds": 2, "epsilon": 0.05, "loss": "margin"}
    for spec in ("context", "2:-1"):
        lm = exact(attack=attack, positions=spec, packing=packing, **options)
        questions = questions_of(task.instances, encode(lm, task.instances), lm.settings)
        (batch,) = lm.batches(questions)
        at = prepared(lm.engine.scorer, lm.engine.pack(batch), lm.settings.threat)
        point, sums, *_ = at.attack(lm.attack)
        changed = (point != at.x).any(-1)
        assert changed.any() and not (changed & ~at.mask).any()
        assert torch.equal(point[~at.mask], at.x[~at.mask])
        expected = sum(int(of_question(q, spec).sum()) for q in questions) * point.shape[-1]
        assert sums["elements"] == expected


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.sampled(3)
def test_layouts_give_the_same_answers(exact, build, spec):
    task = build("demo_winogrande", 3)
    task.set_config("num_fewshot", 1)
    task.build_all_requests(limit=3)
    found = []
    for more in ({"packing": "tree"}, {"packing": "off"}, {"packing": "tree", "batch_size": 1}):
        lm = exact(attack="bim", steps=2, loss="margin", positions=spec, **more)
        found.append([ll for ll, _ in lm.loglikelihood(task.instances, disable_tqdm=True)])
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert found[2] == pytest.approx(found[0], abs=1e-6)
    clean = exact(attack="none").loglikelihood(task.instances, disable_tqdm=True)
    moved = max(abs(a - b) for a, (b, _) in zip(found[0], clean, strict=True))
    assert (moved > 1e-3) == (spec != "90:")


def test_own_context_by_request(exact, build):
    """With a perturbation of its own, the tokens of a request that may move are its own."""
    task = build("demo_arc_challenge", 2)
    lm = exact(attack="random", positions="continuation")
    encoded = encode(lm, task.instances)
    (batch,) = lm.batches(questions_of(task.instances, encoded, lm.settings))
    pack = lm.engine.pack(batch)
    at = prepared(lm.engine.scorer, pack, lm.settings.threat)
    point = at.attack(lm.attack).x
    for row, request in zip((point != at.x).any(-1), pack.requests, strict=True):
        read = len(request.inputs)
        expected = [read + 1 - request.n_continuation <= i < read for i in range(len(row))]
        assert row.tolist() == expected


@pytest.mark.parametrize("name", ["demo_arc_challenge", "demo_winogrande"])
@pytest.mark.parametrize("fewshot", [0, 2])
def test_examples_are_what_stands_before_the_question(exact, build, name, fewshot):
    task = build(name, 2)
    bare = [r.args[0] for r in task.instances]
    task.set_config("num_fewshot", fewshot)
    task.build_all_requests(limit=2, system_instruction="Be brief.", apply_chat_template=False)
    lm = exact(attack="random", positions="question")
    for request, own, encoded in zip(task.instances, bare, encode(lm, task.instances), strict=True):
        before = examples_of(request)
        assert request.args[0].removeprefix(before).strip() == own.strip()
        assert before.startswith("Be brief.") and (before != "Be brief.") == (fewshot > 0)
        asked = lm.tok_encode(own)
        n = encoded.n_question - encoded.n_continuation
        assert list(encoded.tokens[-encoded.n_question :][:n]) == asked[-n:]
        assert abs(n - len(asked)) <= 1  # a prefix token, or the space between


def test_a_prompt_without_the_question_is_refused(exact, build):
    task = build("demo_piqa", 1)
    lm = exact(attack="random", positions="question")
    (first, *_) = task.instances
    first.arguments = ("something else", first.args[1])
    with pytest.raises(UsageError, match="positions=question: the prompt of task demo_piqa"):
        encode(lm, [first])
