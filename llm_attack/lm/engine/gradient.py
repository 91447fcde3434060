"""Checks that the gradient that attacks follow belongs to the function that is evaluated.

This need not be so. Kernels for quantised weights may compute another function if no gradient is
needed, or leave layers out of the gradient. Attacks then fail without an error, and the model looks
robust. So a run tests the gradient on a few tokens before it begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from llm_attack.attacks import ATTACKS, widest
from llm_attack.base.failures import one_line
from llm_attack.lm.engine.choices import sum_by
from llm_attack.lm.engine.scoring import Scorer, look_up
from llm_attack.lm.network.pairs import is_pair
from llm_attack.lm.packing.pack import Pack, pack_rows
from llm_attack.lm.packing.questions import Question

TOKENS = 8  # number of tokens that the model reads
_SLIGHT = 0.05  # relative error of slopes that does not weaken attacks
WRONG = 0.6  # relative error of slopes; a gradient of twice the length has 0.5
_PARTS = 3
_DIRECTIONS = 3  # the gradient's own, and random ones
_LEVELS = 15  # number of steps: 1/2, 1/4, ... of a token's RMS
_FARTHER = 4  # so many levels farther, the rounding error of a slope is 16 times as large
_ROWS = 16  # rows of a batch, because kernels may differ for more tokens
_DIGITS = 5.0  # slopes may differ by this multiple of the square root of the spacing at 1


class Finding(NamedTuple):
    """The outcome of `examine`.

    Attributes:
        fault: the reason why no attack may follow this gradient; empty if there is none.
        warning: a doubt that a reader should know, although attacks may follow it; empty if none.
        figure: the slopes that were compared.
    """

    fault: str = ""
    warning: str = ""
    figure: str = ""


class _Slopes(NamedTuple):
    """Slopes by central differences and by the gradient, (directions, levels) each.

    The steps are shares of a token's RMS. `typical` is the gradient's length, which is the standard
    deviation of the slope in a random direction.
    """

    measured: Tensor
    claimed: Tensor
    steps: Tensor
    typical: float


def refusal(attack: str, fault: str, dequantize: bool = False) -> str:
    """The message that refuses a model with a fault, and names the ways out.

    Args:
        attack: name of the attack.
        fault: the attribute of a `Finding`.
        dequantize: whether `dequantize=True` is a way out.
    """
    others = ", ".join(name for name, kind in ATTACKS.items() if not kind.gradient)
    way = "; dequantize=True gives these weights one"
    if not dequantize:
        way = (
            ". The same weights may have a right gradient without quantisation, in another dtype or"
            " on another device"
        )
    return (
        f"attack={attack}: cannot follow the gradient of this model, {fault}; must be an attack"
        f" without gradients ({others}), or a model whose gradient is right{way}"
    )


def examine(scorer: Scorer, text: Sequence[int], device: torch.device) -> Finding:
    """Compares forwards with and without gradients, and the gradient with finite differences.

    If the slopes in one part of the text are in doubt, two other parts are tried. Some functions
    jump, for example if a router chooses experts. A jump near a point says nothing about the
    gradient at the point.

    Args:
        scorer: the model and the hookpoint.
        text: at least two tokens. The model reads `TOKENS` of each part.
        device: the device of packs.
    """
    parts = [tuple(text[i : i + TOKENS + 1]) for i in range(0, len(text), TOKENS + 1)]
    first = Finding()
    for part in [part for part in parts if len(part) > 1][:_PARTS]:
        finding = _examined(scorer, part, device)
        if finding.fault or not finding.warning:
            return finding
        first = first if first.warning else finding
    return first


def _examined(scorer: Scorer, tokens: tuple[int, ...], device: torch.device) -> Finding:
    """Examines one part.

    The first forward takes no gradient, because some kernels convert their weights in it. Two
    forwards count as equal if half of the digits of their dtype agree; see `probe.equal_logits`.
    """
    pack = _pack(scorer, tokens, 1, device)
    logits = partial(scorer.logits, pack, pack.scored.positions)
    with torch.no_grad():
        untouched = logits()
        x = scorer.point(pack)
        plain = logits(x)
    try:
        attacked, gradient = _gradient(scorer, pack, x)
        of_rows = _of_rows(scorer, tokens, x)
    except Exception as error:
        if should_reduce_batch_size(error):
            raise
        return Finding(f"because the backward pass fails ({one_line(error)})")
    with torch.no_grad():
        again = logits(x)
    eps = resolution(scorer)
    rounding = eps**0.5 * float(plain.float().std())
    noise = _apart(plain, again)
    for other, what in (
        (attacked, "with and without gradients"),
        (untouched, "with and without the clean point put in place"),
    ):
        apart = _apart(plain, other)
        if apart > rounding + 4 * noise:
            return Finding(
                f"because logits differ by {apart:.2g} (root mean square) between forward passes"
                f" {what}; two equal forward passes differ by {noise:.2g}"
            )
    apart = _apart(of_rows, gradient) / max(_apart(gradient, torch.zeros_like(gradient)), 1e-300)
    if apart > WRONG and noise <= rounding:
        return Finding(f"which differs by {apart:.0%} between batches of 1 and of {_ROWS} rows")
    finding = judged(_slopes(scorer, tokens, x, gradient), x.dtype, eps)
    if noise > rounding:  # then slopes show nothing
        text = f"logits of the same text differ by {noise:.2g} from call to call"
        return Finding("", f"{text}, so no number here is exact", finding.figure)
    return finding


def judged(slopes: _Slopes, dtype: torch.dtype, eps: float) -> Finding:
    """Judges whether the slopes agree in all directions, for some step.

    A central difference has two errors: the rounding of the loss divided by the step, and the
    curvature times the square of the step. For steps between the two, it agrees with a right
    gradient. The rounding error is measured at steps 16 times smaller and below, and grows with
    1 / step. A gradient is clearly wrong if its error is four times the rounding error, and stays
    the same if the step doubles. (Curvature would make it four times as large.) Values that jump
    from step to step show nothing.

    Args:
        slopes: the measured slopes.
        dtype: the dtype of the point, which rounds the steps themselves.
        eps: the result of `resolution`. The backward pass rounds like the forward pass, so half of
            the digits must agree, up to a factor of 5. On 28 random architectures in three dtypes,
            each with six sets of weights, no right gradient needed a larger factor.
    """
    measured, claimed, steps, typical = slopes
    error = (measured - claimed).abs()
    scale = torch.maximum(measured.abs(), claimed.abs()).clamp(min=max(typical, 1e-300))
    share = error / scale
    resolved = [j for j in range(len(steps)) if steps[j] >= 2 * torch.finfo(dtype).eps]
    small = [min(j, len(steps) - 2 * _FARTHER) + _FARTHER for j in resolved]
    rounding = [
        (error * steps)[:, at:].max() / steps[j] for j, at in zip(resolved, small, strict=True)
    ]
    likely = [j for j in resolved if rounding[j] <= scale[0, j]] or resolved[:1]
    best = min(likely, key=lambda j: float(share[:, j].max()))
    worst = float(share[:, best].max())
    numbers = (", ".join(f"{x:.3g}" for x in values[:, best]) for values in (measured, claimed))
    figure = "slopes {} by finite differences, {} by the gradient".format(*numbers)
    if worst <= max(_SLIGHT, _DIGITS * eps**0.5):
        return Finding(figure=figure)
    signed, clear = measured - claimed, False
    for i in range(len(error)):
        for j in reversed(resolved[2:]):
            if j + _FARTHER >= len(steps) or error[i, j] < 4 * rounding[j] or share[i, j] <= WRONG:
                continue
            steady = (signed[i, j] - signed[i, j - 1]).abs() <= error[i, j] / 4
            clear |= bool(steady and (signed[i, j] - signed[i, j + 1]).abs() <= error[i, j] / 2)
            break
    if clear and worst > WRONG:
        return Finding(f"which is not the gradient of its loss: {figure}", figure=figure)
    return Finding(
        "", f"the gradient differs from the slope of the loss by {worst:.0%}: {figure}", figure
    )


def resolution(scorer: Scorer) -> float:
    """The spacing at 1 of the numbers that the model computes with.

    Models in float64 compute some parts in float32. Kernels for quantised weights round to 16 bits
    for every dtype of the model.
    """
    dtypes = [scorer.autocast or scorer.model.dtype, torch.float32]
    if getattr(scorer.model.config, "quantization_config", None) is not None:
        dtypes.append(torch.bfloat16)
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _pack(scorer: Scorer, tokens: tuple[int, ...], rows: int, device: torch.device) -> Pack:
    """A pack with the same request in each row. All that the model predicts is scored."""
    n = len(tokens) // 2 if is_pair(scorer.model) else 1
    request = scorer.request(tokens[:n], tokens[n:])
    return pack_rows([Question([request], [[i]]) for i in range(rows)]).to(device)


def _losses(scorer: Scorer, pack: Pack, logits: Tensor) -> Tensor:
    """(rows,) negative log-likelihoods."""
    scored = pack.scored
    slot, target = scored.slot.to(logits.device), scored.target.to(logits.device)
    log_prob = look_up(logits, slot, target, scorer.softmax_dtype).log_prob
    return -sum_by(log_prob.to(pack.input_ids.device), scored.request, len(pack.requests))


def _gradient(scorer: Scorer, pack: Pack, x: Tensor) -> tuple[Tensor, Tensor]:
    """The logits and the gradient of the loss at the point."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        logits = scorer.logits(pack, pack.scored.positions, leaf)
        (gradient,) = torch.autograd.grad(_losses(scorer, pack, logits).sum(), leaf)
    return logits.detach(), gradient


