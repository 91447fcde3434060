"""The loss of a training step, on clean images or on adversarial examples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm_attack.attacks import Attack, Ball, loss_gradient, perturb
from llm_attack.vision.measure import frozen
from llm_attack.vision.settings import ImageSettings

_NOISE = 1e-3  # standard deviation of the start of TRADES, in pixels of [0, 1]
_STEPS = {"pgd": 7, "trades": 10}  # both papers' values for CIFAR-10


def adversarial_examples(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    settings: ImageSettings,
    draws: torch.Generator,
) -> Tensor:
    """Adversarial examples for a training step; same shape as `x`.

    `pgd` (Madry et al. 2018, arXiv 1706.06083) raises the training loss from a uniform start in the
    ball. `trades` (Zhang et al. 2019, arXiv 1901.08573) raises `divergence`. Its gradient vanishes
    at `x`, so the start is a normal draw close to `x`. The computation is in float32, with the
    network in evaluation mode, as in the authors' code of TRADES. The network is restored
    afterwards.

    Args:
        network: maps pixels in [0, 1] to scores (N, C).
        x: (N, C, H, W) pixels.
        labels: (N,) right classes.
        settings: `train_attack`, `train_epsilon`, `train_steps`, `train_step_size`,
            `label_smoothing`.
        draws: generator of the starts, on the device of `x`.
    """
    if settings.train_attack == "none":
        return x
    given = settings.train_epsilon
    epsilon = usual_epsilon(x.shape[1]) if given is None else given
    steps = settings.train_steps or _STEPS[settings.train_attack]
    attack = Attack("pgd", epsilon, steps=steps, step_size=settings.train_step_size)
    with frozen(network):
        if settings.train_attack == "pgd":
            keys = torch.randint(
                -(2**63), 2**63 - 1, (len(x),), generator=draws, device=draws.device
            )

            def loss(point: Tensor) -> Tensor:
                return nn.functional.cross_entropy(
                    network(point),
                    labels,
                    reduction="none",
                    label_smoothing=settings.chosen("label_smoothing"),
                )

            return perturb(attack, x, loss, bounds=(0, 1), keys=keys)
        with torch.no_grad():
            clean = network(x)
        ball = Ball.of(attack, x, bounds=(0, 1))
        noise = torch.randn(x.shape, generator=draws, device=draws.device, dtype=x.dtype)
        point = x + _NOISE * noise
        for _ in range(steps):
            slope = loss_gradient(lambda point: divergence(clean, network(point)), point)
            point = ball.step(point, slope, attack.step)
        return point


def objective(
    network: nn.Module, x: Tensor, point: Tensor, labels: Tensor, settings: ImageSettings
) -> Tensor:
    """The loss of a training step: a number, with its gradient in the network's parameters.

    It is the cross-entropy at `point`. For `trades`, it is the cross-entropy at `x` plus
    `trades_beta` times the mean divergence between the two.

    Args:
        network: the network, in training mode.
        x: (N, C, H, W) pixels in [0, 1].
        point: the result of `adversarial_examples`.
        labels: (N,) right classes.
        settings: `train_attack`, `trades_beta`, `label_smoothing`.
    """
    trades = settings.train_attack == "trades"
    scores = network(x if trades else point).float()
    smoothing = settings.chosen("label_smoothing")
    loss = nn.functional.cross_entropy(scores, labels, label_smoothing=smoothing)
    if trades:
        loss = loss + settings.trades_beta * divergence(scores, network(point).float()).mean()
    return loss


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """(N,) KL(softmax(before) || softmax(after)) of scores (N, C), in nats."""
    p, q = before.log_softmax(1), after.log_softmax(1)
    return nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(1)


def usual_epsilon(channels: int) -> float:
    """The usual L-infinity amplitude for pixels: 8/255 for images in colour, 0.1 for grey ones."""
    return 8 / 255 if channels == 3 else 0.1
