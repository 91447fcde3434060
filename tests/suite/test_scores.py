"""Tasks of every kind of score: lm-eval's own numbers, and the texts about each."""

import json
from itertools import product

import kinds
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from llm_attack import stats as inference
from llm_attack.base.errors import UsageError
from llm_attack.demo import MODEL_PATH
from llm_attack.suite import results
from llm_attack.suite.analysis.equivalence import with_equivalence
from llm_attack.suite.analysis.outcomes import BINARY, CHOICE, NUMBER, SHARE, kind_of
from llm_attack.suite.analysis.pairs import paired
from llm_attack.suite.analysis.summary import summarise
from llm_attack.suite.analysis.worst import with_worst
from llm_attack.suite.evaluate import evaluate
from llm_attack.suite.plan import Plan
from llm_attack.suite.report.tables import accuracies, markdown_of_run, of_whole_tasks

# name -> (score, kind, direction that is better, scores of the whole task)
EXPECTED = {
    "acc": ("acc", CHOICE, "higher", ()),
    "acc_norm": ("acc_norm", CHOICE, "higher", ()),
    "acc_bytes": ("acc_bytes", CHOICE, "higher", ()),
    "acc_mutual_info": ("acc_mutual_info", CHOICE, "higher", ()),
    "exact_match": ("exact_match", BINARY, "higher", ()),
    "brier_score": ("brier_score", NUMBER, "lower", ()),
    "mcc": ("acc", CHOICE, "higher", ("mcc",)),
    "f1": ("acc", CHOICE, "higher", ("f1",)),
    "weighted_f1": ("acc", CHOICE, "higher", ("f1",)),
    "mass": ("acc", SHARE, "higher", ()),
    "pairs": ("pct_stereotype", BINARY, "lower", ()),
    "ranks": ("r@1", CHOICE, "higher", ()),
    "estimate": ("acc_norm", CHOICE, "higher", ("acc_norm",)),
    "repeats": ("acc", CHOICE, "higher", ()),
}
HOW = {"model": "demo", "attacks": "none,fgsm,random", "epsilons": "0.3rms", "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return kinds.write_all(tmp_path_factory.mktemp("kinds") / "tasks")


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """(result, folder) of all kinds."""
    output = tmp_path_factory.mktemp("kinds") / "run"
    names = ",".join(f"kind_{name}" for name in kinds.KINDS)
    plan = Plan(tasks=names, include_path=str(folder), **HOW)
    return evaluate(plan, output=output, progress="quiet"), output


@pytest.fixture(scope="module")
def stock(folder):
    """What lm-eval says of them with its own model."""
    lm = HFLM(str(MODEL_PATH), device="cpu", dtype="float32", batch_size=1)
    manager = TaskManager(include_path=str(folder))
    names = [f"kind_{name}" for name in kinds.KINDS]
    return simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0)["results"]


@pytest.mark.parametrize("name", kinds.KINDS)
def test_scores_are_those_of_stock_lm_eval(run, stock, name):
    score, kind, better, whole = EXPECTED[name]
    table = run[0].table.set_index(["task", "condition"])
    row = table.loc[(f"kind_{name}", "none")]
    assert (row["score"], row["kind"], row["better"]) == (score, kind, better)
    expected = stock[f"kind_{name}"]
    if name in ("mcc", "weighted_f1"):  # the task has no acc; by lm-eval's own files it is
        assert f"{score},none" not in expected
    elif name != "estimate":
        assert row["acc"] == pytest.approx(expected[f"{score},none"], abs=1e-4)
    for of_task in whole:
        assert row[f"task_{of_task}"] == pytest.approx(expected[f"{of_task},none"], abs=1e-6)
    others = [c for c in table if c.startswith("task_") and c not in {f"task_{w}" for w in whole}]
    assert row[others].isna().all()


def test_under_attack_scores_are_those_of_lm_evals_own_files(run):
    result, output = run
    rows = result.table.set_index(["task", "condition"])
    for condition in ("none", "fgsm@0.3rms", "random@0.3rms"):
        path = output / "lm_eval" / f"results_{condition}.json"
        found = json.loads(path.read_text("utf-8"))["results"]
        for name, (score, _, _, whole) in EXPECTED.items():
            row, of = rows.loc[(f"kind_{name}", condition)], found[f"kind_{name}"]
            if score not in whole and f"{score},none" in of:
                assert row["acc"] == pytest.approx(of[f"{score},none"], rel=1e-12), name
            for metric in whole:
                assert row[f"task_{metric}"] == of[f"{metric},none"]


