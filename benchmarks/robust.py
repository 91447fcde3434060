"""Tunes the bundled model against attacks, and measures what it costs, for docs/training.md.

    python benchmarks/robust.py -o out/robust

Each model is tuned by as many updates, and judged by attacks that it was not trained against: APGD
and FMN, which know the label, and the certificates of some. `front.csv` has a row for each model.
What is finished is left alone, so a stopped command can go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pandas as pd

from llm_attack import Plan, evaluate
from llm_attack.base.folder import check_writable, resolved
from llm_attack.base.record import as_csv, write_text
from llm_attack.suite.plan.training import Training
from llm_attack.suite.train import RECORD, tune

AGAINST = [
    *("none", "pgd@0.05rms", "pgd@0.1rms", "pgd@0.2rms", "pgd@0.4rms"),
    *("freelb@0.1rms", "freelb@0.2rms"),
]
CERTIFIED = ["none", "pgd@0.1rms", "pgd@0.2rms", "pgd@0.4rms"]
RADII = [0.0, 1.0, 1.5, 2.0]  # of the certified accuracy, in sigma
EPSILONS = ["0.05rms", "0.1rms", "0.2rms"]
JUDGES: dict[str, Any] = {
    "tasks": ["demo_arc_easy", "demo_hellaswag", "demo_winogrande"],
    "attacks": ["none", "apgd", "fmn"],
    "epsilons": EPSILONS,
    "epsilon_max": "0.5rms",
    "steps": 20,
    "loss": "choice",
}
VOTES: dict[str, Any] = {
    "tasks": "demo_arc_easy",
    "attacks": ["none"],
    "norm": "l2",
    "loss": "margin",
    "sigmas": ["0.4rms"],
    "draws": 400,
    "selection_draws": 50,
}


def finished(folder: Path, settings: dict[str, Any]) -> Path:
    """The folder of a run, which is carried out unless it is finished."""
    if not (folder / "table.csv").exists():
        evaluate(Plan(**settings), output=folder, progress="quiet")
    return folder


def row_of(against: str, run: Path, certified: Path | None) -> dict[str, Any]:
    """What the judges say of one model: means over tasks, with intervals."""
    table = pd.read_csv(run / "table.csv")
    mean = table[table["task"] == "mean"].set_index("condition")
    ends = ("", "_low", "_high")
    row: dict[str, Any] = {"against": against, "n": int(mean.loc["none", "n"])}
    for condition in ("none", *(f"apgd@{epsilon}" for epsilon in EPSILONS)):
        row |= {f"{condition}{end}": mean.loc[condition, f"acc{end}"] for end in ends}
    critical = pd.read_csv(run / "critical.csv").set_index("task").loc["mean"]
    unit = critical["epsilon_max"] / 0.5
    row |= {f"median{end}": critical[f"median{end}"] / unit for end in ends}
    if certified is not None:
        votes = pd.read_csv(certified / "certified.csv").set_index("radius_in_sigma")
        for radius in RADII:
            name, of_radius = f"certified@{radius:g}", votes.loc[radius]
            row |= {name: of_radius["certified"], f"{name}_low": of_radius["low"]}
            row[f"{name}_high"] = of_radius["high"]
    return row


@click.command()
@click.option("-o", "--output", required=True, help="Folder for models, runs and the table.")
@click.option("--updates", default=150, show_default=True, help="Updates of each tuning.")
@click.option("--limit", default=40, show_default=True, help="Questions of each task.")
@click.option("--certify", default=20, show_default=True, help="Questions with a certificate.")
@click.option("--against", multiple=True, default=AGAINST, show_default=True)
def main(output: str, updates: int, limit: int, certify: int, against: Sequence[str]) -> None:
    """Tune and judge each model."""
    folder: Path = resolved(output)
    check_writable(folder)
    rows = []
    for name in against:
        training, model = Training(name, updates=updates), folder / name
        if not (model / RECORD).exists():
            tune(training, training.plan({}), str(model), bar=False)
        of_model = {"model": str(model), "limit": limit}
        run = finished(folder / f"run-{name}", {**JUDGES, **of_model})
        certified = None
        if name in CERTIFIED:
            of_model["limit"] = certify
            certified = finished(folder / f"certified-{name}", {**VOTES, **of_model})
        rows.append(row_of(name, run, certified))
    write_text(folder / "front.csv", as_csv(pd.DataFrame(rows), "%.6f"))
    print(folder / "front.csv")


if __name__ == "__main__":
    main()
