"""A run has, question by question, the results of lm-eval itself under each condition."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from evaluation import evaluated
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import get_task_dict
from lm_eval.utils import make_table
from processes import Command, contents

from llm_attack.attacks import Attack
from llm_attack.cli import main
from llm_attack.harness import gold
from llm_attack.harness.judge import Judge
from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.tasks import look_up, tasks_path
from llm_attack.suite import results
from llm_attack.suite.run import rows

DEMO = [f"demo_{name}" for name in ("arc_challenge", "arc_easy", "hellaswag", "openbookqa")]
DEMO += ["demo_piqa", "demo_winogrande"]
STOCK = ["arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa", "winogrande"]
CONDITIONS = [
    Attack("none"),
    Attack("random", 0.01),
    Attack("fgsm", 0.01),
    Attack("bim", 0.01, steps=3),
]
SETTINGS = {"steps": 3, "device": "cpu", "batch_size": 16, "progress": "quiet"}
# Where lm-eval's batches are others than ours, so that no sign is a matter of rounding.
EXACT = {"dtype": "float64", "softmax_dtype": "float64"}


def own(model, tasks, attack, arguments=None, **options):
    """lm-eval's own results of `attacked-hf`, one condition at a time."""
    settings = {"attack": attack.name, "epsilon": attack.epsilon, "steps": attack.steps}
    lm = AttackedHFLM(model, device="cpu", batch_size=16, **settings, **EXACT, **(arguments or {}))
    manager, _ = look_up(tasks)
    return simple_evaluate(
        lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )


def check(result, expected, attack, tolerance=1e-6):
    """Accuracies are equal; predictions and log-likelihoods are those of lm-eval's samples."""
    rows = result.table[result.table["condition"] == attack.condition].set_index("task")
    samples = result.samples[result.samples["condition"] == attack.condition]
    for task, metrics in expected["samples"].items():
        of_task = expected["results"][task]
        assert rows.loc[task, "acc"] == of_task["acc,none"]
        norm = rows.loc[task, "acc_norm"]
        assert (np.isnan(norm) and "acc_norm,none" not in of_task) or norm == of_task[
            "acc_norm,none"
        ]
        found = samples[samples["task"] == task].set_index("doc_id")
        assert len(found) == len(metrics) == rows.loc[task, "n"]
        for sample in metrics:
            of_question = found.loc[sample["doc_id"]]
            scores = [ll for ll, _ in sample["filtered_resps"]]
            expected_scores = pytest.approx(scores, abs=tolerance, rel=tolerance)
            assert of_question["log_likelihoods"] == expected_scores
            assert of_question["prediction"] == np.argmax(scores)
            assert of_question["acc"] == sample["acc"]
            assert (of_question["prediction"] in of_question["gold"]) == sample["acc"]
            if "acc_norm" in sample:
                right = of_question["prediction_norm"] in of_question["gold"]
                assert right == sample["acc_norm"] == of_question["acc_norm"]
    assert rows.loc["mean", "acc"] == pytest.approx(
        np.mean([expected["results"][task]["acc,none"] for task in expected["samples"]])
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(result, folder) of the six demo tasks."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    return evaluated(
        "demo", "demo_six", limit=8, output=folder, model_args=EXACT, **SETTINGS
    ), folder


@pytest.mark.parametrize("attack", CONDITIONS, ids=lambda attack: attack.condition)
@pytest.mark.sampled(2)
def test_accuracy_is_lm_evals(demo, attack):
    check(demo[0], own("demo", DEMO, attack, limit=8), attack)


@pytest.mark.slow
def test_few_shot_choice_and_several_epsilons():
    """Two tasks, an example in the context, an attack that knows the gold."""
    tasks = ["demo_piqa", "demo_winogrande"]
    options = {"limit": 0.02, "num_fewshot": 1}
    settings = {"attacks": "bim,none", "epsilons": "0.003,0.01", "loss": "choice"}
    result = evaluated("demo", tasks, **settings, **options, model_args=EXACT, **SETTINGS)
    assert list(result.samples["condition"].unique()) == ["none", "bim@0.003", "bim@0.01"]
    for attack in (Attack("none"), Attack("bim", 0.003, steps=3), Attack("bim", 0.01, steps=3)):
        expected = own("demo", tasks, attack, {"loss": "choice"}, **options)
        assert expected["n-shot"] == {"demo_piqa": 1, "demo_winogrande": 1}
        check(result, expected, attack)