def test_predictions_agree_with_scores(run):
    """Where the score is of a choice, it is 1 where that choice is a gold one."""
    rows = run[0].samples
    rows = rows[rows["kind"] == CHOICE]
    right = [p in set(g) for p, g in zip(rows["prediction"], rows["gold"], strict=True)]
    assert (rows["acc"] == right).all()


def test_only_choices_are_tested_against_guessing(run):
    table = run[0].table
    tasks = table[table["task"] != "mean"]
    choice = tasks["kind"] == CHOICE
    assert tasks.loc[choice, ["baseline", "p_chance", "verdict"]].notna().all(axis=None)
    assert (
        tasks.loc[~choice, ["baseline", "p_chance", "p_chance_holm", "verdict"]]
        .isna()
        .all(axis=None)
    )
    counted = tasks["kind"].isin([CHOICE, BINARY]) & (tasks["condition"] != "none")
    numbers = ~tasks["kind"].isin([CHOICE, BINARY])
    assert tasks.loc[counted, ["lost", "gained"]].notna().all(axis=None)
    assert tasks.loc[numbers, ["lost", "gained"]].isna().all(axis=None)
    # of such different scores there is no mean, and nothing is said of one
    mean = table[table["task"] == "mean"]
    assert mean["acc"].isna().all() and (mean["score"] == "several").all()


def test_a_number_is_told_by_its_mean_and_paired_differences(run):
    """Against numbers by scipy, on the samples."""
    result = run[0]
    rows = result.samples[result.samples["task"] == "kind_mass"]
    by = rows.pivot(index="doc_id", columns="condition", values="acc")
    row = result.table.set_index(["task", "condition"]).loc[("kind_mass", "random@0.3rms")]
    step = (by["none"] - by["random@0.3rms"]).to_numpy()
    ends = scipy.stats.t.interval(0.95, len(step) - 1, step.mean(), scipy.stats.sem(step))
    assert row["drop"] == pytest.approx(100 * step.mean())
    assert (row["drop_low"], row["drop_high"]) == pytest.approx(tuple(100 * np.array(ends)))
    assert np.sign(row["drop"]) == np.sign(by["none"].mean() - by["random@0.3rms"].mean())
    signs = scipy.stats.permutation_test(
        (step,), np.mean, permutation_type="samples", n_resamples=9_999, rng=0
    )
    assert row["p_mcnemar"] == pytest.approx(signs.pvalue, abs=0.015)


def test_a_score_where_lower_is_better_drops_when_it_rises():
    values = {"none": [0.2, 0.4, 0.3, 0.5, 0.1], "fgsm@1": [0.6, 0.9, 0.4, 0.5, 0.8]}
    table = summarise(scored(values, better="lower")).set_index(["task", "condition"])
    row = table.loc[("t", "fgsm@1")]
    assert row["acc"] == pytest.approx(0.64) and row["drop"] == pytest.approx(34)
    assert row["drop_low"] < 34 < row["drop_high"]
    both = scored({"none": [0.2], "fgsm@1": [0.6], "random@1": [0.9]}, better="lower")
    worst = with_worst(both, {"settings": {"loss": "choice"}})
    assert worst.loc[worst["attack"] == "worst", "acc"].tolist() == [0.9]


def scored(values, better="higher", score="made_up", **more):
    """Samples of a task `t` whose scores are these, of conditions by their names."""
    rows = []
    for condition, of in values.items():
        attack, _, epsilon = condition.partition("@")
        for i, value in enumerate(of):
            rows.append(
                {
                    **{"task": "t", "doc_id": i, "condition": condition, "attack": attack},
                    **{"epsilon": float(epsilon or 0), "n_choices": 2, "gold": [0]},
                    **{"prediction": 0, "prediction_norm": None, "acc_norm": np.nan},
                    **{"score": score, "better": better, "acc": float(value)},
                    **{"log_likelihoods": [-1.0, -2.0], "cosine": None, **more},
                }
            )
    frame = pd.DataFrame(rows)
    return frame if "kind" in more else frame.assign(kind=kind_of(frame["acc"]))


