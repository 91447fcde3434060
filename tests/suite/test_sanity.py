"""The checklist: cases that pass and fail, and models that hide their gradient."""

import re

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from invented import build

from llm_attack import cli
from llm_attack.suite import doctor
from llm_attack.suite.run import execute as run
from llm_attack.suite.studies import sanity
from llm_attack.suite.studies.sanity import FAILS, NOT_APPLICABLE, PASSES

WELL = {
    "none": 3.0,
    "random@0.1": 2.9,
    "fgsm@0.1": 1.0,
    "bim@0.1": 0.4,
    "bim@0.2": -1.0,
    "blocks@0.1": 2.0,
}
NAMES = [
    "random is weaker than the gradient",
    "steps are not weaker than one",
    "a larger epsilon does not help the model",
    "nothing is left at a large epsilon",
    "the gradient is not zero",
    "a search without gradients finds no more",
]


def made_up(shifts, *, rms=0.1, zeros=0.0, loss="choice"):
    """Samples and the record of a run that never was."""
    samples, _ = build({"a": (60, 4), "b": (40, 2)}, shifts)
    samples["hookpoint"] = "embed"
    attacks = {
        name: {
            "epsilon_absolute": float(name.partition("@")[2] or 0),
            "embedding_rms": rms,
            "zero_gradient_fraction": None if name[:4] in ("none", "rand", "bloc") else zeros,
        }
        for name in shifts
    }
    return samples, {"attacks": attacks, "settings": {"loss": loss}}


def verdicts(found):
    return {check.name: check.verdict for check in found}


def test_a_model_that_is_well():
    found = sanity.checks(*made_up(WELL | {"bim@0.2": -9.0}))
    assert verdicts(found) == dict.fromkeys(NAMES, PASSES)
    figures = {check.name: check.figure for check in found}
    assert figures[NAMES[3]] == "accuracy 0.000 under bim@0.2, 2 RMS"
    assert "bim@0.2 below bim@0.1" in figures[NAMES[2]]
    assert [row[0] for row in sanity.cells(found).rows] == NAMES


@pytest.mark.parametrize(
    "name, shifts, options",
    [
        ("random is weaker than the gradient", {"random@0.1": 1.0}, {}),
        ("steps are not weaker than one", {"bim@0.1": 2.5}, {}),
        ("a larger epsilon does not help the model", {"bim@0.2": 2.0}, {}),
        ("nothing is left at a large epsilon", {"bim@0.2": 1.0}, {}),
        ("the gradient is not zero", {}, {"zeros": 0.4}),
        ("a search without gradients finds no more", {"blocks@0.1": -2.0}, {}),
    ],
)
def test_what_fails(name, shifts, options):
    assert verdicts(sanity.checks(*made_up(WELL | shifts, **options)))[name] == FAILS


@pytest.mark.parametrize("attack, loss", [("apgdt", "choice"), ("bim", "margin")])
def test_losses_of_two_choices_leave_most_tokens_without_a_gradient(attack, loss):
    """What counts there are gradients that are zero in every coordinate."""
    name = f"{attack}@0.1"
    samples, record = made_up({"none": 3.0, name: 0.0}, zeros=0.4, loss=loss)
    zeros = NAMES[4]
    assert verdicts(sanity.checks(samples, record))[zeros] == NOT_APPLICABLE  # an earlier run
    for share, verdict in ((0.0, PASSES), (0.4, FAILS)):
        record["attacks"][name]["flat_gradient_fraction"] = share
        assert verdicts(sanity.checks(samples, record))[zeros] == verdict


def test_what_does_not_apply():
    """Of a run without attacks nothing; the figure says what it would take."""
    found = sanity.checks(*made_up({"none": 3.0}))
    assert verdicts(found) == dict.fromkeys(NAMES, NOT_APPLICABLE)
    assert all(re.match("the run (has no|lacks|does not have)", check.figure) for check in found)
    # label-free attacks leave guesses; nine questions say nothing
    found = sanity.checks(*made_up(WELL, loss="sequence"))
    assert verdicts(found)[NAMES[3]] == NOT_APPLICABLE
    samples, record = made_up(WELL)
    few = sanity.checks(samples[(samples["task"] == "a") & (samples["doc_id"] < 9)], record)
    assert verdicts(few)[NAMES[0]] == NOT_APPLICABLE


