"""Is n enough? The estimate before a run says so, and so does a run that can show nothing."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from llm_attack import Plan, evaluate
from llm_attack.stats import detectable, planned, tells_from_guessing
from llm_attack.suite.analysis.summary import INDISTINGUISHABLE, TOO_FEW, summarise
from llm_attack.suite.report.words import in_words
from llm_attack.suite.run.estimate import _shows


@pytest.mark.parametrize("choices", (2, 3, 4, 5))
def test_enough_questions_tell_from_guessing_as_scipy_says(choices):
    """Power of scipy's exact test against a model half-way between guessing and perfect."""
    p = 1 / choices
    for n in (1, 4, 5, 8, 10, 15, 20, 25, 30, 40, 60):
        found = [k for k in range(n + 1) if k > n * p and binomtest(k, n, p).pvalue <= 0.05]
        power = binom.pmf(found, n, (1 + p) / 2).sum()
        assert tells_from_guessing([p] * n) == (power >= 0.8), n


@pytest.mark.slow
def test_the_planned_drop_is_found_with_its_power():
    """By McNemar's test on drawn pairs: near 0.8 at the planned drop, and less at half of it."""
    n, share, rng = 400, 0.2, np.random.default_rng(0)
    drop = planned([n], share)

    def power(drop):
        odds = [(share + drop) / 2, (share - drop) / 2, 1 - share]
        draws = rng.multinomial(n, odds, 2000)
        return np.mean([binomtest(a, a + b).pvalue <= 0.05 for a, b, _ in draws])

    assert power(drop) == pytest.approx(0.8, abs=0.06)
    assert power(drop / 2) < 0.4


def test_a_planned_drop_needs_the_questions_that_it_changes():
    """Where the assumed share is too small, all that changes is lost: d = z² / n, and z = 2.8."""
    assert planned([50], 0.01) == pytest.approx(detectable([1]) ** 2 / 50)
    assert planned([50], 0.01) > 0.01
    assert planned([100] * 4, 0.1) == pytest.approx(planned([400], 0.1))
    assert planned([5], 0.1) > 1


def test_what_a_dry_run_says():
    six = _shows([500] * 6)
    assert six == (
        "1.6 points if 10% of the questions change their answer, 2.8 points if 30% of the questions"
        " change their answer (assumed; mean over 6 tasks, power 0.8 at level 0.05)"
    )
    assert _shows([20]).startswith("39.2 points if no question changes for the better (assumed; ")
    assert _shows([5]) == "none: so few questions show no drop"


def test_a_run_of_five_questions_says_that_it_shows_nothing():
    """All of them are right, and the exact test finds p = 1/16."""
    result = evaluate(
        Plan("demo", "demo_piqa", attacks=["none", "fgsm"], limit=5, device="cpu"), progress="quiet"
    )
    clean = result.table.iloc[0]
    assert clean["acc"] == 1 and clean["p_chance"] == 1 / 16 and clean["verdict"] == TOO_FEW
    first, attack = in_words(result.table)
    assert first.endswith("Too few questions to tell from guessing: demo_piqa.")
    assert attack == "FGSM at 0.01: five questions cannot show a change (80.0 points lost)."


def test_verdicts_of_guesses_by_the_number_of_questions(frames):
    """A model that guesses: of 400 questions a finding, of 8 none. At 0.8 of ten, too few."""
    guesses = {"none": 0.0}
    samples, _ = frames({"many": (400, 2), "few": (8, 2)}, guesses)
    table = summarise(samples).set_index("task")
    assert table.loc["many", "verdict"] == INDISTINGUISHABLE
    assert table.loc["few", "verdict"] == TOO_FEW
    ten, _ = frames({"ten": (10, 2)}, guesses)
    ten["acc"] = [1.0] * 8 + [0.0] * 2
    assert summarise(ten).set_index("task").loc["ten", "verdict"] == TOO_FEW
