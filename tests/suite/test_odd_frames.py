"""Unusual but legal frames: tables, texts and figures of them do not fail."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sketched import sketch

from llm_attack.attacks import ATTACKS
from llm_attack.suite import render
from llm_attack.suite.analysis import critical
from llm_attack.suite.analysis.equivalence import with_equivalence
from llm_attack.suite.analysis.summary import summarise
from llm_attack.suite.results import Result

AMPLITUDES = ("0.01", "0.1", "1e-30", "1e+30", "0")
NAMES = ("a", "b_c", "$x^{$_\\frac", " ", "_", "任务", "x" * 70, "a\x00b", "=1+1", "ta|sk")
VALUES = st.one_of(st.floats(-100, 0), st.sampled_from([-np.inf, np.nan, -1.0, -1.0, -2.0, -1e308]))


@st.composite
def runs(draw):
    """A run that never was, and of which only what must hold does."""
    attacks = draw(st.lists(st.sampled_from(["none", *ATTACKS]), min_size=1, max_size=5))
    conditions = {}
    for attack in dict.fromkeys(attacks):
        for epsilon in draw(st.sets(st.sampled_from(AMPLITUDES), min_size=1, max_size=3)):
            name = "none" if attack == "none" else f"{attack}@{epsilon}"
            conditions[name] = attack, 0.0 if attack == "none" else float(epsilon)
    tasks = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    norm, gradient, unit = (draw(st.booleans()) for _ in range(3))
    answers = draw(st.sampled_from([VALUES, st.just(-1.0), st.floats(-9, 0)]))
    known = draw(st.sampled_from([st.just(0.3), st.floats(0, 9), st.just(np.inf), st.just(np.nan)]))
    samples, questions = [], []
    for task in tasks:
        for doc_id in range(draw(st.sampled_from([1, 1, 2, 12]))):
            k = draw(st.integers(1, 4))
            gold = sorted(draw(st.sets(st.integers(0, k - 1), min_size=1)))
            lengths = np.arange(1.0, k + 1)
            cosine = draw(st.floats(-1, 1)) if gradient else None
            question = {"task": task, "doc_id": doc_id, "n_choices": k, "gold": gold}
            text = {"doc_hash": f"{task}{doc_id}", "question": "?", "choices": ["c"] * k}
            questions.append({**question, **text, "lengths": lengths.tolist() if norm else None})
            for condition, (attack, epsilon) in conditions.items():
                values = np.array(draw(st.lists(answers, min_size=k, max_size=k)))
                if attack == "none":  # which a run refuses
                    values = np.where(np.isfinite(values), values, -3.0)
                best, by_length = int(values.argmax()), int((values / lengths).argmax())
                searched = ATTACKS[attack].minimal
                share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0, np.inf]))
                samples.append(
                    {
                        **question,
                        "condition": condition,
                        "attack": attack,
                        "hookpoint": "embed",
                        "epsilon": epsilon,
                        "prediction": best,
                        "prediction_norm": by_length if norm else None,
                        "acc": float(best in gold),
                        "acc_norm": float(by_length in gold) if norm else None,
                        "log_likelihoods": values.tolist(),
                        "cosine": cosine,
                        "critical_epsilon": min(share * epsilon, epsilon) if searched else np.nan,
                        "first_order": draw(known) if gradient else np.nan,
                    }
                )
    types = dict.fromkeys(("acc_norm", "cosine", "critical_epsilon", "first_order"), "float")
    score = "acc_norm" if norm and draw(st.booleans()) else "acc"
    samples = pd.DataFrame(samples).astype({**types, "prediction_norm": "Int64"})
    samples = critical.judged(samples, score)
    infos = {
        name: {
            "attack": attack,
            "epsilon": epsilon,
            "epsilon_unit": "rms" if unit else "absolute",
            "epsilon_absolute": epsilon,
            "embedding_rms": 0.1,
            "snr_db": None,
            "zero_gradient_fraction": 0.0,
        }
        for name, (attack, epsilon) in conditions.items()
    }
    loss = draw(st.sampled_from(["sequence", "margin"]))
    run = {
        "settings": {"loss": loss, "score": score},
        "attacks": infos,
        "command": "",
        "model": "$",
    }
    return samples, pd.DataFrame(questions), run


def rendered(of, folder):
    samples, questions, run = of
    table = with_equivalence(summarise(samples, run["attacks"]), None)
    return render.render(Result(table, samples, questions, run, {}), folder, run)


LENIENT = [HealthCheck.too_slow, HealthCheck.data_too_large]


def told(of):
    """Every figure is made, though not drawn: most of what fails does so before."""
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(critical, "RESAMPLES", 20)
        sketch(patch)
        return rendered(of, Path(folder))


@settings(max_examples=3, suppress_health_check=LENIENT)
@given(runs())
def test_everything_is_told(of):
    assert told(of) == []


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=LENIENT)
@given(runs())
def test_everything_is_told_of_many(of):
    assert told(of) == []


@pytest.mark.slow
@settings(max_examples=15, suppress_health_check=LENIENT)
@given(runs())
def test_everything_is_drawn(of):
    with TemporaryDirectory() as folder:
        assert rendered(of, Path(folder)) == []