def test_without_none():
    result = evaluated("demo", ["demo_piqa"], attacks=["fgsm"], limit=6, **SETTINGS)
    assert set(result.samples["condition"]) == {"fgsm@0.01"}
    assert list(result.table["task"]) == ["demo_piqa", "mean"]
    assert result.table["drop"].isna().all()


@pytest.mark.parametrize("attack", [CONDITIONS[0], CONDITIONS[2]], ids=lambda a: a.condition)
@pytest.mark.slow
def test_stock_tasks(real_data, stock, attack):
    path = str(real_data / "models" / "stories260K")
    check(stock, own(path, STOCK, attack, limit=6), attack, tolerance=1e-5)


@pytest.fixture(scope="module")
def stock(real_data):
    path = str(real_data / "models" / "stories260K")
    return evaluated(path, STOCK, attacks=["none", "fgsm"], limit=6, model_args=EXACT, **SETTINGS)


@pytest.mark.slow
def test_default_tasks(real_data, tmp_path, monkeypatch):
    """The paper's group, which names lm-eval's tasks, is what a run without `--tasks` asks."""
    path = str(real_data / "models" / "stories260K")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["run", "--model", path, "--limit", "1", "-o", "run"])
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "run" / "table.csv")
    assert sorted(set(table["task"])) == sorted([*STOCK, "mean"])
    attacks = {"random@0.01", "fgsm@0.01", "bim@0.01"}
    assert set(table["condition"]) == {"none", *attacks}


def test_group_of_include_path(real_data, tmp_path):
    """A user's group may name lm-eval's tasks, ours and its own."""
    own_task = {"include": str(tasks_path() / "demo" / "demo_piqa.yaml"), "task": "own_piqa"}
    members = ["piqa", "demo_piqa", "own_piqa"]
    for name, content in (("own", own_task), ("few", {"group": "few", "task": members})):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
    path = str(real_data / "models" / "stories260K")
    options = {"limit": 2, "attacks": "none", "device": "cpu", "progress": "quiet"}
    result = evaluated(path, "few", include_path=str(tmp_path), **options)
    assert sorted(result.questions["task"]) == sorted(members * 2)


def test_questions(demo):
    """Texts and gold labels are those of the data."""
    result, _ = demo
    questions = result.questions.set_index(["task", "doc_id"])
    loaded = get_task_dict(DEMO, look_up(DEMO)[0])
    for name in DEMO:
        docs = list(loaded[name].eval_docs)[:8]
        for doc_id, doc in enumerate(docs):
            row = questions.loc[name, doc_id]
            if name == "demo_winogrande":
                before, after = doc["sentence"].split("_")
                texts = [before + doc[f"option{i}"] + after for i in (1, 2)]
                whole = [f"{row['question']} {choice}" for choice in row["choices"]]
                assert [" ".join(text.split()) for text in whole] == texts
                assert before.startswith(row["question"])
                assert row["gold"] == [int(doc["answer"]) - 1]
                assert row["lengths"] is None or len(row["lengths"]) == 2
            elif name == "demo_piqa":
                assert row["question"] == f"Question: {doc['goal']}\nAnswer:"
                assert list(row["choices"]) == [doc["sol1"], doc["sol2"]]
                assert row["gold"] == [doc["label"]]
                assert row["lengths"] == [len(doc["sol1"]), len(doc["sol2"])]
            elif name == "demo_arc_easy":
                assert list(row["choices"]) == list(doc["choices"]["text"])
                assert row["gold"] == [list(doc["choices"]["label"]).index(doc["answerKey"])]
            assert row["n_choices"] == len(row["choices"])


def test_cosine(demo):
    """Of a question's embeddings and the gradient of its requests' negative log-likelihood."""
    result, _ = demo
    lm = AttackedHFLM("demo", device="cpu")
    questions = result.questions.set_index(["task", "doc_id"])
    for task in ("demo_piqa", "demo_openbookqa"):
        row = questions.loc[task, 3]
        xg = xx = gg = 0.0
        for choice in row["choices"]:
            ids = torch.tensor([lm.tok_encode(f"{row['question']} {choice}")])
            x = lm.model.get_input_embeddings()(ids[:, :-1]).detach().requires_grad_()
            logits = lm.model(inputs_embeds=x).logits.double()
            log_probs = logits.log_softmax(-1)[0, torch.arange(ids.shape[1] - 1), ids[0, 1:]]
            (g,) = torch.autograd.grad(-log_probs.sum(), x)
            x = x.detach()
            xg, xx, gg = xg + (x * g).sum(), xx + (x * x).sum(), gg + (g * g).sum()
        expected = float(xg / (xx * gg).sqrt())
        of_question = result.samples[
            (result.samples["task"] == task) & (result.samples["doc_id"] == 3)
        ]
        assert list(of_question["cosine"]) == pytest.approx([expected] * 4, rel=1e-3)


