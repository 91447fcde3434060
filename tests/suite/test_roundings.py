"""Attacks in rounding cells in a run: conditions, worst cases, the table, and the record."""

import json

import pytest
import torch
from evaluation import evaluated
from rich.console import Console
from safetensors import safe_open

from llm_attack import Plan, evaluate
from llm_attack.base.errors import UsageError
from llm_attack.lm.settings import AttackSettings, condition_names
from llm_attack.suite import commands, results
from llm_attack.suite.analysis import worst
from llm_attack.suite.analysis.conditions import Condition, aligned, of_run
from llm_attack.suite.report.tables import Cells
from llm_attack.suite.run import estimate
from llm_attack.suite.run.execute import prepare
from llm_attack.suite.studies import roundings

NAMES = ("rounding", "random_rounding", "fgsm_rounding", "worst_rounding", "tied_rounding")
NAMES += ("tied_random_rounding",)
HOW = {"model": "demo", "tasks": "demo_piqa", "limit": 3, "steps": 2, "loss": "margin"}


def plan(**more):
    attacks = more.pop("attacks", ",".join(("none", *NAMES)))
    return Plan(**{**HOW, "attacks": attacks, "cells": "int8,int4", **more})


def test_names_and_order_of_conditions():
    mixed = plan(attacks="none,worst_rounding,fgsm,rounding", epsilons="0.1rms,0.2rms")
    assert condition_names(mixed.conditions) == [
        *("none", "worst_rounding@int8", "worst_rounding@int4", "fgsm@0.1rms", "fgsm@0.2rms"),
        *("rounding@int8", "rounding@int4"),
    ]
    steps = plan(attacks="none,worst_rounding,rounding", cells="nf4", steps=[2, 4])
    assert condition_names(steps.conditions) == [
        *("none", "worst_rounding@nf4-steps2", "worst_rounding@nf4-steps4", "rounding@nf4"),
    ]


def test_runs_without_cells_have_the_settings_that_they_had():
    assert "cells" not in Plan(**HOW).settings()
    assert plan().settings()["cells"] == ("int8", "int4")


def test_settings_of_steps_are_read():
    assert plan(attacks="none,worst_rounding", restarts=2, step_size=0.5).restarts == 2
    with pytest.raises(UsageError, match="restarts=2: no attack of this run uses it"):
        plan(attacks="none,rounding", restarts=2)


