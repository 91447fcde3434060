"""Makes two relatives of the bundled model, for transfers between models of one embedding space.

    python benchmarks/variants.py -o out/variants

`int4` has the weights of all linear layers in the blocks rounded to 4 bits: 15 levels for each
output channel, from minus to plus its largest weight. Its embedding is that of the bundled model.
`tuned` is the bundled model after some further steps on text of the same little world.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_attack.base.folder import check_writable, resolved
from llm_attack.demo import MODEL_PATH
from llm_attack.demo.questions import training_texts
from llm_attack.demo.train import batches, train
from llm_attack.demo.world import SEED, World

LEVELS = 7  # of each sign
RATE = 1e-3  # of the further training: half of the first one's


@torch.no_grad()
def round_weights(model: nn.Module) -> None:
    """Rounds the weights of the linear layers in the blocks of a Llama, in place."""
    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            step = layer.weight.abs().amax(1, keepdim=True) / LEVELS
            layer.weight.copy_((layer.weight / step).round() * step)


@click.command()
@click.option("-o", "--output", required=True, help="Folder that gets both models.")
@click.option("--steps", default=60, show_default=True, help="Further steps of training.")
def main(output: str, steps: int) -> None:
    """Make the models int4 and tuned."""
    folder: Path = resolved(output)
    check_writable(folder)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    for name in ("int4", "tuned"):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(MODEL_PATH).float()
        if name == "int4":
            round_weights(model)
        else:
            texts = list(training_texts(World(SEED), 64 * steps))
            train(model, batches(texts, tokenizer, 64, 1), RATE, RATE / 3)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    print(f"{folder}: int4, tuned")


if __name__ == "__main__":
    main()
