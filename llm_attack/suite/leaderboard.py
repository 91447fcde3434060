"""A CSV file to which every run adds a row for each of its conditions."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from llm_attack.folder import claim_file
from llm_attack.record import without_formulas
from llm_attack.suite import tables
from llm_attack.suite.models import across
from llm_attack.suite.run import Result
from llm_attack.suite.summary import MEAN

_KEY = ["model", "weights", "tasks", "n", "loss", "positions", "hookpoint", "condition"]


def entries(runs: Mapping[str, Result]) -> pd.DataFrame:
    """Rows of a leaderboard: of each model and condition the mean over all tasks of its own run.

    Columns: `model`, `weights` (their hash), `tasks`, `n`, `loss`, `positions`, `hookpoint`,
    `condition`, `epsilon_relative`, clean and attacked accuracy, drop and p-values with their
    intervals, as in `across`, and `versions`: of this package, torch, transformers and lm-eval.
    """
    parts = []
    for name, of in runs.items():
        settings, attacks = of.run["settings"], of.run["attacks"]
        named = tables.named_by_score(of.table[of.table["task"] != MEAN])
        tasks = ",".join(named["task"].unique())
        found = across({name: of})
        versions = of.run.get("versions", {})
        used = ("llm-attack", "torch", "transformers", "lm-eval")
        parts.append(
            found.assign(
                weights=of.run["fingerprint"].get("weights", ""),
                tasks=tasks,
                loss=settings.get("loss"),
                positions=settings.get("positions", "all"),
                hookpoint=[
                    attacks.get(c, {}).get("hookpoint") or "embed" for c in found["condition"]
                ],
                versions=" ".join(f"{name}={versions.get(name, '')}" for name in used),
            )
        )
    frame = pd.concat(parts, ignore_index=True)
    # the score stands behind the names of the tasks: all leaderboards have the same columns
    rest = [name for name in frame if name not in (*_KEY, "versions", "score")]
    return frame[[*_KEY, *rest, "versions"]]


def with_entries(path: Path, runs: Mapping[str, Result]) -> str:
    """What a leaderboard holds, and at its end the rows of `runs`; nothing is written.

    A row of the same model, tasks and condition is replaced.

    Args:
        path: of the file; it need not exist.
        runs: by the names of the models.

    Raises:
        UsageError: there is a file that is no leaderboard.
    """
    new = tables.csv(entries(runs))
    claim_file(path, new.splitlines()[0], "leaderboard")
    texts = [path.read_text("utf-8"), new] if path.exists() and path.stat().st_size else [new]
    read = [pd.read_csv(io.StringIO(text), dtype=str, na_filter=False) for text in texts]
    both = pd.concat(read).drop_duplicates(_KEY, keep="last")
    both = both.assign(**without_formulas(both[[*_KEY, "versions"]]))  # also what was there
    return both.to_csv(index=False, lineterminator="\n")
