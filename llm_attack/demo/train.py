"""Make the demo's tokenizer and model: `python -m llm_attack.demo.train --output DIR`.

The tokenizer splits words. The model is a Llama of 0.9 M parameters, trained from the start on the
text of the little world. This takes five minutes on one CPU core. Equal seeds, torch versions and
numbers of threads give equal bytes. Needs torch, transformers and tokenizers.

Every text is one sequence, like a request of lm-eval. The tokenizer adds no `<s>` at the start,
like that of GPT-2, because releases of lm-eval differ in whether they ask for it. The model knows
this token, for requests with an empty context. The weights are stored in float16 to keep the folder
small. `config.json` says float32, and the model computes in it.
"""

import argparse
import copy
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .grammar import FACTORS, RELATIONS
from .questions import training_texts
from .world import SEED, World

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
WORD = r"\n|\w+|[^\w\s]"
MAX_LENGTH = 128


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for every word of `texts`, punctuation mark and line break.

    Words are cut by a rule that never looks ahead of a blank, so the tokens of a text begin with
    the tokens of any of its prefixes that end at a word.
    """
    cut = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    words = sorted({word for text in texts for word, _ in cut.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = cut
    # Joins with blanks, then takes away those before punctuation and around line breaks.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=True),
            decoders.Fuse(),
            decoders.Replace(" \n ", "\n"),
            decoders.Replace(" :", ":"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


def all_words() -> list[str]:
    """Every pattern and value of the world. So the words do not depend on the sampled texts."""
    texts = [word for factor in FACTORS.values() for word in factor.values]
    return texts + [word for relation in RELATIONS for word in relation.values + relation.past]


def make_model(
    vocabulary: int, tokenizer: PreTrainedTokenizerFast, hidden: int = 128
) -> LlamaForCausalLM:
    """An untrained Llama of this width, a multiple of 8, with the standard initialisation."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8 * math.ceil(hidden / 3),
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.02,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int
) -> list[torch.Tensor]:
    """The texts as batches of token ids (batch, sequence)."""
    rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    # See above: `<s>` is rare, but not unknown.
    rows[::10] = [[tokenizer.bos_token_id, *ids] for ids in rows[::10]]
    return padded(rows, tokenizer.pad_token_id, batch_size, seed)


def padded(rows: list[list[int]], pad: int, batch_size: int, seed: int) -> list[torch.Tensor]:
    """Batches of rows of token ids. Rows of a batch have similar lengths, to avoid padding."""
    result = []
    # Sorted by length within a stretch of 16 batches only, and the batches shuffled again: what
    # the model sees stays as mixed as the text is.
    for start in range(0, len(rows), 16 * batch_size):
        stretch = sorted(rows[start : start + 16 * batch_size], key=len)
        for i in range(0, len(stretch), batch_size):
            some = [torch.tensor(row) for row in stretch[i : i + batch_size]]
            result.append(pad_sequence(some, True, pad))
    random.Random(seed).shuffle(result)
    return result


def train(
    model: LlamaForCausalLM,
    data: list[torch.Tensor],
    lr: float,
    embedding_lr: float,
    after: Callable[[int], None] = lambda step: None,
    backward: Callable[[Any, torch.Tensor], float] | None = None,
    bar: bool = True,
) -> list[float]:
    """Trains for one pass over `data`, without a loss on padding. Returns the loss of every step.

    Args:
        model: the model; weights that require no gradient stay as they are.
        data: batches of token ids, (batch, sequence).
        lr: largest learning rate of the weights except the embedding.
        embedding_lr: that of the embedding.
        after: called with the number of each step, from 1.
        backward: (model, ids) -> loss. It adds the gradients of the weights. The default is the
            cross-entropy.
        bar: whether to show a progress bar.
    """
    embeddings = model.get_input_embeddings().weight
    pad = int(model.config.pad_token_id or 0)
    others = [p for p in model.parameters() if p is not embeddings and p.requires_grad]

    def plain(model: Any, ids: torch.Tensor) -> float:
        # Padding comes after the text, so causal attention does not see it.
        logits = model(input_ids=ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad)
        loss.backward()
        return loss.item()

    backward = backward or plain
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim > 1], "lr": lr, "weight_decay": 0.1},
            {"params": [p for p in others if p.ndim == 1], "lr": lr, "weight_decay": 0.0},
            {"params": [embeddings], "lr": embedding_lr, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / 100)
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / len(data))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses: list[float] = []
    model.train()
    for ids in (shown := tqdm(data, desc="training", unit="step", disable=not bar)):
        optimizer.zero_grad(set_to_none=True)
        losses.append(backward(model, ids))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        shown.set_postfix(loss=f"{losses[-1]:.3f}")
        after(len(losses))
    return losses


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the folder that `from_pretrained` reads: float16 on disk, float32 when loaded."""
    copy.deepcopy(model).eval().half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    # The file is readable only for its owner, and an installed package must be readable for all.
    (output / "model.safetensors").chmod(0o644)
    # Also in the words of transformers 4, so it can read the files of transformers 5.
    _edit(output / "config.json", dtype="float32", torch_dtype="float32")
    _edit(output / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _edit(file: Path, **settings: str) -> None:
    """Set keys of a JSON file."""
    text = json.dumps(json.loads(file.read_text()) | settings, indent=2, sort_keys=True)
    file.write_text(text + "\n")


def main(argv: list[str] | None = None) -> None:
    """Make the model, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=SEED, help="of the world, text and weights")
    parser.add_argument("--weights-seed", type=int, help="of the weights and the order, if another")
    parser.add_argument("--hidden", type=int, default=128, help="width, a multiple of 8")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--embedding-lr", type=float, default=7e-4)
    parser.add_argument(
        "--checkpoints", type=int, default=0, help="kept in OUTPUT/step...: so many, evenly spaced"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads; part of the result")
    args = parser.parse_args(argv)

    of_weights = args.seed if args.weights_seed is None else args.weights_seed
    torch.manual_seed(of_weights)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    world = World(args.seed)
    texts = list(training_texts(world, args.steps * args.batch_size))
    tokenizer = make_tokenizer(texts + all_words())
    model = make_model(len(tokenizer), tokenizer, args.hidden)
    data = batches(texts, tokenizer, args.batch_size, of_weights)
    kept = {round((i + 1) * len(data) / args.checkpoints) for i in range(args.checkpoints)}

    def keep(step: int) -> None:
        if step in kept:
            save(model, tokenizer, args.output / f"step{step}")

    losses = train(model, data, args.lr, args.embedding_lr, keep)
    rms = model.model.embed_tokens.weight.detach().square().mean().sqrt().item()
    save(model, tokenizer, args.output)
    last = sum(losses[-50:]) / len(losses[-50:])
    print(f"loss of the last 50 steps {last:.4f}, embedding RMS {rms:.4f}")
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens: {args.output}")


if __name__ == "__main__":
    main()
