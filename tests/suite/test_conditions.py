"""Conditions: two runs that differ in only one setting, for every setting."""

from __future__ import annotations

import functools
import json
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from shown import ROOT
from test_models import run_of

from llm_attack.attacks import ATTACKS
from llm_attack.base.declare import declared, names
from llm_attack.base.errors import UsageError
from llm_attack.lm.settings import AttackSettings, EngineSettings, labels
from llm_attack.lm.units import Epsilon, Signal
from llm_attack.suite import results
from llm_attack.suite.analysis.conditions import OF_THE_RUN, Condition, by_name, of_plan, of_run
from llm_attack.suite.analysis.pairs import paired, unshared
from llm_attack.suite.analysis.summary import summarise
from llm_attack.suite.evaluate import save
from llm_attack.suite.plan import Plan
from llm_attack.suite.studies import leaderboard, models

# All settings there are but those that say which conditions, questions and model a run has; a new
# setting is tested without a word here.
SETTINGS = {
    entry.name: (entry.default, about)
    for kind in (Plan, AttackSettings)
    for entry, about in declared(kind)
    if entry.name not in OF_THE_RUN
}
# Attacks that use a setting, and those that do not; a setting that is not here is for all.
ITERATIVE = [name for name, kind in ATTACKS.items() if kind.iterative]
USERS = {
    **dict.fromkeys(("steps", "step_size"), ITERATIVE),
    "decay": ["mifgsm"],
    "restarts": ["apgd", "apgdt", "critical"],
    **dict.fromkeys(("rounds", "first_epsilon"), ("critical",)),
    "queries": ["blocks"],
    **dict.fromkeys(("exact_tokens", "candidates"), ()),  # of attacks that choose tokens
    "seed": ["random", "uniform", "gaussian", "pgd", "blocks"],
    "loss": ["fgsm", "reversed", "bim", "pgd", "mifgsm", "apgd", "critical", "blocks"],
    "score": [*ATTACKS],
}
# Those of a plan alone are of its prompts, which the answers without an attack depend on, too.
PROMPTS = {*names(Plan)} - {*names(AttackSettings)} - {*OF_THE_RUN}


def users(setting):
    of_attacks = [name for name in ATTACKS if name != "none"]
    return USERS.get(setting, [*of_attacks, "none"] if setting in PROMPTS else of_attacks)


def other(setting):
    """A value that is not the default's, and allowed."""
    default, about = SETTINGS[setting]
    if setting in ("attack", "epsilon"):
        return {"attack": "bim", "epsilon": 0.02}[setting]
    if about.choices:
        return next(x for x in about.choices if x not in (default, "shared", "own"))
    kinds = {int: 7, float: 0.5, bool: True, str: "of another kind"}
    return kinds[about.kind]


def base(attack):
    gold = {"loss": "choice", "context": "shared"}
    return {**{name: default for name, (default, _) in SETTINGS.items()}, **gold, "attack": attack}


def alternatives(setting):
    if setting == "context":  # with a loss that knows the gold it is shared
        return {"context": "own"}
    if setting == "loss":
        return {"loss": "margin"}
    return {setting: other(setting)}


CASES = [
    (setting, attack)
    for setting in SETTINGS
    if setting != "attack"
    for attack in ("none", *(name for name in ATTACKS if name != "none"))
]


@pytest.mark.parametrize(("setting", "attack"), CASES)
def test_a_setting_counts_where_it_is_used(setting, attack):
    here = Condition.of("x", base(attack))
    there = Condition.of("x", base(attack) | alternatives(setting))
    assert (here != there) == (attack in users(setting))
    differing = [name for name, _, _ in here.differences(there)]
    # lengths of steps follow from epsilon; that restarts draw with the seed is not said
    assert (setting in differing) == bool(differing) == (here != there)
    assert set(differing) <= {setting, *(("step_size", "first_epsilon") * (setting == "epsilon"))}
    # what was stored is read as it was written
    for condition in (here, there):
        stored = json.loads(json.dumps(condition.settings()))
        assert Condition.of("x", stored) == condition


