"""The worst case over attacks, and hidden gradients: by hand."""

import numpy as np
import pandas as pd
import pytest

from llm_attack.base.errors import UsageError
from llm_attack.suite.analysis.conditions import by_name
from llm_attack.suite.analysis.outcomes import gold_margin, gold_probability, measured
from llm_attack.suite.analysis.worst import conditions, hidden_gradients, with_worst
from llm_attack.suite.plan import Plan
from llm_attack.suite.results import summarise

KNOWS = {"settings": {"loss": "choice"}}
GUESSES = {"settings": {"loss": "sequence", "attacks": ["none", "random", "fgsm"]}}


def samples(conditions, norms=None):
    """Two-choice questions, gold first, whose answers under each condition are given as 1 and 0."""
    rows = []
    for condition, right in conditions.items():
        attack, _, label = condition.partition("@")
        epsilon = float(label.split("-")[0].split("@")[0].replace("rms", "") or 0)
        for doc_id, acc in enumerate(right):
            row = {"task": "t", "doc_id": doc_id, "condition": condition, "attack": attack}
            scores = [-1.0, -2.0] if acc else [-2.0, -1.0 - epsilon]
            row |= {"epsilon": epsilon, "n_choices": 2, "gold": [0], "prediction": 1 - acc}
            row |= {"acc": float(acc), "log_likelihoods": scores, "cosine": 0.1}
            row |= {"acc_norm": np.nan if norms is None else float(norms[condition][doc_id])}
            rows.append(row)
    return pd.DataFrame(rows)


def worst(frame, label):
    rows = frame[frame["condition"] == f"worst@{label}"].sort_values("doc_id")
    return rows["acc"].astype(int).tolist()


def test_right_if_no_attack_at_this_epsilon_or_a_smaller_one_made_it_wrong():
    given = {
        "none": [1, 1, 1, 1, 0],
        "random@0.1": [1, 1, 0, 1, 0],
        "fgsm@0.1": [1, 0, 1, 1, 0],
        "random@0.2": [1, 1, 1, 1, 1],
        "fgsm@0.2": [1, 1, 1, 0, 0],
        "reversed@0.1": [0, 0, 0, 0, 0],
        "critical@0.2": [0, 0, 0, 0, 0],
        "gaussian@0.1": [0, 0, 0, 0, 0],
    }
    found = with_worst(samples(given), KNOWS)
    assert worst(found, "0.1") == [1, 0, 0, 1, 0]
    assert worst(found, "0.2") == [1, 0, 0, 0, 0]
    assert len(found) == len(samples(given)) + 10
    # the answers are those of the attack that left the smallest margin
    rows = found[found["condition"] == "worst@0.2"].set_index("doc_id")
    assert rows["log_likelihoods"].tolist() == [
        [-1.0, -2.0],
        *[[-2.0, -1.1]] * 2,
        [-2.0, -1.2],
        [-2.0, -1.1],
    ]
    assert (rows["epsilon"] == 0.2).all() and (rows["attack"] == "worst").all()
    table = summarise(found).set_index(["task", "condition"])
    assert table.loc[("t", "worst@0.2"), ["acc", "lost", "drop"]].tolist() == [0.2, 3, 60.0]
    pd.testing.assert_frame_equal(with_worst(found, KNOWS), found)


def test_one_attack_alone_is_its_own_worst_case():
    given = samples({"none": [1, 1], "fgsm@0.1": [1, 0]})
    assert with_worst(given, KNOWS) is given


def test_norms_and_hookpoints_are_kept_apart():
    given = {
        "fgsm@0.1": [1, 1],
        "bim@0.1": [1, 0],
        "fgsm@0.1-l2": [0, 1],
        "bim@0.1-l2": [1, 1],
        "fgsm@0.1@model.layers.0": [1, 1],
        "bim@0.1@model.layers.0": [1, 1],
    }
    found = with_worst(samples(given), KNOWS)
    assert worst(found, "0.1") == [1, 0]
    assert worst(found, "0.1-l2") == [0, 1]
    assert worst(found, "0.1@model.layers.0") == [1, 1]


def test_acc_norm_has_a_worst_case_of_its_own():
    given = {"fgsm@0.1": [1, 0, 1], "bim@0.1": [1, 1, 1]}
    norms = {"fgsm@0.1": [1, 1, 0], "bim@0.1": [0, 1, 1]}
    found = with_worst(samples(given, norms), KNOWS)
    rows = found[found["condition"] == "worst@0.1"].sort_values("doc_id")
    assert rows["acc"].tolist() == [1, 0, 1] and rows["acc_norm"].tolist() == [0, 1, 0]


