"""The cost of `llm-attack run` beyond the engine: durable batches, judgement, outputs.

    python benchmarks/suite.py --model demo --tasks demo_six --limit 100

One model answers the same batches in turns: in a bare pass of the engine, and in a whole run. The
first ratio leaves out costs that do not grow with the number of questions (imports and loading the
model). A tiny model is the worst case, because its engine does little work per question.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from llm_attack.base.record import hardware, versions, write_json
from llm_attack.harness.patches import without_bars
from llm_attack.lm.network.hook import frozen
from llm_attack.suite.evaluate import save, silence
from llm_attack.suite.plan import Plan
from llm_attack.suite.run.execute import Prepared, execute, prepare


def bare(prepared: Prepared) -> dict[str, float]:
    """Seconds of the engine by itself."""
    start = time.perf_counter()
    with frozen(prepared.lm.model):
        for _ in prepared.lm.engine.answers(work.batch for work in prepared.work):
            pass
    return {"engine": time.perf_counter() - start}


def whole(prepared: Prepared, console: Console) -> dict[str, float]:
    """Seconds of the parts of a run. `answers` is the engine, and storing its results."""
    with tempfile.TemporaryDirectory() as folder:
        result = execute(prepared, Path(folder), "quiet", console)
        assert result is not None
        seconds = dict(result.run["timings"]["seconds"])
        start = time.perf_counter()
        save(result, Path(folder), [])
        seconds["outputs"] = time.perf_counter() - start
    return seconds


@click.command(context_settings={"show_default": True})
@click.option("--model", default="demo")
@click.option("--tasks", default="demo_six")
@click.option("--limit", default=100.0)
@click.option("--repeats", default=3, help="Number of runs; the median is reported.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file.")
def main(model: str, tasks: str, limit: float, repeats: int, output: Path | None) -> None:
    """A run against a bare pass of the engine."""
    console = Console()
    silence()
    with without_bars():
        prepared = prepare(Plan(model=model, tasks=tasks, limit=limit), "quiet", console)
        bare(prepared)  # warms up
        runs = [bare(prepared) | whole(prepared, console) for _ in range(repeats)]
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    engine = median.pop("engine")
    computed = median["answers"] + median["judgement"]
    ratios: dict[str, Any] = {
        "answers": median["answers"] / engine - 1,
        "answers and judgement": computed / engine - 1,
        "and requests": (computed + median["requests"]) / engine - 1,
        "everything": sum(median.values()) / engine - 1,
    }
    console.print(f"{model}, {len(prepared.requests)} requests: engine {engine:.2f} s")
    for name, seconds in median.items():
        console.print(f"  {name}: {seconds:.2f} s")
    for name, share in ratios.items():
        console.print(f"over the engine, {name}: {share:+.1%}")
    if output is not None:
        content = {"seconds": {"engine": engine, **median}, "over_engine": ratios, "runs": runs}
        settings = {"model": model, "tasks": tasks, "limit": limit, "repeats": repeats}
        write_json(output, {**settings, **content, "hardware": hardware(), "versions": versions()})


if __name__ == "__main__":
    main()
