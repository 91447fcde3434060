"""Attacks without effect, or with less than half of their amplitude: results have a warning."""

import json

import pytest
from click.testing import CliRunner

from llm_attack.attacks import ATTACKS
from llm_attack.attacks.settings import StepSettings
from llm_attack.base.declare import names
from llm_attack.cli import main

PLAIN = [name for name, kind in ATTACKS.items() if kind.gradient or kind.start or kind.search]


def carried_out(reused, build, n=3, **arguments):
    # what no attack reads would be said
    unread = set(names(StepSettings)) - set(ATTACKS[arguments["attack"]].settings)
    lm = reused(**{name: value for name, value in arguments.items() if name not in unread})
    lm.loglikelihood(build("demo_piqa", n).instances, disable_tqdm=True)
    return lm


@pytest.mark.parametrize("norm", ["linf", "l2", "l2_token"])
@pytest.mark.parametrize("attack", PLAIN)
@pytest.mark.sampled(6)
def test_attacks_that_do_what_they_should(reused, build, attack, norm):
    kind = ATTACKS[attack]
    arguments = {"attack": attack, "norm": norm, "epsilon": "0.02rms", "loss": "choice"}
    lm = carried_out(reused, build, 2, **arguments, queries=5, rounds=2, steps=4)
    info = lm.attack_info()
    assert lm.all_warnings() == []
    assert info["lost_to_rounding"] == 0
    assert info["not_perturbed"] == (None if kind.minimal else 0)
    known = float(not (kind.minimal or kind.adaptive or kind.search))
    assert (info["amplitude_reached"] or 0) == pytest.approx(known, abs=0.05)


@pytest.mark.parametrize("attack", ["random", "fgsm", "apgd", "blocks"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l2_token"])
@pytest.mark.sampled(4)
def test_positions_that_no_token_has(reused, build, attack, norm):
    lm = carried_out(reused, build, attack=attack, norm=norm, positions="900:", queries=2, steps=2)
    assert lm.attack_info()["not_perturbed"] == 1
    (sentence,) = lm.all_warnings()
    assert sentence.endswith(": nothing was perturbed: the answers are those without an attack")
    clean = carried_out(reused, build, attack="none")
    requests = build("demo_piqa", 3).instances
    ours, expected = (of.loglikelihood(requests, disable_tqdm=True) for of in (lm, clean))
    assert [a[0] for a in ours] == pytest.approx([a[0] for a in expected], abs=1e-4)


def test_positions_that_some_have(reused, build):
    requests = build("demo_piqa", 4).instances
    lm = reused(attack="random")
    lengths = sorted(len(lm.tok_encode("".join(r.args))) - 1 for r in requests)
    middle = lengths[len(lengths) // 2]
    short = sum(length <= middle for length in lengths)
    lm = reused(attack="random", positions=f"{middle}:")
    lm.loglikelihood(requests, disable_tqdm=True)
    (sentence,) = lm.all_warnings()
    assert f"{short} of {len(lengths)} points were not perturbed at all" in sentence


def test_units_that_are_zero(make, build):
    lm = make(attack="fgsm", epsilon="0.7rms")
    lm.model.get_input_embeddings().weight.data.zero_()
    lm.use(lm.settings)
    lm.loglikelihood(build("demo_piqa", 2).instances, disable_tqdm=True)
    assert lm.all_warnings() == [
        "fgsm@0.7rms: nothing was perturbed: the unit rms is 0 at this hookpoint"
    ]
    lm = make(attack="fgsm", epsilon=0)  # as was asked for
    lm.loglikelihood(build("demo_piqa", 2).instances, disable_tqdm=True)
    assert lm.all_warnings() == []


@pytest.mark.parametrize("attack", ["random", "fgsm", "bim"])
def test_lost_to_rounding_in_l2(make, build, attack):
    """As in L-infinity, of a step that is 2^-10 in every coordinate: a quarter of them is at 1.5,
    where the numbers of bfloat16 are 2^-7 apart.
    """
    weight = make(attack="none", dtype="bfloat16")
    width = weight.model.config.hidden_size
    step = 2.0**-10 * width**0.5
    options = {"step_size": step, "steps": 1} if attack == "bim" else {}
    lm = make(attack=attack, dtype="bfloat16", norm="l2_token", epsilon=step, **options)
    matrix = lm.model.get_input_embeddings().weight.data
    matrix[:, : width // 4], matrix[:, width // 4 :] = 1.5, 2.0**-9
    lm.loglikelihood(build("demo_piqa", 2).instances, disable_tqdm=True)
    assert lm.attack_info()["lost_to_rounding"] == pytest.approx((width // 4) / width)
    assert any("25 % of the perturbation is lost" in text for text in lm.all_warnings())


def test_less_than_half_of_what_was_asked(make, build):
    """In L2 below the spacing of the dtype, where a few coordinates move and most do not."""
    lm = make(attack="random", dtype="bfloat16", norm="l2", epsilon=0.002)
    width = lm.model.config.hidden_size
    matrix = lm.model.get_input_embeddings().weight.data
    matrix[:], matrix[:, : width // 16] = 1.5, 2.0**-9
    lm.loglikelihood(build("demo_piqa", 2).instances, disable_tqdm=True)
    info = lm.attack_info()
    # of normal draws as many coordinates have as much of the squares
    assert info["amplitude_reached"] == pytest.approx((1 / 16) ** 0.5, rel=0.15)
    assert any("of its amplitude" in text for text in lm.all_warnings())


def test_short_steps_reach_what_they_can(reused, build):
    lm = carried_out(reused, build, 2, attack="bim", epsilon=1.0, step_size=1e-4, steps=3)
    assert lm.attack_info()["amplitude_reached"] == pytest.approx(1, abs=0.01)


def test_a_run_marks_the_condition(tmp_path):
    words = ["run", "--model", "demo", "--tasks", "demo_piqa", "--limit", "3", "--device", "cpu"]
    words += ["--attacks", "none,fgsm", "--positions", "900:", "--progress", "quiet"]
    done = CliRunner().invoke(main, [*words, "-o", str(tmp_path)])
    assert done.exit_code == 0, done.output
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["attacks"]["fgsm@0.01"]["not_perturbed"] == 1
    (sentence,) = run["warnings"]
    assert sentence.startswith("fgsm@0.01: nothing was perturbed")
    table = (tmp_path / "table.md").read_text()
    (row,) = [line for line in table.splitlines() if line.startswith("| demo_piqa |")][:1]
    plain, marked = row.split("|")[3:5]
    assert "¶" in marked and "¶" not in plain
    assert "- ¶ see the warning of this condition" in table
    assert f"- warning: {sentence}" in table
    report = (tmp_path / "report.html").read_text()
    assert 'fgsm@0.01 <abbr title="see the warning of this condition">¶</abbr>' in report
