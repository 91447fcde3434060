"""Universal perturbations: fitted to one half, scored on the other, and exported; transfer."""

import json

import numpy as np
import pytest
import torch
from evaluation import evaluated
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llm_attack import Plan
from llm_attack.base.errors import UsageError
from llm_attack.lm.network.hook import edit_output
from llm_attack.suite import universal as commands
from llm_attack.suite.run import estimate
from llm_attack.suite.run.execute import prepare

N, STEPS = 12, 2
GIVEN = {"loss": "choice", "limit": N, "device": "cpu"}
FIT = Plan("demo", "demo_piqa", attacks=["bim"], epsilons=["0.3rms"], steps=STEPS, **GIVEN)


def prompts(prepared):
    """The tokens of every request of a prepared run."""
    batches = [w.batch for w in prepared.work]
    return {r.tokens for batch in batches for q in batch.questions for r in q.requests}


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    """(the file of a perturbation, the result, the prepared run that it was fitted to)."""
    seen, path = [], tmp_path_factory.mktemp("fit") / "u.safetensors"

    def objective(prepared, share):
        seen.append(prepared)
        return unpatched(prepared, share)

    unpatched = commands.objective
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "objective", objective)
        fitted = commands.universal(FIT, "token", str(path), "quiet")
    return path, fitted, *seen


@pytest.fixture(scope="module")
def scored(fit):
    settings = {**GIVEN, "attacks": "none", "perturbation": str(fit[0]), "progress": "quiet"}
    return evaluated("demo", "demo_piqa,demo_winogrande", **settings)


def asked(**settings):
    return prepare(
        Plan("demo", "demo_piqa", attacks="none", **GIVEN, **settings), "quiet", Console()
    )


@pytest.fixture(scope="module")
def requests():
    """All requests of both tasks, by task."""
    plan = Plan("demo", "demo_piqa,demo_winogrande", attacks="none", **GIVEN)
    by_task = {}
    for request in prepare(plan, "quiet", Console()).requests:
        by_task.setdefault(request.task_name, []).append(request)
    return by_task


@pytest.fixture(scope="module")
def held_out(fit):
    """The prepared run of the other half."""
    return asked(perturbation=str(fit[0]))


def test_the_half_that_is_held_out_is_never_touched(fit, held_out):
    """No request of it is in a batch that the fit reads; together they are all questions."""
    fitted, other, whole = map(prompts, (fit[2], held_out, asked(half="all")))
    assert fitted and other and not fitted & other
    assert fitted | other == whole


def test_it_stays_in_the_ball_and_leaves_other_tokens(fit):
    path, fitted, prepared = fit
    epsilon = prepared.lm.engine.attacks[0].epsilon
    seen = {token for tokens in prompts(prepared) for token in tokens[:-1]}
    assert fitted.seen.nonzero().flatten().tolist() == sorted(seen)
    assert (fitted.table[~fitted.seen] == 0).all()
    assert float(fitted.table.abs().max()) == pytest.approx(epsilon / 2)  # two quarters
    assert fitted.after > fitted.before
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("delta"), fitted.table)
        about = file.metadata()
    assert float(about["epsilon_absolute"]) == epsilon
    assert json.loads(about["tasks"]) == ["demo_piqa"]
    assert (about["share"], about["amplitude"], about["loss"]) == ("token", "0.3rms", "choice")


def test_a_run_asks_the_other_half_and_other_tasks(fit, scored):
    n = scored.questions["task"].value_counts()
    fitted = len({r.doc_id for r in fit[2].requests})
    assert n.to_dict() == {"demo_piqa": N - fitted, "demo_winogrande": N}
    assert not {r.doc_id for r in fit[2].requests} & {
        *scored.questions.query("task == 'demo_piqa'")["doc_id"]
    }
    names = list(scored.table["attack"].unique())
    assert names == ["none", "fixed", "fixed-shuffled", "fixed-random"]
    about = scored.run["perturbation"]
    assert (about["share"], about["model"], about["tasks"]) == ("token", "demo", ["demo_piqa"])
    assert about["weights"] == scored.run["fingerprint"]["weights"]
    condition = next(c for c in scored.conditions.values() if c.attack == "fixed")
    assert condition.get("perturbation_source") == about["source"]
    assert condition.get("loss") is None and condition.get("seed") is None


def test_the_answers_are_those_of_embeddings_with_the_table(fit, scored, requests):
    """By the network itself, with the rows of the tokens added by hand."""
    model = AutoModelForCausalLM.from_pretrained(fit[2].lm.model.config._name_or_path).float()
    samples = scored.samples.query("task == 'demo_piqa' and attack == 'fixed'")
    stored = samples.set_index("doc_id")["log_likelihoods"]
    lm = fit[2].lm
    for request in requests["demo_piqa"]:
        if request.doc_id in stored.index:
            context, choice = lm._encode_pair(*request.args)
            ids = torch.tensor([context + choice])
            with torch.no_grad():
                x = model.get_input_embeddings()(ids) + fit[1].table[ids]
                scores = model(inputs_embeds=x[:, :-1]).logits.log_softmax(-1)
            own = scores.gather(2, ids[:, 1:, None])[0, -len(choice) :].sum()
            value = stored[request.doc_id][request.idx]
            assert float(own) == pytest.approx(value, abs=2e-4)


