"""Runs of lm_eval in the form of `--log_samples`, which `compare` reads."""

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from scipy.stats import binomtest

from llm_attack.base.errors import UsageError
from llm_attack.cli import main
from llm_attack.suite import logged

DATE = "2026-01-02T03-04-05.678901"


def write(folder, task="t", scores=(1.0, 0.0), metric="acc", date=DATE, **more):
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, score in enumerate(scores):
        line = {"doc_id": i, "doc": {"question": f"{i}?"}, "filter": "none", "metrics": [metric]}
        line |= {"doc_hash": f"d{i}", "prompt_hash": f"p{i}", "resps": [[["-1", "True"]]] * 2}
        lines.append(json.dumps({**line, metric: score, **more}))
    text = "\n".join(lines) + "\n"
    (folder / f"samples_{task}_{date}.jsonl").write_text(text, "utf-8")
    return folder


def compare(*folders, **options):
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return CliRunner().invoke(main, ["compare", *map(str, folders), *words])


def test_what_lm_eval_writes_is_read(build, tmp_path):
    """Written by lm-eval's own class, from an evaluation of its own."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    from llm_attack.demo import MODEL_PATH
    from llm_attack.harness.tasks import tasks_path

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={MODEL_PATH}",
        tasks=["demo_piqa", "demo_answers", "demo_texts"],
        task_manager=TaskManager(include_path=str(tasks_path())),
        limit=6,
        device="cpu",
        bootstrap_iters=0,
    )
    samples = found.pop("samples")
    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.general_config_tracker.model_name_sanitized = "demo"
    tracker.save_results_aggregated(results=found, samples=samples)
    for task, of in samples.items():
        tracker.save_results_samples(task_name=task, samples=of)
    run = logged.load(logged.folder_of(tmp_path))
    for task, score, kind, better in (
        ("demo_piqa", lambda of: of["acc"], "right or wrong", "higher"),
        ("demo_answers", lambda of: of["exact_match"], "0 or 1", "higher"),
        ("demo_texts", lambda of: -float(of["resps"][0][0]) / len(of["target"]), "number", "lower"),
    ):
        rows = run.samples[run.samples["task"] == task]
        assert rows["acc"].tolist() == pytest.approx([score(of) for of in samples[task]], rel=1e-12)
        hashes = run.questions.loc[run.questions["task"] == task, "doc_hash"]
        assert hashes.tolist() == [of["doc_hash"] for of in samples[task]]
        assert set(rows["kind"]) == {kind} and set(rows["better"]) == {better}


def test_two_runs_are_paired(tmp_path):
    rng = np.random.default_rng(0)
    first, second = (rng.random((2, 80)) < [[0.8], [0.4]]).astype(float)
    a, b = write(tmp_path / "a" / "model", scores=first), write(tmp_path / "b", scores=second)
    done = compare(a.parent, b, output=tmp_path / "pair.csv", equivalence=3)
    assert done.exit_code == 0, done.output
    assert "smallest mean difference that this many questions can show" in done.output
    row = pd.read_csv(tmp_path / "pair.csv").iloc[0]
    lost, gained = int((first > second).sum()), int((second > first).sum())
    assert (row["n"], row["lost"], row["gained"]) == (80, lost, gained)
    assert row["difference"] == pytest.approx(100 * (second - first).mean())
    assert row["p_mcnemar"] == pytest.approx(binomtest(lost, lost + gained).pvalue, rel=1e-5)
    assert row["p_equivalence"] > 0.5


def test_any_score(tmp_path):
    """Shares, and what is better when lower; of a generation there is no choice."""
    for name, scores in (("a", [0.5, 0.25, 1.0, 0.0]), ("b", [0.75, 0.5, 1.0, 0.5])):
        folder = write(tmp_path / name, scores=scores, metric="ter", resps=[["text"]])
        content = {"higher_is_better": {"t": {"ter": False}}, "model_name": f"org/{name}"}
        (folder / f"results_{DATE}.json").write_text(json.dumps(content), "utf-8")
    run = logged.load(tmp_path / "a")
    assert run.name == "org/a"
    assert run.samples[["score", "kind", "better"]].iloc[0].tolist() == [
        *("ter", "share, 0 to 1", "lower")
    ]
    done = compare(tmp_path / "a", tmp_path / "b", output=tmp_path / "pair.csv")
    assert done.exit_code == 0, done.output
    assert pd.read_csv(tmp_path / "pair.csv")["difference"].iloc[0] == pytest.approx(25)


def test_a_later_run_of_other_tasks_does_not_say_which_is_better(tmp_path):
    for name, values in (("a", (0.2, 0.4)), ("b", (0.9, 0.8))):
        folder = write(tmp_path / name, scores=values, metric="ter")
        for year, task, of in (("2026", "t", {"ter": False}), ("2027", "other", {"acc": True})):
            content = {"higher_is_better": {task: of}, "model_name": f"org/{name}{year}"}
            (folder / f"results_{year}{DATE[4:]}.json").write_text(json.dumps(content), "utf-8")
        run = logged.load(folder)
        assert set(run.samples["better"]) == {"lower"} and run.name == f"org/{name}2027"


@pytest.mark.parametrize("doc_id", ["first", None, [1]])
def test_a_question_without_a_number_is_one_line(doc_id, tmp_path):
    done = compare(write(tmp_path / "a", doc_id=doc_id), write(tmp_path / "b"))
    assert done.exit_code == 2 and "cannot be read" in done.output
    assert len(done.output.splitlines()) == 1


def test_filters_are_tasks_of_their_own_and_the_newest_file_counts(tmp_path):
    write(tmp_path, scores=[0.0, 0.0], date="2025-01-02T03-04-05.678901")
    path = write(tmp_path, scores=[1.0, 1.0]) / f"samples_t_{DATE}.jsonl"
    assert logged.load(tmp_path).samples["acc"].tolist() == [1, 1]
    text = path.read_text("utf-8")
    path.write_text(text + text.replace('"filter": "none"', '"filter": "strict"'), "utf-8")
    assert list(logged.load(tmp_path).samples["task"].unique()) == ["t (none)", "t (strict)"]


def test_other_prompts_are_told(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", prompt_hash="other")
    (sentence,) = logged.differences(logged.load(a), logged.load(b))
    assert sentence.startswith("2 of 2 questions have different prompts")


def test_questions_that_share_a_source_count_together(tmp_path):
    """Twelve texts with two questions each, as in BoolQ."""
    path = write(tmp_path / "a", scores=[1.0, 0.0] * 12) / f"samples_t_{DATE}.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for i, line in enumerate(lines):
        line["doc"]["passage"] = f"text {i // 2}"
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    assert logged.load(tmp_path / "a").samples["cluster"].tolist() == [i // 2 for i in range(24)]


def test_wrong_inputs_are_one_line(tmp_path):
    a, other = write(tmp_path / "a"), write(tmp_path / "other", doc_hash="of another")
    broken = write(tmp_path / "broken")
    path = broken / f"samples_t_{DATE}.jsonl"
    path.write_text(path.read_text("utf-8")[:-20], "utf-8")
    texts = write(tmp_path / "texts", scores=["yes", "no"])
    old = write(tmp_path / "old")
    lines = (old / f"samples_t_{DATE}.jsonl").read_text("utf-8").replace('"doc_hash"', '"x"')
    (old / f"samples_t_{DATE}.jsonl").write_text(lines, "utf-8")
    stored = "results/demo/choice"
    for folders, said in [
        ((a, other), "share no question"),
        ((a, broken), "cannot be read"),
        ((a, texts), "no numeric score"),
        ((a, old), "line 1 has no doc_hash"),
        ((a, stored), "is not a run of lm_eval"),
        ((a, a, a), "exactly two"),
    ]:
        done = compare(*folders)
        assert done.exit_code == 2, done.output
        assert said in done.output and len(done.output.strip().splitlines()) == 1


def test_several_models_in_a_folder(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two")
    with pytest.raises(UsageError, match=r"several models \(one, two\)"):
        logged.folder_of(tmp_path)
    assert logged.folder_of(tmp_path / "one") == tmp_path / "one"
    assert logged.folder_of(tmp_path / "nowhere") is None
