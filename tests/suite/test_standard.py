"""A standard: fixed conditions under a version, the run that they make, and its card."""

import copy
import json

import jsonschema
import pandas as pd
import pytest
import torch

from llm_attack import Plan, evaluate, load_card, robust_accuracy
from llm_attack.attacks.settings import BATTERIES, Kind
from llm_attack.base.errors import UsageError
from llm_attack.harness.model import AttackedHFLM
from llm_attack.lm.engine.scoring import Scorer
from llm_attack.lm.packing.questions import Question, Request
from llm_attack.lm.standard import STANDARDS
from llm_attack.suite import results
from llm_attack.suite.analysis.outcomes import BROKEN_BY
from llm_attack.suite.report import summary_file
from llm_attack.suite.run import execute
from llm_attack.suite.run.checks import GRADIENT, REPEATS, ZEROS, at_end, at_start, sentences
from llm_attack.suite.studies import card

VERSION = "standard-1"
SHORT = (
    ("apgdt", {"steps": 2, "step_size": None, "restarts": 1}),
    ("fmn", {"steps": 3, "step_size": None}),
    ("blocks", {"queries": 2}),
)
HOW = {"model": "demo", "tasks": "demo_piqa,demo_arc_easy", "limit": 4}


def test_the_versions_are_never_changed():
    """Another number needs another version."""
    shown = {
        name: (s.attacks, tuple(map(str, s.epsilons)), s.norms, s.loss)
        for name, s in STANDARDS.items()
    }
    amplitudes = ("0.004rms", "0.016rms", "0.064rms"), ("linf", "l2_token")
    assert shown == {
        "standard-1": (("standard-1",), *amplitudes, "margin"),
        "standard-label-free-1": (("random", "fgsm", "bim"), *amplitudes, "sequence"),
    }
    assert {name: s.fixed | {"epsilons": None, "loss": None} for name, s in STANDARDS.items()} == {
        name: {
            **{"steps": 10, "step_size": None, "decay": 1.0, "restarts": 1, "queries": 100},
            **{"rounds": 12, "first_epsilon": None, "seed": 0, "score": "acc", "norm": "linf"},
            **{"context": None, "positions": "all", "hookpoint": None, "hookpoints": ()},
            **{"epsilon_unit": "absolute", "epsilon_max": None, "critical": False},
            **{"encode_separately": False, "gradient_dtype": None},
            **{"epsilons": None, "loss": None},
        }
        for name in STANDARDS
    }


@pytest.mark.parametrize("name", ["standard", "standard-1", "none,standard"])
def test_a_name_stands_for_conditions(name):
    plan = Plan(attacks=name)
    assert plan.attacks == ("none", VERSION) and plan.loss == "margin"
    assert [c.attack_in_units.condition for c in plan.conditions] == [
        "none",
        *(f"{VERSION}@{e}rms" for e in (0.004, 0.016, 0.064)),
        *(f"{VERSION}@{e}rms-l2_token" for e in (0.004, 0.016, 0.064)),
    ]
    # as run.json has it, and the command that repeats it
    assert Plan(**{k: v for k, v in plan.plain().items() if v is not None}) == plan


def test_without_the_label_it_has_the_papers_conditions():
    plan = Plan(attacks="standard-label-free")
    assert plan.loss == "sequence" and not plan.conditions[1].shared
    names = [c.attack_in_units.condition for c in plan.conditions]
    assert names[:4] == ["none", "random@0.004rms", "random@0.016rms", "random@0.064rms"]
    assert len(names) == 1 + 3 * 3 * 2 and names[-1] == "bim@0.064rms-l2_token"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"attacks": "standard,fgsm"}, "attacks=standard,fgsm: must name only standard-1 and none"),
        (
            {"attacks": "standard,worst"},
            "attacks=standard,worst: must name only standard-1 and none",
        ),
        ({"loss": "choice"}, "loss=choice: must be left out with attacks=standard-1"),
        ({"epsilons": "0.1rms"}, "epsilons=0.1rms: must be left out with"),
        ({"norm": "l2"}, "norm=l2: must be left out with"),
        ({"steps": 100}, "steps=100: must be left out with"),
        ({"positions": "context"}, "positions=context: must be left out with"),
        ({"hookpoints": "layers"}, "hookpoints=layers: must be left out with"),
    ],
)
def test_what_it_decides_cannot_be_given(given, says):
    with pytest.raises(UsageError) as error:
        Plan(**{"attacks": "standard", **given})
    assert str(error.value).startswith(says)


