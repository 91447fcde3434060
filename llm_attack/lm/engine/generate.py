"""Generation from attacked prompts. The perturbation is inserted once, at prefill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from llm_attack.lm.engine.attacked import Attacked
from llm_attack.lm.engine.clean import Needs
from llm_attack.lm.engine.engine import Engine
from llm_attack.lm.network.hook import edit_output
from llm_attack.lm.packing.pack import pack_rows
from llm_attack.lm.packing.questions import Question


@dataclass(frozen=True)
class AttackedPrompts:
    """Prompts of a batch under every attack of an engine.

    Attributes:
        engine: the engine with the attacks.
        prompts: the tokens of each prompt, without padding.
        length: length of the rows with padding.
        ends: the result of each attack; None: the clean prompts.
        sums: for each attack, the values to add to the sums of `Diagnostics`.
        alignments: results of `AttackedBatch.alignment`, by the tokens of the prompt; empty if no
            attack needs this gradient.
    """

    engine: Engine
    prompts: list[list[int]]
    length: int
    ends: list[Attacked | None]
    sums: list[dict[str, float]]
    alignments: dict[tuple[int, ...], tuple[float, ...]]

    @contextmanager
    def under(self, condition: int) -> Iterator[None]:
        """While the context lasts, the first forward over the prompts reads attacked ones.

        Args:
            condition: the number of the attack.
        """
        end = self.ends[condition]
        if end is None:
            yield
            return
        prefilled = False

        def put(output: Tensor) -> Tensor:
            nonlocal prefilled
            if prefilled or output.shape[1] < self.length:
                return output
            prefilled = True
            output = output.clone()
            beams = output.shape[0] // len(self.prompts)
            for i, prompt in enumerate(self.prompts):
                attacked = end.x[i, : len(prompt)].to(output)
                output[i * beams : (i + 1) * beams, -len(prompt) :] = attacked
            return output

        with edit_output(self.engine.scorers[condition].hookpoint, put):
            yield


def attacked_prompts(
    engine: Engine, context: Tensor, mask: Tensor, texts: Tensor | None = None
) -> AttackedPrompts:
    """Attacks each prompt by itself. The loss is the negative log-likelihood of the prompt.

    An encoder-decoder model does not predict its prompt. Its loss is the negative log-likelihood of
    the text that it writes without an attack.

    Args:
        engine: the engine with the attacks. Its loss reads all tokens of a request
            (`LossKind.whole`).
        context: (B, L) token ids, padded on the left.
        mask: (B, L), 0 on padding.
        texts: (B, T) tokens of the decoder without an attack; None: the model has no decoder.
    """
    prompts = [row[keep.bool()].tolist() for row, keep in zip(context, mask, strict=True)]
    if engine.clean:
        nothing: list[Any] = [None] * len(engine.attacks)
        return AttackedPrompts(
            engine, prompts, context.shape[1], nothing, [{} for _ in nothing], {}
        )
    written = [[]] * len(prompts) if texts is None else texts.tolist()
    requests = map(engine.scorer.prompt, prompts, written)
    questions = [Question([request], [[0]]) for request in requests]
    how: dict[str, Any] = {"whole": True, "positions": engine.threat.positions}
    pack = pack_rows(questions, engine.layout.pad, **how).to(engine.device)
    needs = replace(Needs.of(engine.attacks), answers=False)
    batches = engine.prepared(pack, needs)
    ends = engine.ends(batches)
    alignments = {}
    if needs.gradient:
        rows = batches[engine.scorers[0]].alignment(engine.attacks[0]).tolist()
        alignments = {tuple(p): tuple(row) for p, row in zip(prompts, rows, strict=True)}
    sums = [
        {} if end is None else {name: float(value) for name, value in end.sums.items()}
        for end in ends
    ]
    return AttackedPrompts(engine, prompts, context.shape[1], ends, sums, alignments)