def _of_rows(scorer: Scorer, tokens: tuple[int, ...], x: Tensor, rows: int = _ROWS) -> Tensor:
    """The mean gradient of equal rows in a batch; of fewer rows if memory is short."""
    try:
        pack = _pack(scorer, tokens, rows, x.device)
        return _gradient(scorer, pack, x.expand(rows, *x.shape[1:]))[1].mean(0, keepdim=True)
    except Exception as error:
        if rows == 1 or not should_reduce_batch_size(error):
            raise
    return _of_rows(scorer, tokens, x, rows // 2)


def _losses_at(scorer: Scorer, tokens: tuple[int, ...], points: Tensor) -> Tensor:
    """(points,) losses, in several forwards if memory is short."""
    try:
        pack = _pack(scorer, tokens, len(points), points.device)
        return _losses(scorer, pack, scorer.logits(pack, pack.scored.positions, points))
    except Exception as error:
        if len(points) == 1 or not should_reduce_batch_size(error):
            raise
    return torch.cat([_losses_at(scorer, tokens, half) for half in points.chunk(2)])


def _apart(some: Tensor, others: Tensor) -> float:
    return float((some.detach() - others.detach()).float().square().mean().sqrt())


def _slopes(scorer: Scorer, tokens: tuple[int, ...], x: Tensor, gradient: Tensor) -> _Slopes:
    """The slopes along the gradient and along random directions, all in one forward.

    Tokens move in proportion to their length. So a token of zeros, where models with norms have a
    kink, does not move. The gradient's slope is computed from the rounded points.
    """
    wide = widest(x.device)
    gradient = gradient.to(wide).nan_to_num(0, 0, 0)  # as in attacks
    size = x.to(wide).square().mean(-1, keepdim=True).sqrt()
    drawn = torch.randn(_DIRECTIONS - 1, *x.shape, generator=torch.Generator().manual_seed(0))
    ways = [gradient * size, *drawn.to(gradient)]
    ways = [size * way / way.square().mean().sqrt().clamp(min=1e-300) for way in ways]
    steps = 0.5 ** torch.arange(1, _LEVELS + 1, dtype=wide, device=x.device)
    points = [[(x + sign * h * way).to(x.dtype) for way in ways for h in steps] for sign in (1, -1)]
    up, down = map(torch.cat, points)
    with torch.no_grad():
        ends = _losses_at(scorer, tokens, torch.cat([up, down]))
    measured = ends.reshape(2, _DIRECTIONS, -1)
    claimed = ((up.to(wide) - down.to(wide)) * gradient).flatten(1).sum(-1)
    both = torch.stack([measured[0] - measured[1], claimed.reshape(_DIRECTIONS, -1)])
    slopes, steps = (both / (2 * steps)).double().cpu(), steps.double().cpu()
    return _Slopes(slopes[0], slopes[1], steps, float((gradient * size).norm()))