def test_read_back(demo):
    result, folder = demo
    read = results.load(folder)
    for name in ("table", "samples", "questions"):
        pd.testing.assert_frame_equal(getattr(read, name), getattr(result, name), check_dtype=False)
    assert read.run["settings"]["limit"] == 8
    assert read.run["attacks"]["fgsm@0.01"]["noise_rms"] == pytest.approx(0.01, rel=1e-4)
    assert read.run["attacks"]["random@0.01"]["snr"] > 1
    assert read.run["attacks"]["bim@0.01"]["zero_gradient_fraction"] == 0
    assert read.run["attacks"]["bim@0.01"]["steps"] == 3


def test_lm_eval_reads_its_results(demo):
    result, folder = demo
    for attack in CONDITIONS:
        path = folder / "lm_eval" / f"results_{attack.condition}.json"
        found = json.loads(path.read_text())
        assert found["config"]["attack"]["condition"] == attack.condition
        assert found["config"]["model"].endswith("model")
        assert "demo_piqa" in make_table(found)
        rows = result.table[result.table["condition"] == attack.condition].set_index("task")
        for name in DEMO:
            assert found["results"][name]["acc,none"] == rows.loc[name, "acc"]
        assert found["results"]["demo_six"]["acc,none"] == pytest.approx(rows.loc["mean", "acc"])


def test_report_is_rebuilt(demo):
    _, folder = demo
    before = contents(folder)
    for name in ("report.html", "table.csv", "table.md", "figure.png", "figure.svg", "margin.svg"):
        (folder / name).unlink()
    done = CliRunner().invoke(main, ["report", str(folder)])
    assert done.exit_code == 0, done.output
    assert contents(folder) == before


def test_compare(demo, tmp_path):
    _, folder = demo
    other = tmp_path / "other"
    evaluated("demo", "demo_piqa", limit=5, output=other, seed=1, **SETTINGS)
    out = tmp_path / "compared.csv"
    done = CliRunner().invoke(main, ["compare", str(folder), str(other), "-o", str(out)])
    assert done.exit_code == 0, done.output
    rows = pd.read_csv(out)
    assert set(rows["task"]) >= {"demo_piqa"}
    assert rows.loc[rows["task"] == "demo_piqa", "n"].eq(5).all()


def test_command_is_evaluate(demo, tmp_path, whole):
    """Flags, a file, a file that flags overrule, and a call: the same run, and the same folder."""
    files, _ = whole
    lines = {
        "model": "demo",
        "tasks": ["demo_piqa", "demo_winogrande"],
        "limit": 6,
        "steps": 7,
        "device": "cpu",
        "batch_size": 2,
        "epsilons": 0.01,
        "output": "run",
    }
    (tmp_path / "suite.yaml").write_text(json.dumps(lines))
    command = Command(tmp_path, "run", "--config", "suite.yaml", "--steps", 2)
    assert command.wait() == 0, command.err
    found = contents(tmp_path / "run")
    assert found == files


def test_call_reads_the_commands_folder(finished, monkeypatch):
    monkeypatch.chdir(finished)
    settings = {"limit": 6, "steps": 2, "device": "cpu", "batch_size": 2, "progress": "quiet"}
    result = evaluated("demo", ["demo_piqa", "demo_winogrande"], output="run", **settings)
    assert result.lm_eval == {}  # read, not computed
    assert len(result.samples) == 2 * 6 * 4


def test_judge_keeps_nothing_of_a_condition():
    """All wrong, all right, all wrong again: the judge's answers do not pile up."""
    lm = AttackedHFLM("demo", device="cpu")
    judge = Judge(lm, look_up(["demo_arc_easy"])[0], ["demo_arc_easy"], limit=5)
    requests = judge.requests()
    groups = rows.grouped(requests)
    right = {
        n: gold.gold_choices([requests[i] for i in ns])[k]
        for ns in groups.values()
        for k, n in enumerate(ns)
    }
    best = [(0.0 if right[n] else -9.0, False) for n in range(len(requests))]
    worst = [(-9.0 if right[n] else 0.0, False) for n in range(len(requests))]
    for answers, accuracy in ((worst, 0.0), (best, 1.0), (worst, 0.0)):
        assert judge.results(answers, 0)["results"]["demo_arc_easy"]["acc,none"] == accuracy
