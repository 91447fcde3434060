"""Signs of masked gradients: does a classifier's gradient show where its loss rises?

Athalye et al. 2018 (arXiv 1802.00420) name two signs: one step does better than many, and the loss
does not rise along its gradient. This module looks at a network's gradients directly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm_attack.attacks import loss_gradient, widest
from llm_attack.vision.data import Images
from llm_attack.vision.measure import Row, cross_entropy, frozen

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Parts of the step of FGSM after which the loss is measured."""


def gradients(network: nn.Module, images: Images, epsilon: float, batch_size: int = 250) -> Row:
    """Properties of the gradient at images that the network classifies right, as means.

    The step delta is a step of FGSM, epsilon · sign of the gradient. It is not clipped to [0, 1],
    because this is about the network, and not about the reach of an attack.

    Args:
        network: maps pixels in [0, 1] to scores.
        images: labelled images.
        epsilon: L-infinity amplitude of the step.
        batch_size: images at once.

    Returns:
        `loss_0` to `loss_1`: cross-entropy after each part (`SHARES`) of the step. `rise`: its rise
            over the whole step. `promised`: epsilon times the L1 norm of the gradient, which is the
            rise of a linear loss. `cosine`: of the gradients at x and at x + delta, over images
            where neither is zero. `zero`: share of the gradient's coordinates that are exactly
            zero. `vanished`: share of images whose gradient is zero everywhere if torch computes
            cross-entropy in float32. A value is None if there is no such image.
    """
    parts: list[dict[str, Tensor]] = []
    with frozen(network):
        for first in range(0, len(images), batch_size):
            batch = images[first : first + batch_size]
            with torch.no_grad():
                right = network(batch.scaled()).argmax(1) == batch.labels
            if right.any():
                parts.append(_of_batch(network, batch[right], epsilon))
    names = [f"loss_{share:g}" for share in SHARES]
    names += ["rise", "promised", "cosine", "zero", "vanished"]
    return {name: _mean([part[name] for part in parts]) for name in names}


def _of_batch(network: nn.Module, images: Images, epsilon: float) -> dict[str, Tensor]:
    """(N,) the values of each image."""
    x, labels = images.scaled(), images.labels

    def loss(point: Tensor) -> Tensor:
        return cross_entropy(network(point), labels)

    def usual(point: Tensor) -> Tensor:
        return nn.functional.cross_entropy(network(point), labels, reduction="none")

    slope = loss_gradient(loss, x)
    delta = epsilon * slope.sign()
    with torch.no_grad():
        losses = [loss(x + share * delta) for share in SHARES]
    after = loss_gradient(loss, x + delta)
    values = {f"loss_{share:g}": value for share, value in zip(SHARES, losses, strict=True)}
    flat, later = (each.flatten(1).to(widest(x.device)) for each in (slope, after))
    return {
        **values,
        "rise": losses[-1] - losses[0],
        "promised": epsilon * flat.abs().sum(1),
        "cosine": (flat * later).sum(1) / (flat.norm(dim=1) * later.norm(dim=1)),
        "zero": (flat == 0).double().mean(1),
        "vanished": (loss_gradient(usual, x).flatten(1) == 0).all(1).double(),
    }


def _mean(parts: list[Tensor]) -> float | None:
    """The mean of all values that are defined."""
    values = torch.cat(parts).double() if parts else torch.zeros(0)
    values = values[values.isfinite()]
    return values.mean().item() if len(values) else None
