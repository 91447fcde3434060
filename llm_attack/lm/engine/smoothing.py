"""The votes of a model on a question's choices under Gaussian noise, for randomised smoothing.

The smoothed input is the point of a question: the vectors of all its tokens that may move.
Choices share the tokens of their common beginning, as in the balls of attacks that know the gold.
So a certificate is about the ball in which `critical` searches with norm l2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_attack.attacks.draws import normal, rehashed
from llm_attack.lm.engine.attacked import AttackedBatch
from llm_attack.lm.engine.choices import sum_by
from llm_attack.lm.smoothing import Smoothing

SELECTION, CERTIFYING = 0, 1
"""The two parts of `votes`. They have different draws."""


@torch.no_grad()
def votes(batch: AttackedBatch, smoothing: Smoothing) -> Tensor:
    """How often each choice is the answer under noise.

    Each draw has its own keys, which depend only on the seed and on the question's tokens. So the
    votes do not depend on the batch, except for rounding. All sigmas scale the same draws.

    Args:
        batch: questions whose loss knows the gold, so a question has one point.
        smoothing: the noise, with sigmas in the units of the point.

    Returns:
        int64 (questions, sigmas, 2, choices). The third dimension is `SELECTION`, `CERTIFYING`.
        Choices that a question does not have get no votes.
    """
    choices, x = batch.read.choices, batch.x
    counts = torch.zeros(
        *(len(choices.row), len(smoothing.sigmas), 2, choices.row.shape[1]),
        dtype=torch.int64,
        device=x.device,
    )
    keys = batch.keys.to(x.device)
    for draw in range(smoothing.total):
        keys = rehashed(keys)
        noise = normal(keys, x)
        part = SELECTION if draw < smoothing.selection_draws else CERTIFYING
        for i, sigma in enumerate(smoothing.sigmas):
            answer = _answers(batch, sigma.number * noise)
            counts[:, i, part].scatter_add_(1, answer[:, None], torch.ones_like(answer[:, None]))
    return counts


def _answers(batch: AttackedBatch, noise: Tensor) -> Tensor:
    """(questions,) the answer with this noise: the first choice with the best score."""
    x = batch.x
    # the model's input is rounded after the sum, so rounding is a part of the network
    noisy = (x.to(noise.dtype) + noise).to(x.dtype)
    if batch.mask is not None:
        noisy = torch.where(batch.mask[..., None], noisy, x)
    log_prob = batch.answers(noisy).log_prob
    sums = sum_by(log_prob, batch.pack.scored.request, len(batch.pack.requests))
    return batch.read.choices.matrix(sums).argmax(-1)