def test_stock_hf_has_the_accuracy_of_an_exported_checkpoint(fit, scored, requests, tmp_path):
    """lm-eval's own model, without anything of ours, reads the folder."""
    commands.export(str(fit[0]), str(tmp_path / "attacked"))
    stock = HFLM(pretrained=str(tmp_path / "attacked"), device="cpu", batch_size=8)
    samples = scored.samples.query("attack == 'fixed'").set_index(["task", "doc_id"])
    for name, instances in requests.items():
        here, values = samples.loc[name], {}
        answers = stock.loglikelihood(instances, disable_tqdm=True)
        for request, (value, _) in zip(instances, answers, strict=True):
            values.setdefault(request.doc_id, []).append(value)
        for doc_id, row in here.iterrows():
            assert values[doc_id] == pytest.approx(row["log_likelihoods"], abs=2e-4)
        right = [np.argmax(values[doc_id]) in row["gold"] for doc_id, row in here.iterrows()]
        assert np.mean(right) == here["acc"].mean()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n", [1, 20])
def test_a_head_that_shares_the_embedding_keeps_its_weights(tied, n, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).eval()
    ids, table = torch.tensor([[3, 5, 3, 19]]), torch.randn(n, 8)
    added = table[ids] if n == 20 else table[0]
    with torch.no_grad(), edit_output(model.get_input_embeddings(), lambda x: x + added):
        expected = model(ids).logits
    with torch.no_grad():
        commands.with_perturbation(model, table)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected)


def test_dry_run_knows_the_passes(fit, held_out):
    """One gradient a step and a pass for the loss at the end; a pass for each condition."""
    estimated = estimate.estimate(fit[2], seconds=0)
    assert (estimated.passes.gradients, estimated.passes.forwards) == (STEPS, STEPS + 1)
    assert estimated.counts.questions == len({r.doc_id for r in fit[2].requests})
    scoring = estimate.estimate(held_out, seconds=0)
    assert (scoring.passes.gradients, scoring.passes.forwards) == (0, 4)


# -- perturbations of a run, under the same and under another model --------------------------------

OWN = {"tasks": "demo_piqa,demo_winogrande", "loss": "sequence"}
SHARED = {"tasks": "demo_arc_easy", "loss": "choice", "positions": "not_first"}


def found_by(folder, **settings):
    """(a run that saved its perturbations, its settings)."""
    settings = {**settings, "limit": 4, "device": "cpu", "progress": "quiet"}
    more = {"attacks": "none,fgsm", "save_perturbations": True, "path_points": 0}
    given = {**settings, **more}
    return evaluated("demo", given.pop("tasks"), output=folder / "a", **given), settings


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return found_by(tmp_path_factory.mktemp("own"), **OWN)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return found_by(tmp_path_factory.mktemp("shared"), **SHARED)


@pytest.mark.parametrize("kind", [pytest.param("own", marks=pytest.mark.slow), "shared"])
def test_under_the_same_model_the_answers_are_the_same(kind, request):
    """To the digit, also for fewer questions and in other batches."""
    run, settings = request.getfixturevalue(kind)
    settings = {**settings, "limit": 3, "batch_size": 1, "attacks": "none"}
    again = evaluated(
        *("demo", settings.pop("tasks")),
        **{**settings, "perturbation": str(run.folder)},
    )
    place = ["task", "doc_id"]
    ours = again.samples.query("attack == 'fixed'").set_index(place)
    theirs = run.samples.query("attack == 'fgsm'").set_index(place).loc[ours.index]
    assert len(ours) == 3 * len(run.questions["task"].unique())
    assert ours["acc"].tolist() == theirs["acc"].tolist()
    assert ours["prediction"].tolist() == theirs["prediction"].tolist()
    for one, other in zip(ours["log_likelihoods"], theirs["log_likelihoods"], strict=True):
        assert list(one) == pytest.approx(list(other), abs=2e-4)
    clean = run.samples.query("attack == 'none'").set_index(place).loc[ours.index]
    moved = np.concatenate([*ours["log_likelihoods"]]) - np.concatenate([*clean["log_likelihoods"]])
    assert np.abs(moved).max() > 0.1  # equal ones say something
    about = again.run["perturbation"]
    assert about["condition"] == "fgsm@0.01" and about["model"] == "demo"
    assert about["weights"] == again.run["fingerprint"]["weights"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": "demo_hellaswag"}, "has no task demo_hellaswag"),
        ({"limit": 5}, "question 4: is not in the run"),
        ({"num_fewshot": 1}, r"question \d: has other tokens in the run"),
        ({"loss": "sequence"}, "context=own: must be shared"),
        ({"positions": "continuation"}, "positions=continuation: must be not_first"),
        ({"hookpoint": "model.layers.1"}, "hookpoint=model.layers.1: must be None"),
        ({"perturbation_of": "fgsm@0.02"}, r"must be one of fgsm@0\.01"),
    ],
)
def test_what_does_not_fit_is_refused(shared, changes, says):
    run, settings = shared
    settings = {**settings, "attacks": "none", "perturbation": str(run.folder), **changes}
    settings.pop("progress")
    with pytest.raises(UsageError, match=says):
        prepare(Plan("demo", settings.pop("tasks"), **settings), "quiet", Console())
