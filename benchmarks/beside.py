"""Compares the default attack with other programs for the same: FGSM, each request by itself.

The programs are the clean pass of stock `hf`, ours, thirty lines of transformers (`plain_fgsm.py`)
and torchattacks. They take turns in one process, over the same requests. The measure is processor
time; run it on one thread. Ratios are those of consecutive turns, so other load on the machine
affects both.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import plain_fgsm
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.requests import encode
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.settings import AttackSettings

Answers = list[tuple[float, bool]]

OTHERS = ("plain", "torchattacks")
OURS = "fgsm own"
BATCH = 8


class _Unit(nn.Module):
    """A model of embeddings in the unit cube, to which torchattacks clamps.

    Embeddings are `low` + `width` * x. Logits are (B, V, L), the form for cross-entropy.
    """

    def __init__(self, model: Any, low: float, width: float) -> None:
        super().__init__()
        self.model, self.low, self.width = model, low, width

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs_embeds=self.low + self.width * x).logits
        return logits.transpose(1, 2)


def torchattacks_fgsm(model: Any, epsilon: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`torchattacks.FGSM` as the step of `plain_fgsm.answers`."""
    import torchattacks

    weight = model.get_input_embeddings().weight
    # a power of two, so there is hardly any rounding in either direction
    width = 2.0 ** math.ceil(math.log2(2 * (float(weight.abs().max()) + epsilon)))
    wrapped = _Unit(model, -width / 2, width).eval()
    attack = torchattacks.FGSM(wrapped, eps=epsilon / width)

    def step(x: Tensor, target: Tensor, real: Tensor) -> Tensor:
        labels = target.masked_fill(~real, -100)  # cross-entropy leaves these out
        return wrapped.low + width * attack(x / width + 0.5, labels)

    return step


def runs_of(
    lm: AttackedHFLM, ours: AttackedHFLM, requests: list[Instance], others: Sequence[str]
) -> dict[str, Callable[[], Answers]]:
    """The programs to measure, by name; each answers `requests`."""
    model = lm.model
    for scorer in ours.engine.scorers:
        scorer.nearest = None  # a diagnostic that only we compute
    stock = HFLM(model, tokenizer=lm.tokenizer, batch_size=BATCH, device=str(lm.device))
    encoded = [(r.tokens, r.n_continuation) for r in encode(lm, requests)]
    epsilon = ours.attack.epsilon
    found: dict[str, Callable[[], Answers]] = {
        "stock": lambda: stock.loglikelihood(requests, disable_tqdm=True),
        OURS: lambda: ours.loglikelihood(requests, disable_tqdm=True),
    }
    steps = {"plain": None, "torchattacks": torchattacks_fgsm}

    def by(step: Any) -> Callable[[], Answers]:
        def run() -> Answers:
            with frozen(model):
                of_model = step and step(model, epsilon)
                answered: Answers = plain_fgsm.answers(model, encoded, epsilon, BATCH, of_model)
                return answered

        return run

    return found | {name: by(steps[name]) for name in others}


def measure(runs: dict[str, Callable[[], Answers]], turns: int) -> dict[str, Any]:
    """Seconds of each program, ratios to stock and of ours to others, differences of answers."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    answers: dict[str, Answers] = {}
    for turn in range(turns + 1):  # the first turn warms up
        for name, run in runs.items():
            start = time.process_time()
            answers[name] = run()
            if turn:
                seconds[name].append(time.process_time() - start)

    def ratio(name: str, to: str) -> list[float]:
        ratios = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
        return [statistics.median(ratios), min(ratios), max(ratios)]

    attacked = [name for name in runs if name != "stock"]
    return {
        "seconds": seconds,
        "times_stock": {name: ratio(name, "stock") for name in attacked},
        "ours_to": {name: ratio(OURS, name) for name in attacked if name != OURS},
        "difference": {
            name: max(abs(a[0] - b[0]) for a, b in zip(answers[OURS], answers[name], strict=True))
            for name in attacked
            if name != OURS
        },
    }


def beside(
    lm: AttackedHFLM,
    ours: Callable[[list[Instance]], AttackedHFLM],
    requests: dict[str, list[Instance]],
    others: Sequence[str],
    turns: int,
    console: Console,
) -> list[dict[str, Any]]:
    """Measures each task, and prints the table."""
    rows = []
    for task, of_task in requests.items():
        runs = runs_of(lm, ours(of_task), of_task, others)
        rows.append({"task": task, "requests": len(of_task), **measure(runs, turns)})
        console.print(f"{task}: {rows[-1]['times_stock']}")
    table = Table("task", title="FGSM, own context: processor time, median (least - most)")
    for name in (OURS, *others):
        table.add_column(f"{name}, of stock's clean pass", justify="right")
    for name in others:
        table.add_column(f"ours, of {name}", justify="right")
        table.add_column(f"largest difference from {name}, nats", justify="right")
    for row in rows:
        cells = [_spread(row["times_stock"][name]) for name in (OURS, *others)]
        for name in others:
            cells += [_spread(row["ours_to"][name]), f"{row['difference'][name]:.1e}"]
        table.add_row(row["task"], *cells)
    means = [_mean(rows, "times_stock", name) for name in (OURS, *others)]
    for name in others:
        means += [_mean(rows, "ours_to", name), ""]
    table.add_section()
    table.add_row("mean", *means)
    console.print(table)
    return rows


def _spread(ratios: list[float]) -> str:
    return "{:.2f} ({:.2f} - {:.2f})".format(*ratios)


def _mean(rows: list[dict[str, Any]], what: str, name: str) -> str:
    return f"{statistics.mean(row[what][name][0] for row in rows):.2f}"


def settings() -> AttackSettings:
    """The default attack, at an amplitude that changes answers."""
    return AttackSettings("fgsm", epsilon="0.7rms")