def test_an_epsilon_that_would_have_no_effect_is_refused():
    settings = AttackSettings("rounding", cells="int8")
    assert settings.arguments()["epsilon"] == 1.0
    assert settings.arguments()["epsilon_unit"] == "int8"
    with pytest.raises(UsageError, match=r"epsilon=0\.5: must be left out with attack=rounding"):
        AttackSettings("rounding", 0.5, cells="int8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with attacks in cells and in a ball, and its folder."""
    folder = tmp_path_factory.mktemp("cells") / "run"
    mixed = plan(attacks=",".join(("none", "fgsm", *NAMES)), epsilons="0.1rms")
    return evaluate(mixed, output=folder, progress="quiet"), folder


@pytest.mark.slow
def test_conditions_of_a_run_are_read_again(run):
    result, folder = run
    loaded = results.load(folder)
    read = of_run(loaded.run, loaded.samples)
    assert loaded.conditions == result.conditions
    assert read.items() <= result.conditions.items() and len(read) == 2 + 2 * len(NAMES)
    there = read["worst_rounding@int8"]
    assert (there.get("epsilon"), there.get("epsilon_unit")) == (1.0, "int8")
    assert there.get("cells") is None  # the unit has it
    assert there != read["worst_rounding@int4"]
    # without the record, names are told apart
    del loaded.run["conditions"]
    assert len({*of_run(loaded.run, loaded.samples)}) == len(read)


@pytest.mark.slow
def test_formats_and_balls_have_separate_worst_cases(run):
    result, _ = run
    covered = {
        name: condition.get("attacks")
        for name, condition in worst.conditions(result.samples, result.run).items()
        if condition.attack == "worst"
    }
    listed = ", ".join(f"{name}@{{0}}" for name in sorted(NAMES[1:]))
    assert covered == {f"worst@{name}": listed.format(name) for name in ("int8", "int4")}


@pytest.mark.slow
def test_the_table_has_the_accuracies_and_sizes_of_the_run(run):
    result, folder = run
    made = roundings.cells(result.table, result.conditions, result.run)
    assert made.heading[5:-1] == ["clean", *NAMES]
    assert [row[:3] for row in made.rows] == [["demo_piqa", name, "3"] for name in ("int8", "int4")]
    acc = result.table.set_index("condition")["acc"].to_dict()
    for row in made.rows:
        assert row[5] == f"{acc['none']:.3f}"
        assert row[6:-1] == [f"{acc[f'{name}@{row[1]}']:.3f}" for name in NAMES]
        info = result.run["attacks"][f"worst_rounding@{row[1]}"]
        size = info["half_cell_rms"] / info["embedding_rms"]
        assert row[3] == f"{size:.2g}" and row[-1] == f"{info['rounding_cosine']:.3f}"
        assert info["noise_rms"] < 2 * info["half_cell_rms"]
    ratio = [float(row[3]) for row in made.rows]
    assert ratio[1] / ratio[0] == pytest.approx(127 / 7, rel=0.1)
    assert made.markdown() in (folder / roundings.FILE).read_text("utf-8")
    assert roundings.TITLE in (folder / "report.html").read_text("utf-8").lower()


@pytest.mark.slow
def test_the_report_is_made_again_and_others_have_no_table(run):
    result, folder = run
    before = (folder / roundings.FILE).read_text("utf-8")
    (folder / roundings.FILE).unlink()
    commands.report(folder, None)
    assert (folder / roundings.FILE).read_text("utf-8") == before
    balls = {name: result.conditions[name] for name in ("none", "fgsm@0.1rms")}
    assert roundings.cells(result.table, balls, result.run) is None
    # a record without the sizes leaves the cells empty
    bare = roundings.cells(result.table, result.conditions, {})
    assert isinstance(bare, Cells) and {row[-1] for row in bare.rows} == {"–"}


TIED = {**HOW, "attacks": "none,tied_rounding", "cells": "int4", "limit": 8, "device": "cpu"}


def tokens_of(batches):
    return {r.tokens for batch in batches for q in batch.questions for r in q.requests}


@pytest.fixture(scope="module")
def held_out():
    return prepare(Plan(**TIED, half="held_out"), "quiet", Console())


def test_with_a_half_held_out_the_table_is_fitted_to_the_other(held_out):
    """No request that the run asks is in a batch of the fit; together they are all."""
    asked, fitted = (tokens_of(w.batch for w in held_out.work), tokens_of(held_out.fit_to.batches))
    whole = prepare(Plan(**TIED), "quiet", Console())
    every = tokens_of(w.batch for w in whole.work)
    assert asked and fitted and not asked & fitted and asked | fitted == every
    assert tokens_of(whole.fit_to.batches) == every and "half" not in whole.fit_to.record()
    record = held_out.fit_to.record()["fitted_to"]
    assert record["half"] == "fitting" and record["questions"] == held_out.fit_to.questions
    n = [len({r.doc_id for r in prepared.requests}) for prepared in (held_out, whole)]
    assert held_out.fit_to.questions == n[1] - n[0]


def test_dry_run_counts_the_fit_where_it_is(held_out):
    """Each step makes a gradient for each question of the other half."""
    longer = prepare(Plan(**TIED | {"steps": 5}, half="held_out"), "quiet", Console())
    two, five = (estimate.estimate(p, seconds=0) for p in (held_out, longer))
    assert (two.passes.gradients, two.passes.forwards) == (2, 5)
    engine, sizes = held_out.lm.engine, estimate.Sizes.of(held_out.lm.model)
    packs = [engine.pack(batch) for batch in held_out.fit_to.batches]
    own = sum(sizes.gradient(pack, len(pack.watched.positions)) for pack in packs)
    assert five.counts.gradients - two.counts.gradients == 3 * own


@pytest.mark.slow
def test_a_run_uses_the_table_of_the_other_half_and_says_so(held_out, tmp_path):
    asked = {**TIED, "attacks": "none,tied_rounding,tied_random_rounding", "progress": "quiet"}
    model, tasks = asked.pop("model"), asked.pop("tasks")
    result = evaluated(model, tasks, output=tmp_path / "run", **asked, half="held_out")
    with safe_open(tmp_path / "run" / "tied_rounding_int4.safetensors", "pt") as file:
        ids = set(file.get_tensor("ids").tolist())
        rows = file.get_tensor("embeddings")
    held_out.lm.fit(held_out.fit_to.batches)
    (table,) = held_out.lm.engine.tables.values()
    torch.testing.assert_close(rows, table.rows)
    assert (rows != table.cells.x).any(1).all()
    seen = tokens_of(held_out.fit_to.batches)
    assert ids == {token for tokens in seen for token in tokens[:-1]}
    own = result.conditions["tied_rounding@int4"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())["fitted_to"]
    assert own.get("fitted_to") == record["source"] == held_out.fit_to.source
    n = record["questions"]
    notes = (tmp_path / "run" / roundings.FILE).read_text()
    assert f"fitted to {n} questions of the other half" in notes
    # a run that was fitted to its own questions is another condition
    whole = prepare(Plan(**TIED), "quiet", Console()).fit_to.source
    values = {**own.settings(), "fitted_to": whole}
    there = {own.name: Condition.of(own.name, values, own.amplitude)}
    _, _, sentences = aligned({own.name: own}, there)
    assert len(sentences) == 1 and f"fitted_to={whole} in b" in sentences[0]


def test_notes_are_about_attacks_of_the_run():
    notes = ["tied_rounding: one table", "tied_random_rounding: drawn", "rounding: every"]
    without = [note for note in notes if roundings._about(note, ["rounding@int8"])]
    assert without == notes[2:]
    assert [roundings._about(note, ["tied_rounding@int8"]) for note in notes] == [True, False, True]
