"""The time that choices save when they share a pass through the encoder and a row of the decoder.

    python benchmarks/decoder_rows.py

The network has the sizes of T5-small and random weights. The questions are made up, with four
choices each. Every time is a multiple of the clean pass of stock `hf`, over the same tokens. On one
thread it is processor time, which other programs disturb least.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from lm_eval.models.huggingface import HFLM
from shares import now
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from llm_attack.base.record import hardware, versions, write_json
from llm_attack.demo import MODEL_PATH
from llm_attack.harness.model import AttackedHFLM
from llm_attack.harness.seq2seq import truncated
from llm_attack.lm.packing.questions import Question

CHOICES = 4
ATTACKS: dict[str, dict[str, Any]] = {
    "none": {"attack": "none"},
    "fgsm, shared": {"attack": "fgsm", "epsilon": "0.1rms", "context": "shared"},
}


def made_up(questions: int, context: int, choice: int) -> list[list[tuple[list[int], list[int]]]]:
    """For each question, the tokens of the context and of each choice."""
    generator = torch.Generator().manual_seed(0)

    def drawn(n: int) -> list[int]:
        tokens: list[int] = torch.randint(4, 32000, (n,), generator=generator).tolist()
        return tokens

    made = []
    for _ in range(questions):
        start = drawn(context)
        made.append([(start, drawn(choice + 2 * i)) for i in range(CHOICES)])
    return made


def seconds(run: Callable[[], Any]) -> float:
    start = now()
    run()
    return now() - start


@click.command(context_settings={"show_default": True})
@click.option("--questions", default=12, help="Number of questions.")
@click.option("--context", default=80, help="Tokens of a context.")
@click.option("--choice", default=8, help="Tokens of the shortest choice.")
@click.option("--repeats", default=3, help="Number of turns; the median is reported.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON file.")
def main(questions: int, context: int, choice: int, repeats: int, output: Path | None) -> None:
    """Multiples of the clean pass of stock `hf`."""
    torch.manual_seed(0)
    config = T5Config(pad_token_id=0, decoder_start_token_id=0)  # the sizes of T5-small
    model = T5ForConditionalGeneration(config).eval()
    given: dict[str, Any] = {"tokenizer": AutoTokenizer.from_pretrained(MODEL_PATH)}
    given |= {"device": "cpu", "batch_size": 2 * CHOICES, "max_length": 512}
    asked = made_up(questions, context, choice)
    stock = HFLM(pretrained=model, backend="seq2seq", **given)
    flat = [(None, *pair) for pairs in asked for pair in pairs]
    runs: dict[str, Callable[[], Any]] = {
        "stock": lambda: stock._loglikelihood_tokens(flat, disable_tqdm=True)
    }
    for name, attack in ATTACKS.items():
        for packing in ("off", "auto"):
            lm = AttackedHFLM(model, packing=packing, **attack, **given)
            made = [
                Question([truncated(lm, *pair) for pair in pairs], [[i] for i in range(CHOICES)])
                for pairs in asked
            ]
            batches = lm.batches(made)
            runs[f"{name}, packing={packing}"] = lambda lm=lm, batches=batches: [
                *lm.answers(batches)
            ]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if turn:  # the first turn warms up
                times[name].append(taken / (times["stock"][-1] if name != "stock" else 1))
    found = {name: statistics.median(values) for name, values in times.items()}
    for name, value in found.items():
        print(f"{name:30} {value:.2f}{' s' if name == 'stock' else ''}")
    if output is not None:
        settings = {"questions": questions, "context": context, "choice": choice}
        settings |= {"choices": CHOICES, "threads": torch.get_num_threads(), "repeats": repeats}
        content = {"settings": settings, "ratios": found, "of_turns": times}
        write_json(output, content | {"hardware": hardware(), "versions": versions()})


if __name__ == "__main__":
    main()
