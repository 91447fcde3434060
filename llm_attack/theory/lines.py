"""The packet of a network along straight lines through its points, at pixels or at features.

psi(t) = loss(x + t direction, label) / norm for t in [-reach, reach], with a fixed label. The loss
of a ReLU network has a derivative that jumps. So the error of the quadrature falls with the square
of the number of nodes, and not exponentially.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llm_attack.theory.packet import Uncertainty, uncertainty_on_nodes


def along(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    directions: Tensor,
    reach: float,
    panels: int = 64,
    order: int = 8,
) -> Uncertainty:
    """The uncertainty relation of the loss of each point along its own directions.

    Args:
        loss: maps points (N, K, M, ...) to losses (N, K, M), each with the label of its point.
            There are M points along each of K lines through each of N points.
        x: (N, ...) points.
        directions: (N, K, ...), or (K, ...) for all points. They are scaled to L2 length 1, so
            positions are in the units of the points.
        reach: half length of the interval, in L2.
        panels: number of equal parts of the interval.
        order: nodes in each part.

    Returns:
        Tensors (N, K).

    Raises:
        ValueError: a direction is zero, or psi is zero on the whole line.
    """
    shared = directions.dim() == x.dim()
    lines = directions.expand(len(x), *directions.shape) if shared else directions
    length = lines.flatten(2).norm(dim=-1)
    if not (length > 0).all():
        raise ValueError("directions: must not be zero, nor NaN")
    lines = lines / length.reshape(*length.shape, *[1] * (x.dim() - 1))

    def psi(t: Tensor) -> Tensor:
        steps = t.to(x).reshape(-1, *[1] * (x.dim() - 1))
        return loss(x[:, None, None] + steps * lines[:, :, None]).double()

    return uncertainty_on_nodes(psi, -reach, reach, panels, order)


def principal(x: Tensor, k: int) -> Tensor:
    """(k, ...) the first `k` principal directions of points (N, ...), of length 1."""
    away = (x - x.mean(0)).flatten(1)
    directions: Tensor = torch.linalg.svd(away, full_matrices=False).Vh
    return directions[:k].reshape(-1, *x.shape[1:])
