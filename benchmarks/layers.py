"""The cost of a sweep over hookpoints, compared with a run for each of them.

    python benchmarks/layers.py --model demo --tasks demo_six --limit 100

One model answers the same questions in turns: one pass of the engine over all hookpoints, and one
pass for each. The sweep computes the clean answers and all gradients once, and starts at the
perturbed block.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import click
from rich.console import Console

from llm_attack.base.record import hardware, versions, write_json
from llm_attack.harness.patches import without_bars
from llm_attack.lm.engine.hookpoints import expand
from llm_attack.lm.network.hook import frozen
from llm_attack.suite.evaluate import silence
from llm_attack.suite.plan import Plan
from llm_attack.suite.run.execute import Prepared, prepare


def seconds(prepared: Prepared) -> float:
    """Seconds of a pass of the engine."""
    start = time.perf_counter()
    with frozen(prepared.lm.model):
        for _ in prepared.lm.engine.answers(work.batch for work in prepared.work):
            pass
    return time.perf_counter() - start


@click.command(context_settings={"show_default": True})
@click.option("--model", default="demo")
@click.option("--tasks", default="demo_six")
@click.option("--limit", default=100.0)
@click.option("--attacks", default="none,random,fgsm")
@click.option("--loss", default="choice")
@click.option("--hookpoints", default="embed,layers")
@click.option("--repeats", default=3, help="Number of runs; the median is reported.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file.")
def main(
    model: str,
    tasks: str,
    limit: float,
    attacks: str,
    loss: str,
    hookpoints: str,
    repeats: int,
    output: Path | None,
) -> None:
    """A sweep over hookpoints against a run for each."""
    console = Console()
    silence()
    plan = Plan(
        model=model,
        tasks=tasks,
        limit=limit,
        attacks=attacks,
        loss=loss,
        epsilons="0.1rms",
        hookpoints=hookpoints,
    )
    with without_bars():
        sweep = prepare(plan, "quiet", console)
        lm = sweep.lm
        names = expand(lm.model, plan.hookpoints)
        conditions = plan.conditions_at(names)
        runs = []
        for i in range(repeats + 1):  # the first pass warms up
            lm.use(*conditions)
            together = seconds(sweep)
            alone = []
            for name in names:
                lm.use(*plan.conditions_at([name]))
                alone.append(seconds(sweep))
            if i:
                runs.append({"sweep": together, "a run for each": sum(alone)})
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    ratio = median["a run for each"] / median["sweep"]
    console.print(
        f"{model}, {len(names)} hookpoints, {len(sweep.requests)} requests: sweep"
        f" {median['sweep']:.2f} s, a run for each {median['a run for each']:.2f} s: {ratio:.2f}x"
    )
    if output is not None:
        settings = {"model": Path(model).name, "tasks": tasks, "limit": limit, "attacks": attacks}
        settings |= {"hookpoints": hookpoints, "loss": loss}
        content = {"seconds": median, "ratio": ratio, "runs": runs}
        write_json(output, {**settings, **content, "hardware": hardware(), "versions": versions()})


if __name__ == "__main__":
    main()