def test_settings_of_a_run_are_named():
    everything = {*names(Plan), *names(AttackSettings)}
    assert set(OF_THE_RUN) <= everything
    assert {*names(EngineSettings)} <= set(OF_THE_RUN)
    assert set(SETTINGS) == everything - set(OF_THE_RUN)
    assert {"steps", "loss", "seed", "norm", "hookpoint", "positions"} <= set(SETTINGS)
    assert {
        *("num_fewshot", "apply_chat_template", "fewshot_as_multiturn", "system_instruction")
    } == PROMPTS


NAME = "the attack@0.01"


@functools.cache
def invented(attack):
    """A run of this attack, called `NAME`."""
    run = run_of("m", 1.0, 0.5)
    samples = run.samples.replace({"condition": {"fgsm@0.01": NAME}, "attack": {"fgsm": attack}})
    return replace(run, samples=samples, table=summarise(samples))


def pair_of_runs(setting, attack, **more):
    """Two runs, equal but for a setting, with the same names."""
    found, run = [], invented(attack)
    for values in (base(attack), base(attack) | alternatives(setting)):
        condition = Condition.of(NAME, values)
        clean = Condition.of("none", values | {"attack": "none"})
        record = {**run.run, "attacks": {NAME: {"epsilon_absolute": 0.01, "embedding_rms": 0.1}}}
        record["conditions"] = {of.name: of.record() for of in (condition, clean)}
        found.append(replace(run, run=record | more))
    return found


def ways(a, b):
    """The names of what is paired, ranked and listed, of two runs with one attack each."""
    content = a.samples, a.questions, b.samples, b.questions
    known = {"conditions": (a.conditions, b.conditions)}
    told = unshared(*content, **known)
    rows = paired(*content, **known)
    return {name for name in rows["condition"] if not name.startswith("none")}, told


SOME = [s for s in SETTINGS if s != "attack" and users(s)]  # that an attack of the table uses
USED = [(s, next(a for a in users(s) if a != "none")) for s in SOME]


@pytest.mark.parametrize(("setting", "attack"), USED)
@pytest.mark.sampled(4)
def test_nothing_is_merged_that_differs(setting, attack, tmp_path):
    a, b = pair_of_runs(setting, attack)
    (name,), told = ways(a, b)
    values = {**base(attack), **alternatives(setting)}
    assert name != NAME and f"{setting}=" in name and f"vs {setting}=" in name
    assert any(text.startswith(f"{NAME} is not the same") and setting in text for text in told)
    runs = {"a": a, "b": b}
    with pytest.raises(UsageError, match=rf"share no condition (beside )?none; .*{setting}="):
        models.across(runs)
    assert any(setting in sentence for sentence in models.unshared(runs))
    board = tmp_path / "board.csv"
    for run in (a, b, a):
        leaderboard.add(board, {"m": run})
    rows = pd.read_csv(board)
    assert len(rows) == 2 and rows["settings"].nunique() == 2
    assert str(values[setting]) in rows["settings"][0]  # the first was added again, at the end


UNUSED = [
    (s, next(a for a in ATTACKS if a != "none" and a not in users(s)))
    for s in SETTINGS
    if {*ATTACKS} - {"none", *users(s)}
]


@pytest.mark.parametrize(("setting", "attack"), UNUSED)
@pytest.mark.sampled(3)
def test_what_does_not_matter_is_paired(setting, attack, tmp_path):
    a, b = pair_of_runs(setting, attack)
    assert ways(a, b) == ({NAME}, [])
    runs = {"a": a, "b": b}
    assert len(models.across(runs)) == 2 and models.unshared(runs) == []
    for run in (a, b):
        leaderboard.add(tmp_path / "board.csv", {"m": run})
    assert len(pd.read_csv(tmp_path / "board.csv")) == 1


def test_names_that_differ_and_mean_the_same():
    """One hookpoint alone is not part of the name; beside others it is."""
    values = base("fgsm") | {"hookpoint": "model.layers.3"}
    a, b = pair_of_runs("steps", "fgsm")
    both = []
    for run, name in ((a, "fgsm@0.01"), (b, "fgsm@0.01@model.layers.3")):
        record = {**run.run["conditions"], name: Condition.of(name, values).settings()}
        samples = run.samples.replace({"condition": {NAME: name}})
        record = run.run | {"conditions": record}
        both.append(replace(run, samples=samples, table=summarise(samples), run=record))
    assert ways(*both) == ({"fgsm@0.01"}, [])
    assert models.across(dict(zip("ab", both, strict=True)))["condition"].tolist() == [
        "fgsm@0.01",
        "fgsm@0.01",
    ]


