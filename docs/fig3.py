"""The tables of `paper/fig3.md`, from the stored samples of runs.

    python docs/fig3.py results/fig3/smollm2-135m

Prints Markdown: the paper's claims with their verdicts, what attacks cost against no attack, what
gradients cost against noise of the same amplitude, accuracy by both scores, which questions fall,
and whether perturbed embeddings are still nearest to their token.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
from scipy.stats import mannwhitneyu

from llm_attack.stats import ALPHA, chance_test, holm, wilson
from llm_attack.suite import results
from llm_attack.suite.analysis.outcomes import chances, gold_margin
from llm_attack.suite.analysis.pairs import paired
from llm_attack.suite.report.tables import Cells
from llm_attack.suite.results import Result
from llm_attack.suite.studies import claims

QUARTERS = ("smallest", "second", "third", "largest")


def differences(found: Result, pairs: list[tuple[str, str]]) -> pd.DataFrame:
    """Accuracy under b minus accuracy under a, for each pair of conditions (a, b); see `paired`."""
    parts = []
    for a, b in pairs:
        label = f"{b} − {a}"
        samples = [
            found.samples[found.samples["condition"] == condition].assign(condition=label)
            for condition in (a, b)
        ]
        parts.append(paired(samples[0], found.questions, samples[1], found.questions))
    return pd.concat(parts, ignore_index=True)


def table_of_differences(frame: pd.DataFrame) -> Cells:
    """A row per task and their mean, a column per pair; points with paired 95 % intervals."""
    labels = list(frame["condition"].unique())
    of = frame.set_index(["task", "condition"])
    rows = []
    for task in frame["task"].unique():
        cells = [of.loc[(task, label)] for label in labels]
        rows.append([task, *map(_difference, cells)])
    notes = [
        "percentage points, with paired 95 % intervals; * significant by an exact test, with Holm's"
        " correction over the tasks (for the mean, a stratified test)"
    ]
    return Cells(["task", *labels], rows, notes)


def _difference(row: pd.Series) -> str:
    p_value = row["p_mcnemar_holm"]
    star = " *" if pd.notna(p_value) and p_value <= 0.05 else ""
    ends = f"{row['difference_low']:+.1f} to {row['difference_high']:+.1f}"
    return f"{row['difference']:+.1f} ({ends}){star}"


def scores(found: Result) -> Cells:
    """Accuracy by each score of a task, and which accuracies differ from those of guesses."""
    conditions = list(found.samples["condition"].unique())
    tasks = found.samples["task"].unique()
    samples = found.samples.assign(chance=chances(found.samples))
    rows = {}
    for score in ("acc", "acc_norm"):
        known = samples[samples[score].notna()]
        for condition, group in known.groupby("condition", sort=False):
            of_tasks = dict(list(group.groupby("task", sort=False)))
            tests = [chance_test(int(of[score].sum()), of["chance"]) for of in of_tasks.values()]
            for (task, of), p_value in zip(of_tasks.items(), holm(tests), strict=True):
                accuracy, baseline = of[score].mean(), of["chance"].mean()
                mark = "↑" if accuracy > baseline else "↓"
                cell = f"{accuracy:.3f}{mark if p_value <= ALPHA else ''}"
                rows.setdefault((task, score), {"baseline": f"{baseline:.3f}"})[condition] = cell
    heading = [*conditions, "baseline"]
    both = [(task, score) for task in tasks for score in ("acc", "acc_norm")]
    cells = [[*of, *(rows[of][name] for name in heading)] for of in both if of in rows]
    note = (
        "↑ above guessing, ↓ below it: exact test, with Holm's correction over the tasks that have"
        " the score"
    )
    return Cells(["task", "score", *heading], cells, [note])


def falls(found: Result) -> Cells:
    """The questions right without an attack that each condition makes wrong, by clean margin."""
    samples = found.samples.assign(margin=gold_margin(found.samples))
    clean = samples[samples["condition"] == "none"].set_index(["task", "doc_id"])
    right = clean[clean["acc"] == 1]["margin"]
    ends = right.quantile([0.25, 0.5, 0.75]).tolist()
    bounds = [-np.inf, *ends, np.inf]
    rows = []
    for condition, group in samples.groupby("condition", sort=False):
        if condition == "none":
            continue
        lost = group.set_index(["task", "doc_id"])["acc"].loc[right.index] == 0
        cells = []
        for low, high in pairwise(bounds):
            inside = lost[(right > low) & (right <= high)]
            low_share, high_share = wilson(int(inside.sum()), len(inside))
            cells.append(f"{inside.mean():.0%} ({low_share:.0%}–{high_share:.0%})")
        kept_above = mannwhitneyu(right[~lost], right[lost]).statistic
        area = kept_above / ((~lost).sum() * lost.sum()) if lost.any() else np.nan
        rows.append([str(condition), f"{lost.sum()} of {len(lost)}", *cells, f"{area:.2f}"])
    heading = ["condition", "lost", *(f"{name} margins" for name in QUARTERS), "AUC"]
    quarters = ", ".join(f"{end:.2f}" for end in ends)
    notes = [
        "share lost of each quarter of the correct answers, by margin without an attack (bounds"
        f" {quarters} nats), with Wilson's 95 % interval",
        "AUC: probability that a kept question had a larger margin than a lost one",
    ]
    return Cells(heading, rows, notes)


def point(found: Result) -> Cells:
    """A table of the perturbation of the embeddings under each condition."""
    rows = []
    for condition, of in found.run["attacks"].items():
        if condition == "none":
            continue
        numbers: list[tuple[str, Any]] = [
            (".4g", of["epsilon_absolute"]),
            (".3f", of["epsilon_absolute"] / of["embedding_rms"]),
            (".3f", of["epsilon_absolute"] / of["signal_rms"]),
            (".1f", of["snr_db"]),
            (".2%", of["nearest_token_unchanged"]),
            (".2%", of["nearest_token_unchanged_linf"]),
        ]
        rows.append([condition, *(format(value, form) for form, value in numbers)])
    nearest = ["own token nearest, L2", "L-infinity"]
    heading = ["condition", "epsilon", "in RMS", "in RMS of the tokens", "SNR, dB", *nearest]
    attacked = [of for of in found.run["attacks"].values() if of["signal_rms"] is not None]
    matrix, tokens = attacked[0]["embedding_rms"], attacked[0]["signal_rms"]
    notes = [
        f"RMS: of the embedding matrix, {matrix:.3f}. This is the unit `rms` of epsilon",
        f"RMS of the tokens: over the attacked tokens, {tokens:.3f}. This is the signal of the SNR",
    ]
    return Cells(heading, rows, notes)


def against_noise(conditions: list[str]) -> list[tuple[str, str]]:
    """(random@e, attack@e) for every other attack."""
    labels = [condition.partition("@") for condition in conditions]
    return [
        (f"random@{epsilon}", f"{attack}@{epsilon}")
        for attack, _, epsilon in labels
        if attack not in ("none", "random") and f"random@{epsilon}" in conditions
    ]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Tables of the run in FOLDER."""
    found = results.load(folder)
    conditions = list(found.samples["condition"].unique())
    attacked = [("none", condition) for condition in conditions if condition != "none"]
    for title, cells in (
        ("The claims", claims.cells(claims.claims(found.samples))),
        ("Against no attack", table_of_differences(differences(found, attacked))),
        ("Against noise", table_of_differences(differences(found, against_noise(conditions)))),
        ("Both scores", scores(found)),
        ("Which questions fall", falls(found)),
        ("The embeddings", point(found)),
    ):
        print(f"### {title}\n\n{cells.markdown()}")


if __name__ == "__main__":
    main()
