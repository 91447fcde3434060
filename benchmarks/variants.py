"""Makes two relatives of a model, for transfers between models of one embedding space.

    python benchmarks/variants.py -o out/variants

`int4` has the weights of all linear layers in the blocks rounded to 4 bits: 15 levels for each
output channel, or for each group of inputs, from minus to plus its largest weight. Its embedding is
that of the model. `tuned` is the model after some further steps. The bundled model reads text of
its own little world, and another one the questions of ARC-Easy's training split with their answers.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from datasets import load_dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_attack.base.folder import check_writable, resolved
from llm_attack.demo import MODEL_PATH
from llm_attack.demo.questions import training_texts
from llm_attack.demo.train import batches, train
from llm_attack.demo.world import SEED, World
from llm_attack.harness.gguf import located

LEVELS = 7  # of each sign


@torch.no_grad()
def round_weights(model: nn.Module, group: int | None = None) -> None:
    """Rounds the weights of the linear layers in the blocks of a Llama, in place.

    Args:
        model: the model.
        group: number of successive inputs that share a scale; None: all of an output channel.
    """
    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.unflatten(1, (-1, group or layer.in_features))
            step = weight.abs().amax(-1, keepdim=True) / LEVELS
            layer.weight.copy_(((weight / step).round() * step).flatten(1))


def texts_for(model: str, n: int) -> list[str]:
    """Texts to train a model with."""
    if model == str(MODEL_PATH):
        return list(training_texts(World(SEED), n))
    questions = load_dataset("allenai/ai2_arc", "ARC-Easy", split="train").select(range(n))
    texts = []
    for q in questions:
        answer = q["choices"]["text"][q["choices"]["label"].index(q["answerKey"])]
        texts.append(f"Question: {q['question']}\nAnswer: {answer}")
    return texts


@click.command()
@click.option("-o", "--output", required=True, help="Folder that gets both models.")
@click.option("--model", default=str(MODEL_PATH), help="Folder or GGUF file. Default: demo.")
@click.option("--group", type=int, help="Inputs that share a scale. Default: all of a channel.")
@click.option("--steps", default=60, show_default=True, help="Further steps of training.")
@click.option("--texts", default=64, show_default=True, help="Texts of a step.")
@click.option("--rate", default=1e-3, show_default=True, help="Its learning rate.")
def main(output: str, model: str, group: int | None, steps: int, texts: int, rate: float) -> None:
    """Make the models int4 and tuned."""
    folder: Path = resolved(output)
    check_writable(folder)
    torch.set_num_threads(1)
    path, file = located(model, None)
    tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=file)
    for name in ("int4", "tuned"):
        torch.manual_seed(1)
        made = AutoModelForCausalLM.from_pretrained(path, gguf_file=file, dtype=torch.float32)
        if file is not None:  # transformers saves no model that it has read from such a file
            del made.config.quantization_config
            weights, made = made.state_dict(), AutoModelForCausalLM.from_config(made.config)
            made.load_state_dict(weights)
        made.config.pad_token_id = tokenizer.pad_token_id
        if name == "int4":
            round_weights(made, group)
        else:
            read = texts_for(model, texts * steps)
            train(made, batches(read, tokenizer, texts, 1), rate, rate / 3)
        made.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    print(f"{folder}: int4, tuned")


if __name__ == "__main__":
    main()