def test_the_randomization_test_against_enumeration_and_scipy():
    step = np.array([0.31, -0.02, 0.4, 0.15, 0.0, -0.11, 0.27])
    sums = [np.dot(step, signs) for signs in product((-1, 1), repeat=len(step))]
    expected = np.mean(np.abs(sums) >= abs(step.sum()) - 1e-12)
    assert inference.sign_test([step], [7]) == pytest.approx(expected)
    # of two tasks of other sizes: the mean over tasks
    other = np.array([0.5, 0.25])
    terms = np.concatenate([step / 7, other / 2])
    sums = [np.dot(terms, signs) for signs in product((-1, 1), repeat=len(terms))]
    expected = np.mean(np.abs(sums) >= abs(terms.sum()) - 1e-12)
    assert inference.sign_test([step, other], [7, 2]) == pytest.approx(expected)
    # drawn: the same each time, near that of scipy
    many = np.random.default_rng(0).normal(0.2, 1, 150)
    found = inference.sign_test([many], [150])
    options = {"permutation_type": "samples", "n_resamples": 19_999, "rng": 1}
    assert found == inference.sign_test([many], [150])
    assert found == pytest.approx(
        scipy.stats.permutation_test((many,), np.mean, **options).pvalue, abs=8e-3
    )
    assert np.isnan(inference.sign_test([[0.5, np.nan]], [2]))


def test_the_randomization_test_goes_by_clusters():
    """Twins that change together: the signs of pairs, not of questions, are a matter of chance."""
    after = [0.1, 0.1, 0.3, 0.3, 0.2, 0.2]
    samples = scored({"none": [0.9] * 6, "fgsm@1": after}).assign(cluster=[0, 0, 1, 1, 2, 2] * 2)
    row = summarise(samples).set_index(["task", "condition"]).loc[("t", "fgsm@1")]
    assert row["p_mcnemar"] == pytest.approx(2 / 2**3) and row["clusters"] == 3
    alone = summarise(samples.drop(columns="cluster")).set_index(["task", "condition"])
    alone = alone.loc[("t", "fgsm@1")]
    assert alone["p_mcnemar"] == pytest.approx(2 / 2**6)
    assert row["drop_high"] - row["drop_low"] > alone["drop_high"] - alone["drop_low"]


def test_equivalence_of_numbers():
    """Two one-sided tests of the mean difference."""
    step = np.random.default_rng(3).normal(0, 0.05, 80)
    samples = scored({"none": np.full(80, 0.5), "random@1": 0.5 + step})
    row = with_equivalence(summarise(samples), 2).set_index(["task", "condition"])
    error = scipy.stats.sem(step)
    expected = scipy.stats.norm.sf((0.02 - abs(step.mean())) / error)
    assert row.loc[("t", "random@1"), "p_equivalence"] == pytest.approx(expected)
    # where nothing varies, nothing is known of the error
    same = scored({"none": [0.5] * 5, "random@1": [0.5] * 5})
    found = with_equivalence(summarise(same), 2)
    assert found["p_equivalence"].isna().all()


def test_frames_of_earlier_runs_are_read_as_before(frames):
    """Without the columns the score is acc; values that are shares are told as shares."""
    samples, _ = frames({"a": (30, 4), "b": (20, 2)})
    assert not {"score", "kind", "better"} & {*samples} and "score" not in summarise(samples)
    mass = samples.assign(acc=np.where(samples["task"] == "a", 0.37, samples["acc"]))
    table = summarise(mass).set_index(["task", "condition"])
    assert set(table.loc["a", "kind"]) == {SHARE} and set(table.loc["b", "kind"]) == {CHOICE}
    assert table.loc["a", "verdict"].isna().all() and table.loc["b", "verdict"].notna().all()
    assert table.loc[("mean", "none"), "kind"] == "several"
    assert table.loc[("mean", "none"), "acc"] == pytest.approx(
        table.loc[[("a", "none"), ("b", "none")], "acc"].mean()
    )


def test_kinds_by_values():
    assert kind_of([0, 1, 1]) == CHOICE and kind_of([0, 1], BINARY) == BINARY
    assert kind_of([0, 0.5], BINARY) == SHARE and kind_of([0, 1], SHARE) == SHARE
    assert kind_of([0.2, 1.2], SHARE) == NUMBER and kind_of([-3.0]) == NUMBER
    assert kind_of([1, np.nan]) == CHOICE


