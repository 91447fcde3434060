"""A run that keeps the loss and the margin at every step."""

import numpy as np
import pandas as pd
import pytest

from llm_attack import Plan, evaluate
from llm_attack.base.errors import UsageError
from llm_attack.suite import results
from llm_attack.suite.run.steps import frame_of
from llm_attack.suite.studies import convergence

HOW = {"model": "demo", "tasks": "demo_piqa", "limit": 3, "epsilons": "0.5rms", "progress": None}
PLACE = ["task", "doc_id"]


def plan(**more):
    how = {k: v for k, v in HOW.items() if k != "progress"}
    return Plan(**how, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace") / "run"
    attacks = "none,random,bim,apgd,apgdt"
    asked = plan(attacks=attacks, steps=[1, 2, 4], loss="margin", trace=True)
    evaluate(asked, output=folder, progress="quiet")
    return folder


@pytest.fixture(scope="module")
def result(folder):
    return results.load(folder)


@pytest.fixture(scope="module")
def unlabelled():
    """The adversary does not know the label, and attacks each request by itself."""
    asked = plan(attacks="none,bim", steps=[1, 2, 4], trace=True)
    return evaluate(asked, progress="quiet")


def margins(samples):
    """By condition and question, from lm-eval's answers."""
    found = {}
    for row in samples.to_dict("records"):
        values = np.array(row["log_likelihoods"])
        right = np.isin(np.arange(len(values)), row["gold"])
        place = row["condition"], row["task"], row["doc_id"]
        found[place] = values[right].max() - values[~right].max()
    return found


def ends(result, which):
    """By condition and question, the margin of the first or the last step."""
    rows = result.trace.groupby(["condition", *PLACE], sort=False)["margin"]
    return dict(getattr(rows, which)())


@pytest.mark.parametrize("name", ["result", "unlabelled"])
@pytest.mark.sampled(2)
def test_the_last_step_is_the_answer_and_the_first_the_clean_one(name, request):
    result = request.getfixturevalue(name)
    answers, first, last = margins(result.samples), ends(result, "first"), ends(result, "last")
    conditions = {condition for condition, *_ in last}
    assert conditions == {*result.samples["condition"]} - {"none"}
    for (condition, *place), margin in last.items():
        if condition.startswith(("bim", "random")):
            assert margin == pytest.approx(answers[(condition, *place)], abs=2e-4)
        if not condition.startswith("random"):
            assert first[(condition, *place)] == pytest.approx(answers[("none", *place)], abs=2e-4)


@pytest.mark.parametrize("name", ["result", "unlabelled"])
def test_fewer_steps_are_the_beginning_of_more(name, request):
    """Their last loss is of another pass through the model than the step of the longer run."""
    trace = request.getfixturevalue(name).trace
    longest = trace[trace["condition"] == "bim@0.5rms-steps4"].set_index([*PLACE, "step"])["loss"]
    for n in (1, 2):
        rows = trace[trace["condition"] == f"bim@0.5rms-steps{n}"]
        assert {tuple(of) for _, of in rows.groupby(PLACE)["step"]} == {tuple(range(n + 1))}
        found = rows.set_index([*PLACE, "step"])["loss"]
        np.testing.assert_allclose(found, longest.reindex(found.index), rtol=1e-4, atol=2e-4)


def test_the_loss_of_margin_is_the_margin(result):
    trace = result.trace
    np.testing.assert_allclose(trace["loss"], -trace["margin"], atol=2e-3)


def test_the_best_point_is_the_answer(result):
    """Auto-PGD returns the point with the greatest loss."""
    answers, trace = margins(result.samples), result.trace
    for attack, starts in (("apgd", 1), ("apgdt", 1)):  # two choices: one other
        condition = f"{attack}@0.5rms-steps4"
        rows = trace[trace["condition"] == condition]
        assert set(rows.groupby(PLACE)["step"].size()) == {5 * starts}
        for place, lowest in rows.groupby(PLACE)["margin"].min().items():
            assert lowest == pytest.approx(answers[(condition, *place)], abs=2e-4)


def test_the_file_and_the_figure(result, folder):
    stored = pd.read_parquet(folder / "trace.parquet")
    pd.testing.assert_frame_equal(stored, result.trace)
    columns = ["task", "doc_id", "condition", "attack", "step", "loss", "margin"]
    assert list(stored) == columns and not stored.duplicated(["condition", *PLACE, "step"]).any()
    drawn = convergence.figure(result.trace, result.conditions)
    assert {axes.get_title() for axes in drawn.axes} == {"bim", "apgd", "apgdt"}
    (bim,) = (axes for axes in drawn.axes if axes.get_title() == "bim")
    means = stored.groupby(["condition", "step"])["loss"].mean()
    for line, n in zip(bim.get_lines(), (1, 2, 4), strict=True):
        np.testing.assert_allclose(line.get_ydata(), means[f"bim@0.5rms-steps{n}"])
    best = convergence.mean_loss(stored)
    of_apgd = best[best["condition"] == "apgd@0.5rms-steps4"]["loss"]
    assert of_apgd.is_monotonic_increasing


def test_passes_are_in_the_record(result):
    passes = {
        name: (info["forward_passes"], info["backward_passes"])
        for name, info in result.run["attacks"].items()
    }
    assert passes["none"] == (1, 0) and passes["random@0.5rms"] == (1, 0)
    assert [passes[f"bim@0.5rms-steps{n}"] for n in (1, 2, 4)] == [(2, 1), (3, 2), (5, 4)]
    assert passes["apgdt@0.5rms-steps4"] == (1 + 4 + 2, 4)


def test_a_run_without_it_has_none():
    found = evaluate(plan(attacks="none,random"), progress="quiet")
    with pytest.raises(UsageError, match="trace: the run did not keep it"):
        _ = found.trace


def test_attacks_that_return_their_best_point_have_its_loss():
    """Auto-PGD keeps the largest loss so far; BIM returns where it ends."""
    rows = [
        (attack, step, loss) for attack in ("apgd", "bim") for step, loss in enumerate((1, 3, 2))
    ]
    trace = pd.DataFrame(rows, columns=["attack", "step", "loss"]).astype({"loss": float})
    trace = trace.assign(condition=trace["attack"], task="t", doc_id=0)
    means = convergence.mean_loss(trace).set_index(["attack", "step"])["loss"]
    assert means["apgd"].tolist() == [1, 3, 3]
    assert means["bim"].tolist() == [1, 3, 2]


def test_curves_of_a_question_end_with_the_shortest():
    curves = {
        0: [[("bim", 0, [[1.0, -1.0], [2.0, -2.0], [3.0, -3.0]])]],
        1: [[("bim", 0, [[1.0, -3.0], [2.0, -1.0]])]],
    }
    question = ("t", 0)
    frame = frame_of({question: [0, 1]}, {question: [True, False]}, ["bim@1"], curves, shared=True)
    assert frame["step"].tolist() == [0, 1]
    assert frame["loss"].tolist() == [1, 2] and frame["margin"].tolist() == [2, -1]
