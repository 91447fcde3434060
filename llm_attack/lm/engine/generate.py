"""Generation from attacked prompts. The perturbation is inserted once, at prefill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from llm_attack.lm.engine.clean import Needs
from llm_attack.lm.engine.engine import Engine
from llm_attack.lm.network.hook import edit_output
from llm_attack.lm.packing.pack import pack_rows
from llm_attack.lm.packing.questions import Question, Request


@contextmanager
def attacked_prompts(engine: Engine, context: Tensor, mask: Tensor) -> Iterator[dict[str, float]]:
    """While the context lasts, the first forward over `context` reads attacked prompts.

    The loss is the negative log-likelihood of each prompt (`sequence`). Each is attacked by itself.
    Yields the values to add to the sums of `Diagnostics`.

    Args:
        engine: an engine with one attack.
        context: (B, L) token ids, padded on the left.
        mask: (B, L), 0 on padding.
    """
    rows, length = context.shape
    prompts = [row[keep.bool()].tolist() for row, keep in zip(context, mask, strict=True)]
    questions = [Question([Request(tuple(prompt), 0)], [[0]]) for prompt in prompts]
    how: dict[str, Any] = {"whole": True, "positions": engine.threat.positions}
    pack = pack_rows(questions, engine.layout.pad, **how).to(engine.device)
    (attack,) = engine.attacks
    needs = replace(Needs.of([attack]), answers=False)
    adversarial, sums, _ = engine.prepared(pack, needs)[engine.scorer].attack(attack)
    prefilled = False

    def put(output: Tensor) -> Tensor:
        nonlocal prefilled
        if prefilled or output.shape[1] < length:
            return output
        prefilled = True
        output = output.clone()
        beams = output.shape[0] // rows
        for i, prompt in enumerate(prompts):
            attacked = adversarial[i, : len(prompt)].to(output)
            output[i * beams : (i + 1) * beams, -len(prompt) :] = attacked
        return output

    with edit_output(engine.scorer.hookpoint, put):
        yield {name: float(value) for name, value in sums.items()}