def test_default_lengths_of_steps():
    """Given as a number, or left to the attack: a quarter of epsilon, of Auto-PGD twice it."""
    for attack, share in (("bim", 1 / 4), ("pgd", 1 / 4), ("apgd", 2), ("critical", 2)):
        default = Condition.of("x", base(attack))
        assert default == Condition.of("x", base(attack) | {"step_size": 0.01 * share})
    default = Condition.of("x", base("critical"))
    assert default == Condition.of("x", base("critical") | {"first_epsilon": 0.01 / 16})
    # of FMN it is to a corner of the ball, which no number says
    assert Condition.of("x", base("fmn")) != Condition.of(
        "x", base("fmn") | {"step_size": 0.01 / 4}
    )


def test_epsilon_zero_is_no_attack():
    still = Condition.of("x", base("bim") | {"epsilon": 0.0})
    assert still == Condition.of("x", base("bim") | {"epsilon": 0.0, "steps": 3, "norm": "l2"})


# -- runs that recorded nothing of the kind --------------------------------------------------------

OLD = sorted(
    path.parent
    for path in (ROOT / "results").glob("*/*/run.json")
    if (path.parent / "samples.parquet").exists()
    # its conditions are those of the file, which need not be there any more
    and not json.loads(path.read_text("utf-8"))["settings"].get("perturbation")
)