def test_tables_say_what_the_numbers_are(run):
    table = run[0].table
    cells = accuracies(table)
    assert cells.heading[:3] == ["task", "score", "n"]
    score = {row[0]: row[1] for row in cells.rows}
    assert score["kind_brier_score"] == "brier_score (number, lower is better)"
    assert score["kind_mass"] == "acc (share, 0 to 1)" and score["kind_acc_norm"] == "acc_norm"
    whole = of_whole_tasks(table)
    assert {tuple(row[:2]) for row in whole.rows} == {
        ("kind_mcc", "mcc"),
        ("kind_f1", "f1"),
        ("kind_weighted_f1", "f1"),
        ("kind_estimate", "acc_norm"),
    }
    assert "nan" not in markdown_of_run(table)


def test_the_files_of_a_run_say_so_too_and_can_be_read(run):
    result, output = run
    page = (output / "report.html").read_text("utf-8")
    for text in ("brier_score (number, lower is better)", "Score before", "Scores of whole tasks"):
        assert text in page
    assert ">nan<" not in page and " nan " not in page
    loaded = results.load(output)
    pd.testing.assert_frame_equal(loaded.table, result.table)
    names = (output / "table.csv").read_text("utf-8").splitlines()[0].split(",")
    assert {"score", "kind", "better", "task_mcc", "task_f1"} <= {*names}


def test_compare_by_score(run):
    result = run[0]
    frame = paired(result.samples, result.questions, result.samples, result.questions)
    assert (frame.loc[frame["task"] != "mean", "difference"] == 0).all()
    assert {"score", "kind"} <= {*frame}
    other = result.samples.assign(
        score=result.samples["score"].where(result.samples["task"] != "kind_acc", "acc_norm")
    )
    with pytest.raises(UsageError, match="score of kind_acc is acc in one run and acc_norm"):
        paired(result.samples, result.questions, other, result.questions)


@pytest.mark.parametrize(
    ("score", "found"),
    [("acc", "acc"), ("acc_norm", "acc_norm"), ("mrr", "mrr"), ("brier_score", "acc")],
)
def test_score_chooses(folder, score, found):
    """Where a task has the score; else it reports what it has."""
    names = {"acc": "repeats", "acc_norm": "repeats", "mrr": "ranks"}
    task = f"kind_{names.get(score, 'repeats')}"
    tasks = task if score != "brier_score" else f"{task},kind_brier_score"
    how = {name: value for name, value in HOW.items() if name != "epsilons"} | {"attacks": "none"}
    plan = Plan(tasks=tasks, include_path=str(folder), score=score, **how)
    result = evaluate(plan, progress="quiet")
    samples = result.samples[result.samples["task"] == task]
    assert set(samples["score"]) == {found}


def test_a_known_gold_is_attacked_by_the_score(folder):
    """acc_norm alone: the loss choice lowers log-likelihoods per character, as when asked for."""
    how = {**HOW, "attacks": "none,bim", "loss": "choice", "include_path": str(folder)}
    alone = evaluate(Plan(tasks="kind_acc_norm", **how), progress="quiet")
    asked = evaluate(Plan(tasks="kind_repeats", score="acc_norm", **how), progress="quiet")
    plain = evaluate(Plan(tasks="kind_repeats", **how), progress="quiet")
    values = [np.stack(of.samples["log_likelihoods"]) for of in (alone, asked, plain)]
    np.testing.assert_allclose(values[0], values[1], atol=1e-4)
    assert np.abs(values[0] - values[2]).max() > 1e-2
    assert set(asked.samples["score"]) == {"acc_norm"}


@pytest.mark.parametrize(
    ("score", "says"),
    [
        ("acc_nrom", r"score=acc_nrom: must be a score .*did you mean 'acc_norm'\?"),
        ("mcc", "score=mcc: kind_mcc has this score only for the whole task.*use score=acc"),
    ],
)
def test_a_score_that_no_task_has(folder, score, says):
    names = "kind_repeats,kind_mcc"
    with pytest.raises(UsageError, match=says):
        evaluate(Plan(tasks=names, include_path=str(folder), score=score, **HOW), progress="quiet")