@pytest.mark.parametrize(("more", "says"), [(4, False), (5, True)])
def test_a_search_that_finds_more_than_the_gradient(more, says):
    """1 / 2 ** 5 is below 0.05, 1 / 2 ** 4 is not."""
    given = {
        "none": [1] * 9,
        "fgsm@0.1": [1] * 9,
        "apgd@0.1": [1] * 9,
        "blocks@0.1": [0] * more + [1] * (9 - more),
        "random@0.1": [0] * 9,
    }
    frame = samples(given)
    found = hidden_gradients(frame, by_name(frame))
    assert bool(found) == says
    if says:
        assert "blocks@0.1" in found[0] and "5 questions wrong" in found[0]
    given["apgd@0.1"] = [0] * 9
    frame = samples(given)
    assert not hidden_gradients(frame, by_name(frame))


def test_two_noises_without_the_gold():
    """What is right under two independent guesses is below guessing: only told where asked for."""
    draws = np.random.default_rng(0).integers(0, 2, (2, 400)).tolist()
    given = samples({"none": [1] * 400, "random@0.1": draws[0], "uniform@0.1": draws[1]})
    assert with_worst(given, GUESSES) is given
    assert with_worst(given, {}) is given
    asked = {"settings": {"loss": "sequence", "attacks": ["none", "random", "uniform", "worst"]}}
    found = with_worst(given, asked)
    assert worst(found, "0.1") == np.min(draws, axis=0).tolist()
    table = summarise(found).set_index(["task", "condition"])
    assert table.loc[("mean", "worst@0.1"), "acc"] < 0.35 < table.loc[("mean", "none"), "baseline"]


def of_scores(conditions):
    """Four-choice questions, gold first, with log-likelihoods of each condition."""
    rows = []
    for condition, questions in conditions.items():
        attack, _, label = condition.partition("@")
        for doc_id, scores in enumerate(questions):
            best = int(np.argmax(scores))
            row = {"task": "t", "doc_id": doc_id, "condition": condition, "attack": attack}
            row |= {"epsilon": float(label or 0), "n_choices": 4, "gold": [0], "prediction": best}
            row |= {"acc": float(best == 0), "log_likelihoods": list(scores), "cosine": 0.1}
            rows.append(row | {"acc_norm": np.nan})
    return pd.DataFrame(rows)


def test_no_outcome_looks_better_than_under_one_of_the_attacks():
    """The lowest of each by a loop over questions; a row of one attack alone would not do."""
    draw = np.random.default_rng(1)
    names = ("random@0.1", "fgsm@0.1", "bim@0.1", "fgsm@0.2", "bim@0.2")
    given = of_scores({name: draw.normal(-5, 2, (60, 4)).tolist() for name in ("none", *names)})
    found = with_worst(given, KNOWS)
    of_rows = {
        "gold_probability": gold_probability(given),
        "margin": gold_margin(given),
        "log_likelihood": given["log_likelihoods"].map(np.mean),
        "acc": given["acc"],
    }
    got = {**measured(found), "acc": found["acc"]}
    for label, counted in (("0.1", names[:3]), ("0.2", names)):
        here = found["condition"] == f"worst@{label}"
        for name, values in of_rows.items():
            for doc_id, value in zip(found["doc_id"][here], got[name][here], strict=True):
                same = (given["doc_id"] == doc_id) & given["condition"].isin(counted)
                assert value == values[same].min(), (label, name)
    # of no attack are all of them: the likeliest gold is not the one with the smallest margin
    rows = found[found["condition"] == "worst@0.2"]
    assert (gold_probability(rows) > rows["gold_probability"]).any()
    table = summarise(found).set_index(["task", "condition"]).loc["mean"]
    for column in ("gold_probability", "margin_change", "log_likelihood_change", "acc"):
        assert table.loc["worst@0.2", column] <= table.loc[list(names), column].min()


def test_a_worst_case_is_what_was_tried():
    frame = samples({"none": [1], "random@0.1": [1], "fgsm@0.1": [1], "bim@0.1": [1]})
    less = samples({"none": [1], "random@0.1": [1], "fgsm@0.1": [1]})
    known = conditions(frame, KNOWS)
    assert known["worst@0.1"] == conditions(frame, KNOWS)["worst@0.1"]
    assert known["worst@0.1"] != conditions(less, KNOWS)["worst@0.1"]
    more = {"settings": {"loss": "choice", "steps": 20}}
    ((name, here, there),) = known["worst@0.1"].differences(conditions(frame, more)["worst@0.1"])
    assert (name, here, there) == ("steps", 10, 20)
    # no attack in steps is there
    assert conditions(less, KNOWS)["worst@0.1"] == conditions(less, more)["worst@0.1"]


@pytest.mark.parametrize(
    "attacks", ["worst", "none,worst", "none,fgsm,worst", "fgsm,reversed,worst"]
)
def test_a_worst_case_of_one_attack_is_refused(attacks):
    with pytest.raises(UsageError, match=f"attacks={attacks}: worst needs two attacks"):
        Plan(attacks=attacks)
    assert "worst" in Plan(attacks="fgsm,worst", epsilons="0.1,0.2").attacks
    assert [c.attack for c in Plan(attacks="none,worst,fgsm,bim").conditions] == [
        "none",
        "fgsm",
        "bim",
    ]
