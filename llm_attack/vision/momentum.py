"""The spread of the momentum of a classifier's packet, over images."""

from __future__ import annotations

import torch
from torch import nn

from llm_attack.attacks import widest
from llm_attack.vision.data import Images
from llm_attack.vision.measure import cross_entropy, frozen


def momentum_spread(network: nn.Module, images: Images, batch_size: int = 250) -> float:
    """The dp of psi(x) = loss(x, label) / sqrt(mean of loss²), in 1 / units of the pixels.

    It is defined as in `llm_attack.theory.packet`. The mean over the images, each with its own
    label, replaces the integral, and i runs over all pixels:

        dp² = sum over i of the mean of (dpsi/dx_i - <p_i> psi)²,   <p_i> = mean of psi dpsi/dx_i

    Args:
        network: maps pixels in [0, 1] to scores.
        images: labelled images.
        batch_size: images at once.
    """
    sums = []
    with frozen(network):
        for first in range(0, len(images), batch_size):
            batch = images[first : first + batch_size]
            x = batch.scaled().requires_grad_(True)
            loss = cross_entropy(network(x), batch.labels)
            (slope,) = torch.autograd.grad(loss.sum(), x)
            slope, loss = (
                values.detach().to(widest(x.device)) for values in (slope.flatten(1), loss)
            )
            sums.append(
                torch.cat([loss.square().sum()[None], slope.square().sum()[None], loss @ slope])
            )
    norm, squares, *_ = total = torch.stack(sums).sum(0)
    mean_p = total[2:] / norm
    return float((squares / norm - mean_p.square().sum()).clamp(min=0).sqrt())
