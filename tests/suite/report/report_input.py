"""Frames of an invented run, for the tests of the report: hostile text, odd numbers."""

import numpy as np
import pandas as pd

CONDITIONS = ["none", "random@0.01", "fgsm@0.01", "bim@0.01"]
HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<!-- <script> ]]> \" ' ` & &lt; &amp; ${1} {{ 1 }} {% x %}",
    "line separators \u2028 and \u2029, next line \x85, tab \t, return \r\n",
    "NUL \x00, escape \x1b[31m, delete \x7f, byte order mark \ufeff",
    "right to left \u202eoverride, שלום עולם, مرحبا",
    "astral 🦙, combining e\u0301",
    "汉字，标点。 zero\u200bwidth",
    "",
    "word " * 400,
]
WORDS = [
    *("river", "stone", "lamp", "green", "walk", "quickly", "seven", "under", "Paris", "salt"),
    *("İstanbul", "straße", "ΣΊΣΥΦΟΣ"),
]


def build(n=60, tasks=("piqa", "arc", "Wino"), conditions=CONDITIONS, seed=0):
    """Samples and questions, `n` a task, of two to five choices, some with two golds.

    Log-likelihoods have four decimals, as in the page, so that orders can be compared exactly. Few
    different values in places, so that there are ties; some are not finite.
    """
    rng = np.random.default_rng(seed)
    questions, samples = [], []
    for t, task in enumerate(tasks):
        words = rng.choice(WORDS, (n, 6, 3)).tolist()
        for k in range(n):
            n_choices = 2 + (k + t) % 4
            gold = [int(g) for g in rng.permutation(n_choices)[: 1 + (k % 7 == 0)]]
            said = [" ".join(few) for few in words[k][: n_choices + 1]]
            if t == 0 and k < len(HOSTILE):
                said = [HOSTILE[(k + i) % len(HOSTILE)] for i in range(n_choices + 1)]
            cosine = float(rng.normal(0, 0.05))
            place = {"task": task, "doc_id": 3 * k}
            questions.append({**place, "question": said[0], "choices": said[1:], "gold": gold})
            for c, condition in enumerate(conditions):
                values = rng.normal(-20, 3, n_choices).round(4 if k % 5 else 0)
                if k % 13 == 12 and c == 2:
                    values[0] = -np.inf if t else np.nan
                best = int(values.argmax())
                samples.append(
                    {
                        **place,
                        "condition": condition,
                        "attack": condition.split("@")[0],
                        "epsilon": float((condition + "@0").split("@")[1]),
                        "n_choices": n_choices,
                        "gold": gold,
                        "prediction": best,
                        "acc": float(best in gold),
                        "log_likelihoods": values.tolist(),
                        "cosine": cosine,
                    }
                )
    return pd.DataFrame(samples), pd.DataFrame(questions)


def table(rows, mean):
    """A frame of `table.csv`, from (task, condition, acc, drop, p_mcnemar_holm, verdict).

    Args:
        rows: those of the tasks.
        mean: for each condition, accuracy and drop.
    """
    names = ["task", "condition", "acc", "drop", "p_mcnemar_holm", "verdict"]
    means = [("mean", condition, *values, np.nan, None) for condition, values in mean.items()]
    frame = pd.DataFrame([*rows, *means], columns=names)
    frame["attack"] = frame["condition"].str.split("@").str[0]
    frame["epsilon"] = frame["condition"].str.split("@").str[1].astype(float).fillna(0.0)
    frame["n"] = 1300 * np.where(frame["task"] == "mean", frame["task"].nunique() - 1, 1)
    frame["baseline"] = 1 / 3
    attacked = frame["attack"] != "none"
    values = {"snr_db": 12.5, "log_likelihood_change": -1.5, "margin_change": -0.25}
    for name, value in values.items():
        frame[name] = np.where(attacked, value, np.nan)
    unknown = ["drop_low", "drop_high", "detectable", "lost", "gained"]
    frame[[*unknown, *(f"gold_probability_drop{end}" for end in ("", "_low", "_high"))]] = np.nan
    frame["acc_low"], frame["acc_high"] = frame["acc"] - 0.05, frame["acc"] + 0.05
    return frame


def table_of(samples):
    """A table whose accuracies are those of `samples`; its tests are not looked at."""
    acc = samples.groupby(["task", "condition"], sort=False)["acc"].mean()
    rows = [(*key, value, 1.0, 0.5, "above guessing") for key, value in acc.items()]
    return table(
        rows, {c: (a, 1.0) for c, a in acc.groupby("condition", sort=False).mean().items()}
    )
