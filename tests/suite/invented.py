"""Frames of an invented run: questions and samples with known accuracies, and with guesses."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd

SIX = {
    "demo_arc_challenge": (80, (4, 4, 4, 4, 4, 4, 4, 4, 3, 5)),
    "demo_arc_easy": (80, (4, 4, 4, 4, 4, 4, 4, 4, 3, 5)),
    "demo_hellaswag": (80, 4),
    "demo_openbookqa": (80, 4),
    "demo_piqa": (80, 2),
    "demo_winogrande": (80, 2),
}
SHIFTS = {"none": 3.0, "random@0.01": 2.7, "fgsm@0.01": 1.3, "bim@0.01": 0.0}


def build(tasks=None, conditions=None, *, seed=0, norm=True, cosine=True):
    """Returns (samples, questions) with the columns and dtypes of the stored frames.

    Args:
        tasks: name -> (number of questions, number of choices or several to take in turn).
        conditions: name -> how far the log-likelihood of the gold stands above the others' mean,
            in standard deviations: a number, or a list with one for each question.
        seed: of the draws.
        norm: whether the tasks have acc_norm.
        cosine: whether gradients were taken.
    """
    rng = np.random.default_rng(seed)
    questions, samples = [], []
    for task, (n, choices) in (SIX if tasks is None else tasks).items():
        counts = np.resize(choices, n)
        for doc_id, k in enumerate(counts.tolist()):
            gold = int(rng.integers(k))
            lengths = rng.integers(10, 60, k).astype(float)
            questions.append(
                {
                    "task": task,
                    "doc_id": doc_id,
                    "doc_hash": f"{task}-{doc_id}",
                    "n_choices": k,
                    "gold": [gold],
                    "question": f"question {doc_id}?",
                    "choices": [f"choice {i}" for i in range(k)],
                    "lengths": lengths.tolist() if norm else None,
                }
            )
            base = rng.normal(0, 1, k)
            similarity = float(rng.normal(-0.05, 0.03)) if cosine else None
            for condition, shift in (SHIFTS if conditions is None else conditions).items():
                attack, _, epsilon = condition.partition("@")
                values = base + (attack != "none") * rng.normal(0, 0.3, k)
                values[gold] += shift if np.isscalar(shift) else shift[doc_id]
                values = 6 * values - 40
                best, best_norm = int(values.argmax()), int((values / lengths).argmax())
                samples.append(
                    {
                        "task": task,
                        "doc_id": doc_id,
                        "condition": condition,
                        "attack": attack,
                        "epsilon": float(epsilon or 0),
                        "n_choices": k,
                        "gold": [gold],
                        "prediction": best,
                        "prediction_norm": best_norm if norm else None,
                        "acc": float(best == gold),
                        "acc_norm": float(best_norm == gold) if norm else None,
                        "log_likelihoods": values.tolist(),
                        "cosine": similarity,
                    }
                )
    return pd.DataFrame(samples), pd.DataFrame(questions)


def by_enumeration(chances):
    """Distribution of the number of right guesses, from all outcomes."""
    pmf = np.zeros(len(chances) + 1)
    for outcome in product((0, 1), repeat=len(chances)):
        pmf[sum(outcome)] += np.prod(
            [p if hit else 1 - p for p, hit in zip(chances, outcome, strict=True)]
        )
    return pmf
