"""Compares `attack=none` with stock lm-eval's `hf`, request by request, and stock `hf` with itself.

    python benchmarks/equality.py --model_args pretrained=FOLDER,gguf_file=NAME --limit 167

There are three evaluations through lm-eval: stock with batch size 16, stock with batch size 1, and
ours. `--float64` adds a fourth, stock in float64. It shows which of the others is nearer to the
truth.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import click
import lm_eval
import numpy as np
from rich.console import Console
from rich.table import Table

from llm_attack.base.record import hardware, versions, write_json
from llm_attack.harness.tasks import look_up

SIDES: dict[str, tuple[str, str, int | str]] = {
    "stock, batches of 16": ("hf", "", 16),
    "stock, batches of 1": ("hf", "", 1),
    "attack=none": ("attacked-hf", ",attack=none", "auto"),
}
EXACT: dict[str, tuple[str, str, int | str]] = {"stock, float64": ("hf", ",dtype=float64", 16)}
METRICS = ("acc", "acc_norm")


def evaluate(side: str, model_args: str, cache: Path | None, **arguments: Any) -> dict[str, Any]:
    """Answers (requests, 2): log-likelihood, greedy; judgements (questions, metrics); accuracies.

    With `cache`, answers of lm-eval from before an interruption are reused.
    """
    model, more, batch_size = (SIDES | EXACT)[side]
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=model_args + more,
        batch_size=batch_size,
        use_cache=None if cache is None else str(cache / side.replace(" ", "-")),
        **arguments,
    )
    assert found is not None
    samples = [sample for task in sorted(found["samples"]) for sample in found["samples"][task]]
    answers = [response[0] for sample in samples for response in sample["resps"]]
    judged = [[float(sample.get(metric, -1)) for metric in METRICS] for sample in samples]
    return {
        "answers": np.array(answers, dtype=float),
        "judged": np.array(judged),
        "accuracies": {
            task: {
                key.partition(",")[0]: value for key, value in row.items() if key.startswith("acc")
            }
            for task, row in found["results"].items()
        },
    }


def compare(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """The differences between two evaluations of the same requests."""
    difference = np.abs(one["answers"][:, 0] - other["answers"][:, 0])
    return {
        "largest": float(difference.max()),
        "mean": float(difference.mean()),
        "greedy_flips": int((one["answers"][:, 1] != other["answers"][:, 1]).sum()),
        "questions_judged_differently": int((one["judged"] != other["judged"]).any(-1).sum()),
    }


@click.command(context_settings={"show_default": True})
@click.option("--model_args", required=True, help="As of lm_eval --model hf.")
@click.option("--tasks", default="arc_challenge,arc_easy,hellaswag,openbookqa,piqa,winogrande")
@click.option("--limit", default=167, help="Questions per task.")
@click.option("--device", default="cpu")
@click.option("--float64", "exact", is_flag=True, help="Stock in float64, too.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder to resume from.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON file.")
def main(
    model_args: str,
    tasks: str,
    limit: int,
    device: str,
    exact: bool,
    cache: Path | None,
    output: Path | None,
) -> None:
    """attack=none against stock hf, and stock against itself."""
    names = tasks.split(",")
    manager, _ = look_up(names)
    arguments = {"tasks": names, "task_manager": manager, "limit": limit, "device": device}
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    sides = [*SIDES, *EXACT] if exact else SIDES
    found = {side: evaluate(side, model_args, cache, **arguments) for side in sides}
    (first, *_) = found.values()
    sizes = {"requests": len(first["answers"]), "questions": len(first["judged"])}
    pairs = {f"{a} / {b}": compare(found[a], found[b]) for a, b in combinations(found, 2)}
    table = Table(title="{requests} requests of {questions} questions".format(**sizes))
    for name in ("", "largest", "mean", "greedy flips", "judged differently"):
        table.add_column(name, justify="left" if not name else "right")
    for name, row in pairs.items():
        table.add_row(name, *(f"{value:.3g}" for value in row.values()))
    Console().print(table)
    if output is not None:
        accuracies = {side: row["accuracies"] for side, row in found.items()}
        settings = {"model_args": model_args, "tasks": names, "limit": limit, **sizes}
        content = {"pairs": pairs, "accuracies": accuracies}
        write_json(output, {**settings, **content, "hardware": hardware(), "versions": versions()})


if __name__ == "__main__":
    main()