BAD = {
    "ragged": (
        [*kinds.questions(2, 3), *kinds.questions(1, 2)],
        ["brier_score"],
        "",
        "lm-eval cannot aggregate brier_score over 3 questions \\(ValueError: .*inhomogeneous",
    ),
    "aggregate": (
        kinds.questions(4, 2),
        [kinds.own("acc", aggregation="!function functions.fails")],
        "",
        "lm-eval cannot aggregate acc over 4 questions \\(RuntimeError: needs 100 questions\\)",
    ),
    "missing": (
        kinds.questions(4, 2),
        ["acc"],
        "process_results: !function functions.some\n",
        "question 1 has no acc",
    ),
    "raising": (
        kinds.questions(4, 2),
        ["acc"],
        "process_results: !function functions.raises\n",
        "question 0 cannot be judged, because process_results of the task raises ZeroDivisionError",
    ),
    "nothing": (
        [*kinds.questions(2, 2), {**kinds.questions(1, 2)[0], "options": []}],
        ["acc"],
        "",
        "question 2 asks nothing",
    ),
    "null": (
        [{**of, "right": None} for of in kinds.questions(2, 2)],
        ["acc", "acc_norm"],
        "",
        "question 0 has no label .doc_to_target gives None.",
    ),
}


@pytest.mark.parametrize(
    ("name", "value", "more", "way_out"),
    [
        ("said", "'yes'", "", "must be left out of the tasks"),
        (
            "listed",
            [1.0, 0.0],
            ", 'other': 1.0",
            "must be another score of this task, such as other",
        ),
    ],
)
def test_a_score_that_is_no_number_is_not_said_to_be_of_the_whole_task(
    name, value, more, way_out, tmp_path
):
    """And the way out is not the score that was refused."""
    code = f"def judge(doc, results):\n    return {{'acc': {value}{more}}}\n"
    function = "process_results: !function judging.judge\n"
    folder = kinds.write(tmp_path / "tasks", name, kinds.questions(3, 2), ["acc"], function)
    (folder / "judging.py").write_text(code)
    of = Plan(tasks=name, include_path=str(folder), **HOW)
    with pytest.raises(UsageError) as refused:
        evaluate(of, progress="quiet")
    said = f"score=acc: {name} gives a question the value {value}, which is not a number; {way_out}"
    assert str(refused.value) == said


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_judged_is_refused_before_the_work(name, tmp_path):
    docs, metrics, more, says = BAD[name]
    folder = kinds.write(tmp_path / "tasks", f"bad_{name}", docs, metrics, more)
    plan = Plan(tasks=f"bad_{name}", include_path=str(folder), **HOW)
    with pytest.raises(UsageError, match=f"tasks=bad_{name}: {says}"):
        evaluate(plan, output=tmp_path / "run", progress="quiet")
    assert not (tmp_path / "run").exists()


def test_tasks_without_choices_are_refused(tmp_path):
    folder = kinds.write(
        tmp_path / "tasks", "last_word", kinds.questions(3, 2), ["acc"], output_type="loglikelihood"
    )
    says = "question 0 has one continuation and no choices .output_type: loglikelihood."
    with pytest.raises(UsageError, match=says):
        evaluate(Plan(tasks="last_word", include_path=str(folder), **HOW), progress="quiet")


def test_one_choice_is_scored_as_lm_eval_does(tmp_path):
    docs = kinds.questions(6, 2)
    docs[3] = {**docs[3], "options": ["milk"], "right": 0}
    folder = kinds.write(tmp_path / "tasks", "alone", docs, ["acc", "acc_norm"])
    for loss in ("sequence", "choice"):
        plan = Plan(tasks="alone", include_path=str(folder), loss=loss, **HOW)
        samples = evaluate(plan, progress="quiet").samples
        one = samples[samples["doc_id"] == 3]
        assert (one["acc"] == 1).all() and (one["n_choices"] == 1).all()


def test_critical_epsilons_of_other_scores_are_warned_about(folder):
    plan = Plan(
        tasks="kind_mass,kind_acc",
        include_path=str(folder),
        **{**HOW, "attacks": "none,critical", "loss": "choice"},
        rounds=1,
        steps=1,
    )
    warnings = evaluate(plan, progress="quiet").run["warnings"]
    assert [of for of in warnings if of.startswith("critical epsilons")] == [
        "critical epsilons are about the likeliest choice, not about the score of kind_mass (acc)"
    ]
