"""Tasks that generate text or score whole texts: runs have the results of lm-eval itself."""

import json
import math

import jsonschema
import numpy as np
import pandas as pd
import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from rich.console import Console

from llm_attack.base.errors import UsageError
from llm_attack.demo import MODEL_PATH
from llm_attack.harness.generation import Piece
from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.tasks import look_up
from llm_attack.suite import results, thresholds
from llm_attack.suite.analysis.outcomes import BINARY, NUMBER
from llm_attack.suite.analysis.pairs import paired
from llm_attack.suite.analysis.summary import summarise
from llm_attack.suite.evaluate import evaluate
from llm_attack.suite.plan import Plan
from llm_attack.suite.report import summary_file
from llm_attack.suite.report.page import columns
from llm_attack.suite.report.words import in_words
from llm_attack.suite.run.estimate import estimate
from llm_attack.suite.run.execute import prepare
from llm_attack.suite.run.store import Store
from llm_attack.suite.run.texts import parting

ANSWERS, TEXTS, PIQA = "demo_answers", "demo_texts", "demo_piqa"
LIMIT = 6
# in float64, so that no token is a matter of rounding
EXACT = {"dtype": "float64", "softmax_dtype": "float64"}
HOW = {"model": "demo", "limit": LIMIT, "device": "cpu", "model_args": EXACT}
FILTERED = """
task: filtered
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{{how}}}
metric_list:
  - metric: exact_match
filter_list:
  - name: whole
    filter:
      - function: take_first
  - name: first_word
    filter:
      - function: regex
        regex_pattern: "([a-z]+)"
      - function: take_first
"""


def plan_of(tasks, **settings):
    settings = {"attacks": "none,random,fgsm,worst", "epsilons": "0.05", "seed": 3} | settings
    return Plan(tasks=tasks, **HOW | settings)