@pytest.mark.parametrize("folder", OLD, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_old_runs(folder):
    """As their plan would have them today, which is made from the settings by another way."""
    run = json.loads((folder / "run.json").read_text("utf-8"))
    samples = pd.read_parquet(folder / "samples.parquet")
    given = {entry.name for entry in fields(Plan)}
    plan = Plan(**{k: v for k, v in run["settings"].items() if k in given})
    places = dict.fromkeys(of["hookpoint"] for of in run["attacks"].values())
    settings = plan.conditions_at([*places]) if plan.hookpoints else plan.conditions
    attacks = []
    for name, of in zip(run["attacks"], settings, strict=True):
        attacks.append(replace(of.attack_in_units, label=name.partition("@")[2]))
    expected = of_plan(plan, settings, attacks)
    found = of_run(run, samples)
    assert list(found) == list(expected) == list(samples["condition"].unique())
    assert found == expected
    assert all(found[name].name == name for name in found)


def test_names_alone():
    """All that a frame without a record tells."""
    told = {
        "none": {},
        "fgsm@1e-05": {"epsilon": 1e-5},
        "bim@0.7rms-l2@model.layers.3": {
            **{"epsilon": 0.7, "epsilon_unit": "rms", "norm": "l2"},
            "hookpoint": "model.layers.3",
        },
        "pgd@5neftune": {"epsilon": 5.0, "epsilon_unit": "neftune"},
        "random@0.1token_norm-l2_token": {
            **{"epsilon": 0.1, "epsilon_unit": "token_norm", "norm": "l2_token"}
        },
        "fgsm@0.2@model.layers.0.l2_norm@x": {
            **{"epsilon": 0.2, "hookpoint": "model.layers.0.l2_norm@x"}
        },
    }
    frame = pd.DataFrame(
        [{"condition": name, "attack": name.partition("@")[0], "epsilon": 9.0} for name in told]
    )
    found = by_name(frame)
    for name, values in told.items():
        expected = {"attack": name.partition("@")[0], **values}
        assert found[name] == Condition.of(name, expected), name
    # a name that says nothing of its amplitude leaves it to the frame
    strange = frame.assign(condition="x@y", attack="x")[:1]
    assert by_name(strange)["x@y"].get("epsilon") == 9.0


def test_the_record_counts_and_not_the_name():
    """Names could be anything: amplitudes are read from the record of a run that has one."""
    plan = Plan(attacks="none,fgsm,bim", epsilons="0,0.5rms", norm="l2", hookpoints="a.1,b.2")
    settings = plan.conditions_at(["a.1", "b.2"])
    attacks = [
        of.resolved(Signal(0.1, 4, 1.0), label)
        for of, label in zip(settings, labels(settings), strict=True)
    ]
    made = of_plan(plan, settings, attacks)
    assert str(made["fgsm@0.5rms-l2@b.2"].amplitude) == "0.5rms-l2@b.2"
    assert made["none"].amplitude is None
    assert made["fgsm@0-l2@a.1"].amplitude.epsilon == Epsilon(0, "absolute")
    assert made["bim@0.5rms-l2@b.2"].elsewhere().name == "bim@0.5rms-l2"
    record = json.loads(json.dumps({name: of.record() for name, of in made.items()}))
    renamed = {f"c{i}": of for i, of in enumerate(record.values())}
    frame = pd.DataFrame({"condition": [*renamed], "attack": [of.name for of in attacks]})
    read = of_run({"conditions": renamed}, frame.assign(epsilon=0.0))
    assert [*read.values()] == [*made.values()]
    assert [of.amplitude for of in read.values()] == [of.amplitude for of in made.values()]


def test_names_and_records_tell_the_same_amplitude():
    plan = Plan(attacks="none,pgd", epsilons="0.01,5neftune,1e-07rms", norm="l2_token")
    attacks = [of.resolved(Signal(0.1, 4, 1.0)) for of in plan.conditions]
    made = of_plan(plan, plan.conditions, attacks)
    frame = pd.DataFrame({"condition": [*made], "attack": [of.name for of in attacks]})
    named = by_name(frame)
    assert {n: of.amplitude for n, of in named.items()} == {
        n: of.amplitude for n, of in made.items()
    }


@pytest.mark.parametrize(
    "damaged",
    [
        {"conditions": 3},
        {"conditions": {NAME: 1}},
        {"conditions": {NAME: {}}},
        {"attacks": {}},
        {"conditions": {NAME: {"amplitude": {"epsilon": 1}}}},
    ],
    ids=str,
)
def test_a_damaged_record_is_read_as_an_old_one(damaged):
    (run, _) = pair_of_runs("norm", "fgsm", **damaged)
    assert run.conditions[NAME].attack == "fgsm"


def test_stored_with_the_samples_and_the_record(tmp_path):
    """Each alone says what the conditions are."""
    run, _ = pair_of_runs("norm", "fgsm")
    samples = run.samples.assign(hookpoint="embed")
    save(replace(run, samples=samples), tmp_path, ["llm-attack"])
    found = results.load(tmp_path)
    assert found.conditions == run.conditions
    assert not found.samples.attrs
    record = json.loads((tmp_path / "run.json").read_text())
    assert record.pop("conditions") == run.run["conditions"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert results.load(tmp_path).conditions == run.conditions
    assert set(results.load_frames(tmp_path)["samples"]) >= {"condition", "acc"}


# -- against the numbers themselves ----------------------------------------------------------------

# With these, the numbers of an attack that uses a setting differ on the questions below.
BUSY = {
    **{"epsilon": 0.05, "steps": 3, "restarts": 2, "rounds": 3, "queries": 6, "loss": "choice"},
    "step_size": 0.02,
}
OTHERWISE = {
    **{"epsilon": 0.06, "steps": 4, "restarts": 1, "rounds": 6, "queries": 40, "loss": "margin"},
    **{"step_size": 0.015, "decay": 0.1, "first_epsilon": 0.03, "epsilon_unit": "rms"},
    **{"norm": "l2", "score": "acc_norm", "positions": "continuation", "seed": 5},
    "hookpoint": "model.layers.0",
}


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_numbers_differ_where_conditions_do(attack, exact, build):
    """The bundled model in float64, with one setting after the other changed."""
    task = build("demo_arc_easy", 4)
    first = {**BUSY, "attack": attack}
    lm = exact(**first)

    def answers(given):
        lm.use(AttackSettings(**given))
        values = np.array([ll for ll, _ in lm.loglikelihood(task.instances, disable_tqdm=True)])
        if given.get("score") == "acc_norm":  # which compares log-likelihoods per character
            values /= [len(request.args[1]) for request in task.instances]
        return values, Condition.of("x", AttackSettings(**given).arguments())

    numbers, here = answers(first)
    for setting, value in OTHERWISE.items():
        others, there = answers(first | {setting: value})
        same = bool(np.abs(others - numbers).max() < 1e-9)
        if there == here or not ATTACKS[attack].minimal:  # whose nearest point may be the same
            assert same == (there == here), (setting, np.abs(others - numbers).max())
