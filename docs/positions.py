"""The tables of `where.md`: accuracy if the attack perturbs only parts of the prompt.

    python docs/positions.py --output results/where/positions-demo

It evaluates a model once for each part, with few-shot examples, because otherwise the question
would be the whole prompt. It writes `positions.csv` and `positions.md` into the folder.
"""

from __future__ import annotations

from pathlib import Path

import click
import pandas as pd
from rich.console import Console

from llm_attack import Plan, evaluate
from llm_attack.base.record import write_text
from llm_attack.lm.packing.positions import NAMED
from llm_attack.suite.analysis.summary import MEAN
from llm_attack.suite.plan import WORST
from llm_attack.suite.report.tables import Cells, csv


def cells(frame: pd.DataFrame) -> Cells:
    """The accuracies, with a row for each part and a column for each condition."""
    conditions = list(frame["condition"].unique())
    rows = []
    for part, of_part in frame.groupby("positions", sort=False):
        of = of_part.set_index("condition")
        rows.append([str(part), *(f"{of.loc[c, 'acc']:.3f}" for c in conditions)])
    notes = [f"mean accuracy over tasks; {frame['n'].iloc[0]} questions"]
    return Cells(["positions", *conditions], rows, notes)


@click.command(context_settings={"show_default": True})
@click.option("--model", default="demo")
@click.option("--tasks", default="demo_six")
@click.option("--epsilons", default="0.05rms")
@click.option("--attacks", default="none,random,fgsm")
@click.option("--loss", default="choice")
@click.option("--num_fewshot", default=2)
@click.option("--limit", type=int)
@click.option("--batch_size", default="auto")
@click.option("--device")
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(output: Path, **settings: object) -> None:
    """Accuracy under attack at all tokens, context, continuation, question, all but the first."""
    parts = []
    for part in NAMED:
        result = evaluate(Plan(positions=part, **settings), progress="quiet")  # type: ignore[arg-type]
        found = result.table
        mean = found[(found["task"] == MEAN) & (found["attack"] != WORST)]
        kept = ["condition", "epsilon", "snr_db", "n", "acc", "acc_low", "acc_high", "drop"]
        parts.append(mean[kept].assign(positions=part))
    frame = pd.concat(parts, ignore_index=True)
    shown = cells(frame)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "positions.csv", csv(frame[["positions", *kept]]))
    write_text(output / "positions.md", shown.markdown())
    Console().print(shown.rich(f"{result.run['model_name']}: accuracy by what is perturbed"))


if __name__ == "__main__":
    main()
