"""Word sentiment (Fig. 6): the angle between a word's embedding and the gradient of the loss there.

A word is a row of character ids; its embedding, the point, is the characters' vectors side by side,
with zeros after the end of the word. One hidden layer classifies it as negative, neutral or
positive. All seeds of a size train as one batched model, each on a split of its own, with one step
of Adam on all its training words per epoch.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from llm_attack.attacks import loss_gradient
from llm_attack.drawing import COLOURS, save_figure, style
from llm_attack.record import write_text
from llm_attack.theory.figures import shaded
from llm_attack.theory.settings import SentimentSettings
from llm_attack.theory.stacked import StackedMLP, cross_entropy, generators, stack
from llm_attack.theory.words import LABELS, encode, load_words

SPLITS = ("test", "train")
MEASURED = ("accuracy", "cosine_right", "cosine_wrong")


class SentimentModel(nn.Module):
    """Embedding and classifier of several seeds.

    Args:
        ids: number of character ids, padding included.
        length: characters in a word with its padding.
        size: numbers in the embedding of a character.
        width: units in the hidden layer.
        draws: one generator per seed.
    """

    def __init__(
        self, ids: int, length: int, size: int, width: int, draws: list[torch.Generator]
    ) -> None:
        super().__init__()
        self.table = nn.Parameter(stack(draws, lambda g: torch.randn(ids, size, generator=g)))
        self.classifier = StackedMLP((length * size, width, len(LABELS)), draws)

    def embed(self, ids: Tensor) -> Tensor:
        """The point (seeds, N, length, size) of words (seeds, N, length)."""
        seeds, vocabulary, _ = self.table.shape
        offset = torch.arange(seeds, device=ids.device)[:, None, None] * vocabulary
        padded = F.pad(self.table[:, 1:], (0, 0, 1, 0))  # id 0 is the zero vector, also in training
        return F.embedding(ids + offset, padded.flatten(0, 1))

    def forward(self, point: Tensor) -> Tensor:
        """Logits (seeds, N, 3) at a point."""
        return self.classifier(point.flatten(2))


def cosines(model: SentimentModel, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether words are classified rightly, and the cosine of their embedding and gradient.

    Args:
        model: of all seeds.
        ids: (seeds, N, length).
        labels: (seeds, N).

    Returns:
        Booleans and cosines, (seeds, N). Padding is no part of a word: it has no gradient.
    """
    point = model.embed(ids).detach()
    logits = []

    def loss(point: Tensor) -> Tensor:
        logits.append(model(point))
        return cross_entropy(logits[0], labels)

    gradient = loss_gradient(loss, point)
    steepness = (gradient.norm(dim=-1) * (ids > 0)).norm(dim=-1)
    length = point.flatten(2).norm(dim=-1)
    cosine = (point * gradient).flatten(2).sum(-1) / (length * steepness)
    return logits[0].argmax(-1) == labels, cosine


def summary(right: Tensor, cosine: Tensor) -> dict[str, list[float]]:
    """`MEASURED` of each seed; the mean over no words is NaN."""
    found = (
        right.double().mean(1),
        cosine.where(right, torch.nan),
        cosine.where(~right, torch.nan),
    )
    return {
        name: (value if value.dim() == 1 else value.nanmean(1)).tolist()
        for name, value in zip(MEASURED, found, strict=True)
    }


