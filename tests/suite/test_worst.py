"""The worst case over attacks, and gradients that are hidden: by hand."""

import numpy as np
import pandas as pd
import pytest

from llm_attack.suite.results import summarise
from llm_attack.suite.worst import hidden_gradients, with_worst


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
    found = with_worst(samples(given))
    assert worst(found, "0.1") == [1, 0, 0, 1, 0]
    assert worst(found, "0.2") == [1, 0, 0, 0, 0]
    assert len(found) == len(samples(given)) + 10
    # the answers are those of the attack that did it, the smallest first
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
    pd.testing.assert_frame_equal(with_worst(found), found)


def test_one_attack_alone_is_its_own_worst_case():
    given = samples({"none": [1, 1], "fgsm@0.1": [1, 0]})
    assert with_worst(given) is given


def test_norms_and_hookpoints_are_kept_apart():
    given = {
        "fgsm@0.1": [1, 1],
        "bim@0.1": [1, 0],
        "fgsm@0.1-l2": [0, 1],
        "bim@0.1-l2": [1, 1],
        "fgsm@0.1@model.layers.0": [1, 1],
        "bim@0.1@model.layers.0": [1, 1],
    }
    found = with_worst(samples(given))
    assert worst(found, "0.1") == [1, 0]
    assert worst(found, "0.1-l2") == [0, 1]
    assert worst(found, "0.1@model.layers.0") == [1, 1]


def test_acc_norm_has_a_worst_case_of_its_own():
    given = {"fgsm@0.1": [1, 0, 1], "bim@0.1": [1, 1, 1]}
    norms = {"fgsm@0.1": [1, 1, 0], "bim@0.1": [0, 1, 1]}
    found = with_worst(samples(given, norms))
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
    found = hidden_gradients(samples(given))
    assert bool(found) == says
    if says:
        assert "blocks@0.1" in found[0] and "5 questions wrong" in found[0]
    given["apgd@0.1"] = [0] * 9
    assert not hidden_gradients(samples(given))
