"""Fully connected networks of several seeds, trained as one: tensors with a leading seed axis.

Seeds never mix. Each has its own generator, products are batched over seeds, and Adam works element
by element. So a seed learns the same with others as by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StackedMLP(nn.Module):
    """Linear layers with tanh between them. Weights are drawn as in `torch.nn.Linear`.

    Args:
        sizes: number of inputs, units of the hidden layers, number of outputs.
        generators: generators of the random draws, on the CPU; one per seed.
        dtype: dtype of the weights.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        generators: Sequence[torch.Generator],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for n, m in pairwise(sizes):
            drawn = [torch.rand(n + 1, m, generator=g, dtype=dtype) for g in generators]
            layer = (2 * torch.stack(drawn) - 1) / n**0.5
            self.weights.append(nn.Parameter(layer[:, :-1].clone()))
            self.biases.append(nn.Parameter(layer[:, -1:].clone()))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (seeds, N, sizes[-1]) for inputs (seeds, N, sizes[0])."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x.tanh() if i else x, weight)
        return x


def generators(seed: int, seeds: int) -> list[torch.Generator]:
    """One generator for each of the seeds `seed`, `seed` + 1, ..."""
    return [torch.Generator().manual_seed(seed + i) for i in range(seeds)]


def stack(
    generators: Sequence[torch.Generator], draw: Callable[[torch.Generator], Tensor]
) -> Tensor:
    """One draw of each generator, stacked along a leading seed axis."""
    return torch.stack([draw(generator) for generator in generators])


def pick(x: Tensor, index: Tensor) -> Tensor:
    """The rows of x (seeds, N, ...) that index (seeds, M) names in each seed: (seeds, M, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example, (seeds, N), for logits (seeds, N, C), labels (seeds, N).

    It is computed from the margin to the other classes. If a network is sure, 1 - p would be
    rounding error, and so would the direction of the gradient.
    """
    own = F.one_hot(labels, logits.shape[-1]).bool()
    others = logits.masked_fill(own, -torch.inf).logsumexp(-1)
    chosen = logits.gather(-1, labels[..., None]).squeeze(-1)
    return F.softplus(others - chosen, threshold=50)
