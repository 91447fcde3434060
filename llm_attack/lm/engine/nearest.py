"""Finds out if a perturbed embedding is still nearest to the embedding of its own token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Error of a squared distance in float32, as a share of squared norms. A tie counts as unchanged.
_SLACK = 1e-5


class Nearest:
    """Looks for tokens that are nearer to a perturbed embedding than its own.

    It reads the vocabulary block by block, so the (tokens, vocabulary) distances never exist. It
    does not look up a token if the perturbation is small compared with its distance from all
    others.

    Args:
        embedding: the model's input embedding.
        vocabulary: number of rows of the embedding.
    """

    def __init__(self, embedding: nn.Module, vocabulary: int) -> None:
        self.embedding, self.vocabulary = embedding, vocabulary
        self._gaps: Tensor | None = None

    @torch.no_grad()
    def unchanged(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Whether no token is nearer to x than its own, in L2 and in L-infinity, each (T,).

        Args:
            x: (T, H) perturbed embeddings.
            ids: (T,) their tokens.
        """
        own = self.embedding(ids).float()
        x = x.float()
        largest = (x - own).abs().amax(-1)
        radius = x.shape[-1] ** 0.5 * largest  # radius of the L2 ball round the L-infinity ball
        l2, linf = torch.ones(2, len(x), dtype=torch.bool, device=x.device)
        # a token within the radius of x is within this distance of the own token
        (doubtful,) = ((x - own).norm(dim=-1) + radius > self._gap(ids)).nonzero(as_tuple=True)
        if len(doubtful) == 0:
            return l2, linf
        x, own, ids, largest = x[doubtful], own[doubtful], ids[doubtful], largest[doubtful]
        slack = _SLACK * (x.square().sum(-1) + own.square().sum(-1))
        reached = _affinity(x, own) + slack
        near = x.square().sum(-1) - radius[doubtful].square() - slack
        for block, affinity in self._others(x, ids):
            l2[doubtful] &= affinity.amax(-1) <= reached
            rows, columns = (affinity > near[:, None]).nonzero(as_tuple=True)
            for part in torch.arange(x.shape[-1], device=x.device).split(16):
                distance = (x[rows[:, None], part] - block[columns[:, None], part]).abs().amax(-1)
                nearer = distance < largest[rows]
                rows, columns = rows[nearer], columns[nearer]
            linf[doubtful[rows]] = False
        return l2, linf

    @torch.no_grad()
    def other(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The token other than its own that is nearest to x in L2, and its distance, each (T,).

        Args:
            x: (T, H) perturbed embeddings.
            ids: (T,) tokens that they were made from.
        """
        x = x.float()
        best, nearest = torch.full((len(x),), -torch.inf, device=x.device), torch.zeros_like(ids)
        start = 0
        for block, affinity in self._others(x, ids):
            of_block, column = affinity.max(-1)
            nearest = torch.where(of_block > best, start + column, nearest)
            best, start = torch.maximum(best, of_block), start + len(block)
        return nearest, (x - self.embedding(nearest).float()).norm(dim=-1)

    def _gap(self, ids: Tensor) -> Tensor:
        """(T,) a lower bound of the L2 distance of each token from the nearest other."""
        if self._gaps is None:
            self._gaps = torch.full((self.vocabulary,), torch.nan, device=ids.device)
        new = ids[self._gaps[ids].isnan()].unique()
        if len(new) > 0:
            own = self.embedding(new).float()
            squares = own.square().sum(-1)
            best = torch.full_like(squares, -torch.inf)
            for _, affinity in self._others(own, new):
                best = torch.maximum(best, affinity.amax(-1))
            self._gaps[new] = (squares * (1 - 2 * _SLACK) - best).clamp_min(0).sqrt()
        return self._gaps[ids]

    def _others(self, x: Tensor, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks (K, H) of the vocabulary, and x's affinity (T, K) to them; -inf for its own."""
        elements = 2**22 if x.device.type == "cpu" else 2**28
        rows = torch.arange(len(x), device=x.device)
        vocabulary = torch.arange(self.vocabulary, device=x.device)
        for tokens in vocabulary.split(max(1, elements // max(1, len(x)))):
            block = self.embedding(tokens).float()
            affinity = 2 * x @ block.T - block.square().sum(-1)
            here = (ids >= tokens[0]) & (ids <= tokens[-1])
            affinity[rows[here], ids[here] - tokens[0]] = -torch.inf
            yield block, affinity


def _affinity(x: Tensor, e: Tensor) -> Tensor:
    """|x|² - |x - e|² for each row. A larger value is nearer."""
    return 2 * (x * e).sum(-1) - e.square().sum(-1)