def test_too_few_steps():
    """Twice as many find 40 % more; of answers that are wrong already nothing is asked."""
    samples, _ = made_up({"none": 3.0, "bim@0.1": 2.0})
    clean, short = (
        sanity.outcome(samples[samples["condition"] == name], True).clip(lower=0).mean()
        for name in ("none", "bim@0.1")
    )
    # the share of its margin that each attacked question keeps
    kept = (short - 0.4 * (clean - short)) / short

    def weakened(share, right):
        margins = sanity.outcome(samples, True)
        rows = zip(samples["log_likelihoods"], samples["gold"], margins, strict=True)
        fall = [(1 - share) * max(m, 0) if right else 5.0 * (m < 0) for _, _, m in rows]
        rows = zip(samples["log_likelihoods"], samples["gold"], fall, strict=True)
        return samples.assign(
            log_likelihoods=[
                [x - by * (i in gold) for i, x in enumerate(of)] for of, gold, by in rows
            ]
        )

    check = doctor.still_rising(samples, weakened(kept, True), True)
    assert check.verdict == FAILS and "40.0% of what bim@0.1" in check.figure
    assert doctor.still_rising(samples, samples, True).verdict == PASSES
    assert doctor.still_rising(samples, weakened(1, False), True).verdict == PASSES


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize(
    "short, long, verdict, figure",
    [
        # the steps of the run helped the model, and twice as many do nothing
        (3.02, 3.0, NOT_APPLICABLE, "no attack lowers the outcome by more than"),
        (3.0, 3.0, NOT_APPLICABLE, "no attack lowers the outcome by more than"),
        (2.99999999, 2.9999, NOT_APPLICABLE, "no attack lowers the outcome by more than"),
        (3.0, 1.0, FAILS, "bim@0.1 had no effect; with twice the steps it reached 2 nats"),
        (3.02, 1.02, FAILS, "bim@0.1 had no effect; with twice the steps it reached 2 nats"),
        (2.0, 1.0, FAILS, "twice the steps add 100.0% of what bim@0.1 reached"),
        (2.0, 1.9, PASSES, "twice the steps add 10.0% of what bim@0.1 reached"),
        (2.0, 2.1, PASSES, "twice the steps add -10.0% of what bim@0.1 reached"),
    ],
)
def test_steps_that_reach_nothing(knows, short, long, verdict, figure):
    """No share is taken of what is nothing."""

    def frame(outcome):
        first = outcome if knows else 2 * outcome
        rows = {"none": [3.0 if knows else 6.0, 0.0], "bim@0.1": [first, 0.0]}
        return pd.DataFrame(
            [
                {"condition": name, "attack": name.partition("@")[0], "gold": [0]}
                | {"log_likelihoods": values}
                for name, values in rows.items()
                for _ in range(2)
            ]
        )

    check = doctor.still_rising(frame(short), frame(long), knows)
    assert (check.verdict, figure in check.figure) == (verdict, True), check


# -- models of which attacks say nothing -----------------------------------------------------------


def sharp(model):
    """Logits a thousand times as large: cross-entropy has no gradient where an answer is sure."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(1000 * head.weight.detach())


def quantised(model):
    """Embeddings in steps of their RMS, behind a straight-through estimator."""

    def round_off(block, arguments, named):
        x = arguments[0]
        step = x.detach().square().mean().sqrt()
        return (x + ((x / step).round() * step - x).detach(), *arguments[1:]), named

    model.model.layers[0].register_forward_pre_hook(round_off, with_kwargs=True)


def dropping(model):
    """Dropout that was left on."""
    model.model.layers[0].register_forward_hook(
        lambda block, arguments, x: (
            torch.nn.functional.dropout(x, 0.1)
            if isinstance(x, torch.Tensor)
            else (torch.nn.functional.dropout(x[0], 0.1), *x[1:])
        )
    )


def examined(monkeypatch, spoil, *options):
    load = run.load_model

    def spoilt(plan):
        lm = load(plan)
        spoil(lm.model)
        return lm

    monkeypatch.setattr(run, "load_model", spoilt)
    words = ["doctor", "--model", "demo", "--tasks", "demo_piqa,demo_arc_easy", "--progress=quiet"]
    found = CliRunner().invoke(cli.main, [*words, "--device=cpu", *options])
    lines = [line for line in found.stdout.splitlines() if line.startswith("  ")]
    return found, {line.partition(": ")[2].partition(";")[0]: line for line in lines}


@pytest.mark.slow
def test_the_demo_is_well(monkeypatch):
    found, lines = examined(monkeypatch, lambda model: None)
    assert found.exit_code == 0, (found.output, found.exception)
    assert "0 of 11 checks fail" in found.stdout
    assert all(line.startswith("  passes: ") for line in lines.values()) and len(lines) == 11


def zero_embeddings(model):
    """One RMS of them is 0."""
    torch.nn.init.zeros_(model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    "spoil, options",
    [(lambda model: None, ["--positions", "500:"]), (zero_embeddings, ["--loss", "choice"])],
)
@pytest.mark.sampled(2)
def test_attacks_that_do_nothing(monkeypatch, spoil, options):
    """At positions that no token has, and of an amplitude of 0."""
    some = ["--limit", "2", "--queries", "2", *options]
    found, lines = examined(monkeypatch, spoil, *some)
    assert found.exit_code == 1, (found.output, found.exception)
    line = lines["attacks perturb as much as they are asked to"]
    assert line.startswith("  fails: ") and "; 0% of the amplitude under " in line
    assert lines["the gradient is that of the loss"].startswith("  not applicable: ")


@pytest.mark.parametrize(
    "spoil, options, name",
    [
        (sharp, ["--loss", "continuation"], "the gradient is not zero"),
        (quantised, [], "the gradient is that of the loss"),
        (dropping, [], "epsilon 0 equals clean"),
    ],
)
@pytest.mark.sampled(3)
def test_models_that_hide_their_gradient(monkeypatch, spoil, options, name):
    found, lines = examined(monkeypatch, spoil, *options, "--limit", "5", "--queries", "20")
    assert found.exit_code == 1, (found.output, found.exception)
    assert lines[name].startswith("  fails: "), found.stdout
