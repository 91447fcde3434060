"""The networks of word sentiment, Fig. 6, their training and measurements.

A word is a row of ids of its characters, or of longer pieces. Its embedding, the point, consists of
their vectors side by side, with zeros after the end of the word. A network with one hidden layer
classifies it as negative, neutral or positive. All seeds of a kind train as one batched model, each
on its own split, with one step of Adam on all its training words per epoch.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_attack.attacks import loss_gradient
from llm_attack.theory.lexicon import LABELS, encode
from llm_attack.theory.settings import MEASURED, SPLITS, Kind, SentimentSettings
from llm_attack.theory.stacked import StackedMLP, cross_entropy, generators, stack


class SentimentModel(nn.Module):
    """Embedding and classifier of several seeds.

    Args:
        ids: number of character ids, padding included.
        length: characters in a word with its padding.
        size: length of a character's embedding.
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
        logits: Tensor = self.classifier(point.flatten(2))
        return logits


def cosines(model: SentimentModel, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether words are classified right, and the cosine of their embedding and gradient.

    Args:
        model: the model of all seeds.
        ids: (seeds, N, length).
        labels: (seeds, N).

    Returns:
        (seeds, N) booleans and cosines. Padding is no part of a word, so its gradient does not
            count.
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
    """`MEASURED` for each seed. `wrong` is a number of words; the mean over no words is NaN."""
    values = (
        right.double().mean(1),
        cosine.where(right, torch.nan),
        cosine.where(~right, torch.nan),
        (~right).sum(1),
    )
    return {
        name: (value if value.dim() == 1 else value.nanmean(1)).tolist()
        for name, value in zip(MEASURED, values, strict=True)
    }


def measured_epochs(
    words: pd.DataFrame, kind: Kind, settings: SentimentSettings
) -> Iterator[tuple[int, dict[str, dict[str, list[float]]]]]:
    """Trains all seeds of one kind; measures before the first epoch and after each.

    Words that are neither trained on nor tested are in no split. For training words, the label with
    which they were trained counts.

    Yields:
        The epoch's number, from 0, and the `summary` of each split.
    """
    device = settings.device
    draws = generators(settings.seed, settings.seeds)
    n = len(words)
    order = stack(draws, lambda g: torch.randperm(n, generator=g)).to(device)
    ids, vocabulary = encode(words.word.tolist(), kind.ngram)
    labels = torch.tensor([LABELS.index(label) for label in words.label], device=device)
    held_out = min(max(1, round(settings.test_share * n)), n - 1)
    order = order[:, : held_out + max(1, round(kind.train_share * (n - held_out)))]
    ids, labels = ids.to(device)[order], labels[order]
    parts = dict(zip(SPLITS, (slice(held_out), slice(held_out, None)), strict=True))
    model = SentimentModel(vocabulary, ids.shape[-1], kind.size, settings.width, draws).to(device)
    if kind.noise:
        wrong = round(kind.noise * (labels.shape[1] - held_out))  # the first ones: in random order
        other = stack(draws, lambda g: torch.randint(1, len(LABELS), (wrong,), generator=g))
        noisy = labels[:, held_out : held_out + wrong]
        labels[:, held_out : held_out + wrong] = (noisy + other.to(device)) % len(LABELS)
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)
    for epoch in range(settings.epochs + 1):
        if epoch:
            optimiser.zero_grad()
            logits = model(model.embed(ids[:, held_out:]))
            cross_entropy(logits, labels[:, held_out:]).mean(1).sum().backward()
            optimiser.step()
        right, cosine = cosines(model, ids, labels)
        yield epoch, {k: summary(right[:, part], cosine[:, part]) for k, part in parts.items()}