def by_lm_eval(lm, tasks, **options):
    """lm-eval's own results."""
    manager, _ = look_up(tasks)
    options = {"limit": LIMIT, "bootstrap_iters": 0} | options
    return simple_evaluate(lm, tasks=tasks, task_manager=manager, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(result, folder) of a task of each kind; more than one batch of each."""
    output = tmp_path_factory.mktemp("texts") / "run"
    plan = plan_of(f"{ANSWERS},{TEXTS},{PIQA}", batch_size=4)
    return evaluate(plan, output=output, progress="quiet"), output


@pytest.fixture(scope="module")
def stock():
    lm = HFLM(str(MODEL_PATH), device="cpu", batch_size=1, **EXACT)
    return by_lm_eval(lm, [ANSWERS, TEXTS])


def rows_of(result, task, condition):
    samples = result.samples
    of = samples[(samples["task"] == task) & (samples["condition"] == condition)]
    return of.set_index("doc_id").sort_index()


def check(result, condition, expected):
    """Texts, scores and log-likelihoods are those of lm-eval."""
    rows = rows_of(result, ANSWERS, condition)
    table = result.table.set_index(["task", "condition"])
    for sample in expected["samples"][ANSWERS]:
        row = rows.loc[sample["doc_id"]]
        assert row["text"] == sample["resps"][0][0]
        assert row["acc"] == sample["exact_match"]
    stock = expected["results"]
    assert table.loc[(ANSWERS, condition), "acc"] == stock[ANSWERS]["exact_match,none"]
    rows = rows_of(result, TEXTS, condition)
    for sample in expected["samples"][TEXTS]:
        log_likelihood, octets = sample["byte_perplexity"]
        row = rows.loc[sample["doc_id"]]
        assert row["log_likelihoods"][0] == pytest.approx(log_likelihood, rel=1e-9)
        assert row["acc"] == pytest.approx(-log_likelihood / octets, rel=1e-9)
    bits = table.loc[(TEXTS, condition), "task_bits_per_byte"]
    assert bits == pytest.approx(stock[TEXTS]["bits_per_byte,none"], rel=1e-9)


def test_none_is_stock_hf(run, stock):
    check(run[0], "none", stock)


def test_an_attack_is_that_of_lm_eval_with_attacked_hf(run):
    lm = AttackedHFLM("demo", device="cpu", batch_size=1, attack="fgsm", epsilon=0.05, **EXACT)
    check(run[0], "fgsm@0.05", by_lm_eval(lm, [ANSWERS, TEXTS]))


def test_draws_do_not_depend_on_batches(run):
    lm = AttackedHFLM(
        "demo", device="cpu", batch_size=3, attack="random", epsilon=0.05, seed=3, **EXACT
    )
    check(run[0], "random@0.05", by_lm_eval(lm, [ANSWERS, TEXTS]))


def test_bytes_are_those_of_the_task(run, stock):
    questions = run[0].questions
    octets = questions[questions["task"] == TEXTS].set_index("doc_id")["n_bytes"]
    for sample in stock["samples"][TEXTS]:
        assert octets[sample["doc_id"]] == len(sample["doc"]["text"].encode())


def test_texts_have_several_windows():
    """Else the sums over windows are not tested."""
    prepared = prepare(plan_of(TEXTS), "quiet", Console(stderr=True))
    assert max(place for work in prepared.work for place in work.places) > 0


def test_the_table(run):
    table = run[0].table
    traits = table.drop_duplicates("task").set_index("task")[["score", "kind", "better"]]
    assert traits.loc[ANSWERS].tolist() == ["exact_match", BINARY, "higher"]
    assert traits.loc[TEXTS].tolist() == ["nats_per_byte", NUMBER, "lower"]
    assert (
        table.loc[table["task"].isin([ANSWERS, TEXTS]), ["baseline", "verdict"]]
        .isna()
        .all(axis=None)
    )
    means = table[table["task"] == "mean"]
    assert means[["acc", "drop"]].isna().all(axis=None)
    assert set(means["score"]) == {"several"}


def test_drops_are_positive_where_an_attack_harms(run):
    table = run[0].table.set_index(["task", "condition"])
    for task, sign in ((ANSWERS, -1), (TEXTS, 1)):
        attacked, clean = (table.loc[(task, c), "acc"] for c in ("fgsm@0.05", "none"))
        assert sign * (attacked - clean) > 0
        drop = table.loc[(task, "fgsm@0.05"), "drop"]
        assert drop == pytest.approx(100 * sign * (attacked - clean), abs=1e-9)


def test_nats_per_byte_in_words(run):
    """In their own unit, and worse where they rise."""
    samples = run[0].samples
    table = summarise(samples[samples["task"] == TEXTS])
    clean, fgsm = (table.loc[table["condition"] == c, "acc"].iloc[0] for c in ("none", "fgsm@0.05"))
    (said,) = (line for line in in_words(table) if line.startswith("FGSM"))
    assert f"the score is worse by {fgsm - clean:.3f} (" in said
    assert said.count("points") == 0


def test_worst_is_the_worse_of_two_texts(run):
    judged = run[0].worst()
    for task, worse in ((ANSWERS, np.minimum), (TEXTS, np.maximum)):
        of_task = judged[judged["task"] == task].pivot(
            index="doc_id", columns="condition", values="acc"
        )
        expected = worse(of_task["random@0.05"], of_task["fgsm@0.05"])
        assert of_task["worst@0.05"].tolist() == expected.tolist()


def test_every_result_says_the_loss(run):
    result, folder = run
    assert {task: of["loss"] for task, of in result.run["texts"].items()} == {
        ANSWERS: "sequence",
        TEXTS: "sequence",
    }
    summary = json.loads((folder / summary_file.FILE).read_text())
    jsonschema.validate(summary, json.loads(summary_file.SCHEMA.read_text()))
    assert summary["texts"] == result.run["texts"]
    for name in ("texts.md", "report.html"):
        assert "loss=sequence of the prompt" in (folder / name).read_text()


def test_read_again_and_compared(run):
    result, folder = run
    loaded = results.load(folder)
    pd.testing.assert_frame_equal(loaded.table, result.table)
    parts = [loaded.samples, loaded.questions]
    frame = paired(*parts, *parts)
    assert set(frame["task"]) == {ANSWERS, TEXTS, PIQA, "mean"}
    assert (frame.loc[frame["task"] != "mean", "difference"] == 0).all()


@pytest.mark.slow
def test_a_run_that_was_stopped_gives_equal_files(run, tmp_path, monkeypatch):
    _, whole = run
    add, kept = Store.add, []

    def stops(self, key, content):
        if len(kept) == 3:
            raise KeyboardInterrupt
        kept.append(key)
        add(self, key, content)

    plan = plan_of(f"{ANSWERS},{TEXTS},{PIQA}", batch_size=4)
    monkeypatch.setattr(Store, "add", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate(plan, output=tmp_path / "run", progress="quiet")
    monkeypatch.setattr(Store, "add", lambda self, key, content: add(self, key, content))
    evaluate(plan, output=tmp_path / "run", progress="quiet")
    assert len(kept) == 3
    for name in ("samples.parquet", "questions.parquet", "table.csv", "texts.md"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name


def words(text):
    """Each word a token, whose id is its hash."""
    ends = np.cumsum([len(word) + 1 for word in text.split(" ")]) - 1
    starts = [0, *(ends[:-1] + 1)]
    return [Piece(hash(text[a:b]), a, b) for a, b in zip(starts, ends, strict=True) if b > a]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("it eats seeds", "it eats seeds", None),
        ("it eats seeds", "it drinks seeds", (1, 3, "eats", "drinks")),
        ("it eats", "he eats", (0, 0, "it", "he")),
        ("it eats", "it eats seeds", (2, 7, "", " seeds")),
        ("it eats seeds", "it eats", (2, 7, " seeds", "")),
        ("", "it", (0, 0, "", "it")),
    ],
)
def test_where_two_texts_part(before, after, expected):
    assert parting(before, after, words) == expected


def test_what_is_marked_is_in_the_text(run):
    rows = rows_of(run[0], ANSWERS, "fgsm@0.05")
    clean = rows_of(run[0], ANSWERS, "none")["text"]
    parted = rows[rows["parts_at"].notna()]
    assert len(parted) == (rows["text"] != clean).sum() > 0
    for doc_id, row in parted.iterrows():
        start = row["parts_from"]
        assert row["text"][:start] == clean[doc_id][:start]
        assert row["text"][start:].startswith(row["parts_token"])
        assert clean[doc_id][start:].startswith(row["parts_none"])
        assert row["parts_token"] != row["parts_none"]


def test_the_page_has_both_texts(run):
    result, _ = run
    data = columns(result.samples, result.questions)
    clean, fgsm = (data["conditions"].index(name) for name in ("none", "fgsm@0.05"))
    answers = [i for i, task in enumerate(data["task"]) if data["tasks"][task] == ANSWERS]
    rows = rows_of(result, ANSWERS, "fgsm@0.05")
    for i in answers:
        row = rows.loc[data["id"][i]]
        assert data["text"][fgsm][i] == row["text"]
        assert (data["parts"][fgsm][i] is None) == (data["text"][clean][i] == row["text"])
        assert data["target"][i] is not None
    others = set(range(len(data["id"]))) - {*answers}
    assert all(data["text"][fgsm][i] is None for i in others)


def test_a_dry_run_counts_the_steps():
    plan = plan_of(ANSWERS, batch_size=4, attacks="none,random,fgsm")
    prepared = prepare(plan, "quiet", Console(stderr=True))
    counts = estimate(prepared, seconds=0).counts
    assert counts.steps == 3 * 12 * math.ceil(LIMIT / 4)  # conditions, max_gen_toks, batches
    prompts = [q.requests[0].tokens for work in prepared.work for q in work.batch.questions]
    assert counts.tokens_asked == sum(map(len, prompts))
    assert "generation" in prepared.mark  # the model's defaults, on which texts depend


def filtered(tmp_path, how="max_gen_toks: 8, until: ['\\n']"):
    asked = {
        "What are the young of a mutuk called?": "grubs",
        "What does a sevil eat?": "clover",
        "How does a ginut get away?": "it crawls",
    }
    docs = [{"question": question, "answer": answer} for question, answer in asked.items()]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f"{json.dumps(doc)}\n" for doc in docs))
    (tmp_path / "filtered.yaml").write_text(FILTERED.format(data=data, how=how))
    return {"tasks": "filtered", "include_path": str(tmp_path), "attacks": "none"}


@pytest.mark.parametrize(("asked", "right"), [(None, 3), ("exact_match,first_word", 2)])
def test_the_score_is_of_one_filter(tmp_path, asked, right):
    settings = filtered(tmp_path) | ({"score": asked} if asked else {})
    result = evaluate(Plan(**HOW | settings), progress="quiet")
    name = asked or "exact_match,whole"
    expected = result.lm_eval["none"]["results"]["filtered"][name]
    assert set(result.table["score"]) == {name}
    assert result.table["acc"].iloc[0] == expected == right / 3


@pytest.mark.parametrize("how", ["do_sample: true", "temperature: 0.7"])
def test_texts_that_are_drawn_are_refused(tmp_path, how):
    with pytest.raises(UsageError, match=f"tasks=filtered: {how.split(':')[0]}=.*do_sample=False"):
        evaluate(Plan(**HOW | filtered(tmp_path, how)), progress="quiet")


def test_greedy_texts_may_name_a_temperature(tmp_path):
    how = "do_sample: false, temperature: 0.7, max_gen_toks: 4"
    assert evaluate(Plan(**HOW | filtered(tmp_path, how)), progress="quiet") is not None


@pytest.mark.parametrize("settings", [{"loss": "choice"}, {"critical": True, "loss": "margin"}])
@pytest.mark.parametrize("task", [ANSWERS, TEXTS])
def test_what_needs_choices_is_refused(task, settings):
    plan = plan_of(task, **settings | {"attacks": "none,fgsm"})
    with pytest.raises(UsageError, match=rf"loss={settings['loss']}: task {task}.*loss=sequence"):
        prepare(plan, "quiet", Console(stderr=True))


def test_a_build_fails_by_nats():
    plan = plan_of(TEXTS, attacks="none,random", limit=3, epsilons="0.02")
    table = evaluate(plan, progress="quiet").table
    drop = table.loc[(table["task"] == "mean") & (table["attack"] == "random"), "drop"].item()
    assert 1 < drop < 99
    for limit, missed in ((drop - 1, 1), (drop + 1, 0)):
        lines = thresholds.check_run(table, thresholds.drop(f"{limit:.3f}:point", plan))
        assert len(lines) == missed
        assert all(f"random@0.02 drops by {drop / 100:.3f} (" in line for line in lines)