@pytest.mark.parametrize("version", STANDARDS)
def test_a_default_that_is_given_is_not_replaced(version):
    usual, standard = Plan(), STANDARDS[version]
    for name, value in standard.fixed.items():
        assert getattr(Plan(attacks=version, **{name: value}), name) == value
        default = getattr(usual, name)
        if default != value:
            with pytest.raises(UsageError, match=f"^{name}=.*: must be left out with attacks="):
                Plan(attacks=version, **{name: default})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose attacks are short."""
    folder = tmp_path_factory.mktemp("standard") / "run"
    kind = Kind(gradient=True, targeted=True, adaptive=True, search=True, members=SHORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BATTERIES, VERSION, kind)
        evaluate(Plan(attacks="standard", **HOW), output=folder, progress="quiet")
    return folder


@pytest.fixture(scope="module")
def result(folder):
    return results.load(folder)


def test_a_row_says_what_made_it_wrong(result):
    samples = result.samples
    assert samples["condition"].nunique() == 7
    place = ["task", "doc_id"]
    clean = samples[samples["condition"] == "none"].set_index(place)["acc"]
    for condition, rows in samples.groupby("condition"):
        rows = rows.set_index(place)
        fell = (clean.reindex(rows.index) > 0) & (rows["acc"] == 0)
        assert (rows[BROKEN_BY].notna() == fell).all(), condition
    found = set(samples[BROKEN_BY].dropna())
    assert found and found <= {name for name, _ in SHORT}


def test_its_version_is_part_of_every_condition_and_file(result, folder):
    conditions = [c for c in result.conditions.values() if c.attack != "none"]
    assert {c.get("standard") for c in conditions} == {VERSION}
    assert json.loads((folder / "run.json").read_text())["standard"] == VERSION
    summary = json.loads((folder / "summary.json").read_text())
    jsonschema.validate(summary, json.loads(summary_file.SCHEMA.read_text()))
    assert {c.get("standard") for n, c in summary["conditions"].items() if n != "none"} == {VERSION}
    for name in ("table.csv", "table.md", "report.html"):
        assert VERSION in (folder / name).read_text(), name


def test_the_card_of_a_run(result, folder, tmp_path):
    made = card.of_result(result, "A. Author", "https://example.org")
    path = tmp_path / "card.json"
    path.write_text(json.dumps(made))
    assert load_card(path) == made
    mean = result.table[result.table["task"] == "mean"].set_index("condition")["acc"]
    assert made["clean"]["accuracy"]["value"] == pytest.approx(mean["none"])
    assert {r["condition"]: r["accuracy"]["value"] for r in made["robust"]} == pytest.approx(
        {name: acc for name, acc in mean.items() if name != "none"}
    )
    assert made["n"] == 8 and made["limit"] == 4
    # in lm-eval's order, which depends on its release
    assert {(t["name"], t["version"], t["n"]) for t in made["tasks"]} == {
        ("demo_piqa", 1.0, 4),
        ("demo_arc_easy", 1.0, 4),
    }
    assert made["model"]["family"] == "llama" and made["model"]["parameters"] > 1000
    assert [check["passed"] for check in made["checks"]] == [True] * 4
    assert made["failed_checks"] == []


def changed(result, **parts):
    run = copy.deepcopy(result.run)
    for name, value in parts.items():
        run[name] = {**run[name], **value} if isinstance(value, dict) else value
    return results.Result(result.table, result.samples, result.questions, run, {})


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"standard": None}, "the run has attacks=none,standard-1, and is not of a standard"),
        ({"standard": "standard-label-free-1"}, "the run lacks bim at 0.004rms in l2_token"),
        ({"settings": {"allow_missing_weights": True}}, "allow_missing_weights=True: standard-1"),
        ({"fingerprint": {"sources": {"a:b": "0"}}}, "the run uses functions of your own"),
        ({"attacks": {"none": {"not_finite": 2}}}, "none: answers have a log-likelihood that"),
    ],
)
def test_runs_that_a_standard_does_not_allow(result, parts, says):
    assert card.refusal(changed(result, **parts)).startswith(says)


def test_a_condition_with_another_number_is_none_of_the_standard(result):
    name = f"{VERSION}@0.016rms"
    stored = {n: dict(values) for n, values in result.run["conditions"].items()}
    stored[name]["seed"] = 1
    assert card.refusal(changed(result, conditions=stored)) == f"{name} has seed=1, not 0"
    del stored[name]["standard"]
    assert card.refusal(changed(result, conditions=stored)).startswith(f"{name} is no condition")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(n=9), "n: is not the sum over its tasks"),
        (lambda c: c["model"].update(weights="0" * 16), "id: is not the hash of"),
        (lambda c: c["tasks"][0].update(questions="0" * 16), "id: is not the hash of"),
        (lambda c: c["robust"].pop(), "robust: must have the 6 conditions of standard-1"),
        (lambda c: c.update(failed_checks=["x"]), "failed_checks: are not those"),
        (lambda c: c["clean"]["accuracy"].update(value=0.51), "none: mean: the interval"),
        (
            lambda c: c["robust"][0]["tasks"]["demo_piqa"].update(right="0101"),
            "standard-1@0.004rms: demo_piqa: the accuracy is not that of its 4 questions",
        ),
        (lambda c: c["robust"][5].update(broken_by={"fmn": 0}), "standard-1@0.064rms-l2_token: br"),
        (lambda c: c.update(card_version=2), "must be a card of llm-attack"),
        (lambda c: c.update(standard="standard-9"), "standard=standard-9: must be one of"),
    ],
)
def test_implausible_cards(result, change, says):
    made = card.of_result(result)
    assert card.faults(made) == []
    change(made)
    assert any(line.startswith(says) for line in card.faults(made)), card.faults(made)


@pytest.mark.slow
def test_a_loaded_model_has_the_card_of_its_name(result, monkeypatch):
    kind = Kind(gradient=True, targeted=True, adaptive=True, search=True, members=SHORT)
    monkeypatch.setitem(BATTERIES, VERSION, kind)
    lm = AttackedHFLM("demo")
    how = {name: value for name, value in HOW.items() if name != "model"}
    made = robust_accuracy(lm.model, lm.tokenizer, name="mine", progress="quiet", **how)
    expected = card.of_result(result)
    assert (
        made["model"]["name"] == "mine" and made["model"]["weights"] == expected["model"]["weights"]
    )
    for here, there in zip(made["robust"], expected["robust"], strict=True):
        assert here == there


def test_a_search_that_wins_is_said():
    names = ["apgdt"] * 2 + ["blocks"] * 12 + [None] * 3
    samples = pd.DataFrame({"attack": VERSION, "condition": "c", BROKEN_BY: names})
    (search,) = at_end(samples)
    assert sentences([search]) == [
        "check failed: a search without gradients does not win (wrong under c: 2 by the gradient,"
        " then 12 by the search)"
    ]
    fewer = samples.assign(**{BROKEN_BY: ["apgdt"] * 5 + ["blocks"] * 2 + [None] * 10})
    assert [check["passed"] for check in at_end(fewer)] == [True]
    assert at_end(samples.drop(columns=BROKEN_BY)) == []


@pytest.mark.parametrize(
    ("what", "fails"),
    [
        ("varies", [REPEATS, GRADIENT]),
        ("differs", [GRADIENT]),
        ("zero", [ZEROS]),
        ("nothing", []),
    ],
)
def test_what_is_wrong_with_a_model_is_seen_at_the_start(what, fails, monkeypatch):
    lm = AttackedHFLM("demo", loss="margin")
    asked = [Request((5, 6, 7 + i), 1, 1) for i in range(3)]
    question = Question(asked, [[0], [1], [2]], [True, False, False])
    engine = lm.engine
    (batch,) = engine.batches([question], 8)
    call, calls = Scorer.__call__, []

    def strange(self, pack, entries, x=None, below=None):
        calls.append(x)
        scores = call(self, pack, entries, x, below)
        factor = 1.0
        if what == "varies":
            factor += 0.1 * len(calls)
        if what == "differs" and torch.is_grad_enabled():
            factor += 0.1
        log_prob = scores.log_prob * factor
        if what == "zero" and x is not None:
            log_prob = log_prob.detach() + 0 * x.sum()
        return scores._replace(log_prob=log_prob)

    monkeypatch.setattr(Scorer, "__call__", strange)
    checked = at_start(lm, batch)
    assert [check["name"] for check in checked] == [REPEATS, GRADIENT, ZEROS]
    assert [check["name"] for check in checked if not check["passed"]] == fails


def test_questions_without_another_answer_have_no_gradient_and_are_sound():
    """All choices are right, or the best wrong one is the right one once more."""
    lm = AttackedHFLM("demo", loss="margin")
    asked = [Request((5, 6, 7), 1, 1), Request((5, 6, 7), 1, 1)]
    for gold in ([True, True], [True, False]):
        (batch,) = lm.engine.batches([Question(asked, [[0], [1]], gold)], 8)
        zeros = next(check for check in at_start(lm, batch) if check["name"] == ZEROS)
        assert zeros["passed"] and zeros["figure"].endswith("for 0 of 0 points")


# Of each question, the answers under no attack and then under each condition: 1 is right.
PINNED = {
    ("demo_openbookqa", 0): "1110110",
    ("demo_openbookqa", 1): "1111111",
    ("demo_piqa", 0): "1111110",
    ("demo_piqa", 1): "1100100",
}


@pytest.mark.slow
def test_the_numbers_of_a_version_stay():
    """The bundled model under standard-1, question by question."""
    plan = Plan(model="demo", tasks="demo_openbookqa,demo_piqa", limit=2, attacks="standard-1")
    samples = evaluate(plan, progress="quiet").samples
    found = {
        place: "".join(str(int(value)) for value in rows["acc"])
        for place, rows in samples.groupby(["task", "doc_id"])
    }
    assert found == PINNED


def test_parameters_are_counted_where_they_are_not():
    """With Ray the process that writes the results has given the weights away."""
    lm = AttackedHFLM("demo", device="cpu")
    here = execute._of_model(lm)
    assert here == {"family": "llama", "parameters": lm.model.num_parameters()}
    lm.model.to("meta")
    assert execute._of_model(lm) == here