def run_size(words: pd.DataFrame, size: int, settings: SentimentSettings) -> pd.DataFrame:
    """Trains all seeds with one embedding size; measures before the first epoch and after each.

    Returns:
        A row for each epoch, split and seed: size, epoch, split, seed and `MEASURED`.
    """
    device = settings.device
    draws = generators(settings.seed, settings.seeds)
    n = len(words)
    order = stack(draws, lambda g: torch.randperm(n, generator=g)).to(device)
    ids, vocabulary = encode(words.word.tolist())
    labels = torch.tensor([LABELS.index(label) for label in words.label], device=device)
    ids, labels = ids.to(device)[order], labels[order]
    held_out = min(max(1, round(settings.test_share * n)), n - 1)
    parts = {"test": slice(held_out), "train": slice(held_out, None)}
    model = SentimentModel(vocabulary, ids.shape[-1], size, settings.width, draws).to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    tables = []
    bar = tqdm(range(settings.epochs + 1), f"fig6, size {size}", unit="epoch", disable=None)
    for epoch in bar:
        if epoch:
            optimiser.zero_grad()
            logits = model(model.embed(ids[:, held_out:]))
            cross_entropy(logits, labels[:, held_out:]).mean(1).sum().backward()
            optimiser.step()
        right, cosine = cosines(model, ids, labels)
        for split in SPLITS:
            part = parts[split]
            table = pd.DataFrame(summary(right[:, part], cosine[:, part]))
            known = {"size": size, "epoch": epoch, "split": split, "seed": seeds}
            tables.append(table.assign(**known))
    return pd.concat(tables, ignore_index=True)


def reproduce(settings: SentimentSettings, folder: Path) -> dict[str, Any]:
    """Runs the experiment; writes figure and curves.csv (mean, min, max over seeds).

    Returns:
        What the last epoch was like, for each size, split and seed, and seconds.
    """
    words = load_words(settings.words)
    seconds, tables = {}, []
    for size in settings.embedding_sizes:
        start = time.perf_counter()
        tables.append(run_size(words, size, settings))
        seconds[f"size {size}"] = time.perf_counter() - start
    table = pd.concat(tables, ignore_index=True)
    with style():
        save_figure(figure(table), folder)
    over_seeds = table.groupby(["size", "epoch", "split"])[list(MEASURED)].agg(
        ["mean", "min", "max"]
    )
    over_seeds.columns = ["_".join(names) for names in over_seeds.columns]
    write_text(folder / "curves.csv", over_seeds.to_csv(float_format="%.5g"))
    last = table[table.epoch == settings.epochs].groupby(["size", "split"])
    return {
        "words": words.groupby(["language", "label"]).size().unstack(fill_value=0).to_dict("index"),
        "last_epoch": {
            f"size {size}, {split}": {name: _numbers(part[name]) for name in MEASURED}
            for (size, split), part in last
        },
        "seconds": seconds,
    }


def _numbers(column: pd.Series) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [None if math.isnan(value) else round(value, 5) for value in column]


def figure(table: pd.DataFrame) -> Any:
    """The figure: a column for each size; cosines above, accuracies below; range over seeds."""
    from matplotlib.figure import Figure

    sizes = table["size"].unique()
    result = Figure(figsize=(1.3 + 2 * len(sizes), 4.2))
    axes = result.subplots(2, len(sizes), sharex=True, sharey="row", squeeze=False)
    right, wrong = COLOURS[0], COLOURS[3]
    for (above, below), size in zip(axes.T, sizes, strict=True):
        for split, line in zip(SPLITS, ("-", "--"), strict=True):
            part = table[(table["size"] == size) & (table.split == split)]
            shaded(above, part, "cosine_right", right, linestyle=line, label=f"right, {split}")
            shaded(above, part, "cosine_wrong", wrong, linestyle=line, label=f"wrong, {split}")
            shaded(below, part, "accuracy", COLOURS[6], linestyle=line, label=split)
        above.axhline(0, color="black", linewidth=0.8)
        above.set(title=f"embedding size {size}")
        below.axhline(1 / len(LABELS), color="black", linewidth=1, linestyle=":", label="chance")
        below.set(xlabel="epoch", xlim=(0, table.epoch.max()), ylim=(0, 1.02))
    axes[0, 0].set(ylabel="cosine of embedding\nand gradient")
    axes[1, 0].set(ylabel="accuracy")
    for row in axes:
        row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return result
