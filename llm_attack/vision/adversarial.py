"""The loss of a training step: on clean images, or on images that are attacked first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm_attack.attacks import Attack, Ball, loss_gradient, perturb
from llm_attack.vision.measure import frozen
from llm_attack.vision.settings import ImageSettings

_NOISE = 1e-3  # standard deviation of the start of TRADES, in pixels of [0, 1]
_STEPS = {"pgd": 7, "trades": 10}  # both papers' for CIFAR-10


def adversarial_examples(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    settings: ImageSettings,
    draws: torch.Generator,
) -> Tensor:
    """The images that the network is trained with besides, or instead of, `x`; like `x`.

    `pgd` (Madry et al. 2018, arXiv 1706.06083) raises the loss of the training from a uniform start
    in the ball. `trades` (Zhang et al. 2019, arXiv 1901.08573) raises `divergence`, from a normal
    start close to `x`, where its gradient vanishes. In float32, and with the network in evaluation
    mode, as the authors of TRADES have it; the network is left as it was.

    Args:
        network: scores (N, C) of pixels in [0, 1].
        x: (N, C, H, W), those pixels.
        labels: (N,), right classes.
        settings: `train_attack`, `train_epsilon`, `train_steps`, `train_step_size`,
            `label_smoothing`.
        draws: of the starts; on the device of `x`.
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

    The cross-entropy at `point`; of `trades` that at `x` and `trades_beta` times the mean
    divergence of the two.

    Args:
        network: in training mode.
        x: (N, C, H, W), pixels in [0, 1].
        point: of `adversarial_examples`.
        labels: (N,), right classes.
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
    """The usual L-infinity amplitude for pixels: 8/255 of images in colour, 0.1 of grey ones."""
    return 8 / 255 if channels == 3 else 0.1
