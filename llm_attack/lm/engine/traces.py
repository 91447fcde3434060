"""Traces: the perturbation of each token, and the share of the loss's change that it carries.

The shares are integrated gradients (Sundararajan et al. 2017) of the loss along the straight line
from the clean to the attacked point, summed over the coordinates of a token. The integral is a
Gauss-Legendre sum, which is also the default of Captum. The shares of a perturbation sum to the
change of its loss, except for the error of the integral.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_attack.attacks import loss_gradient
from llm_attack.lm.engine.attacked import AttackedBatch
from llm_attack.lm.engine.moving import moving


class Trace(NamedTuple):
    """The effect of an attack on N tokens, which are nodes of the tries of U questions or requests.

    Attributes:
        change: (N, H) perturbation, in the dtype of the point.
        norm: (N,) L2 norm of each token's perturbation.
        nearest: (N,) int32 id of the token, other than its own, whose embedding is nearest in L2 to
            the perturbed one; -1 if the point is not the input embedding.
        distance: (N,) L2 distance from this embedding; NaN if there is none.
        share: (N,) part of the loss's change; NaN if nobody asks.
        loss: (U, 2) loss at the clean and at the attacked point.
    """

    change: Tensor
    norm: Tensor
    nearest: Tensor
    distance: Tensor
    share: Tensor
    loss: Tensor

    @classmethod
    def joined(cls, traces: Sequence[Trace]) -> Trace:
        """Joins several traces, one after the other."""
        return cls(*map(torch.cat, zip(*traces, strict=True)))

    def on_cpu(self) -> Trace:
        """The same on the CPU; waits for the device."""
        trace = Trace(*(part.cpu() for part in self))
        return trace._replace(loss=trace.loss.double())


def traced(batch: AttackedBatch, attacked: Tensor, points: int) -> Trace:
    """The trace of an attack on a batch.

    Args:
        batch: the batch with its clean point.
        attacked: the attacked point.
        points: number of points of the line at which the gradient is taken; 0: no shares.
    """
    index = moving(batch.pack)
    clean = batch.x
    wide = torch.promote_types(clean.dtype, torch.float32)
    change = attacked.to(wide) - clean.to(wide)
    of_tokens = change.flatten(0, -2)[index]
    missing = torch.full((len(index),), torch.nan, device=clean.device)
    nearest, distance = torch.full_like(index, -1), missing
    if batch.scorer.nearest is not None:
        first = batch.pack.first
        ids = batch.pack.input_ids.flatten()
        ids = (ids if first is None else ids[first])[index]
        nearest, distance = batch.scorer.nearest.other(attacked.flatten(0, -2)[index], ids)
    with torch.no_grad():
        loss = torch.stack([_loss(batch, x) for x in (clean, attacked)], -1)
    share = shares(batch, change, points).flatten()[index] if points else missing
    norm = of_tokens.norm(dim=-1)
    norm, distance, share = (part.to(torch.float32) for part in (norm, distance, share))
    return Trace(of_tokens.to(clean.dtype), norm, nearest.to(torch.int32), distance, share, loss)


def shares(batch: AttackedBatch, change: Tensor, points: int) -> Tensor:
    """The part of the loss's change that each token carries, by integrated gradients.

    Args:
        batch: the batch with its clean point.
        change: the perturbation, like the point, in float32 or wider.
        points: number of points of the Gauss-Legendre sum.

    Returns:
        A tensor with the shape of the point without its last dimension.
    """
    clean = batch.x.to(change.dtype)
    total = change.new_zeros(change.shape[:-1])
    for at, weight in zip(*np.polynomial.legendre.leggauss(points), strict=True):
        point = clean + float(1 + at) / 2 * change  # from (-1, 1) to (0, 1)
        slope = loss_gradient(lambda x: _loss(batch, x), point.to(batch.x.dtype))
        total += float(weight) / 2 * (slope.to(change.dtype) * change).sum(-1)
    return total


def _loss(batch: AttackedBatch, x: Tensor) -> Tensor:
    """The loss that attacks raise, one value for each perturbation."""
    return batch.of_examples(batch.loss(x))
