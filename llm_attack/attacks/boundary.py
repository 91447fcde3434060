"""DeepFool and SparseFool: the least that changes a prediction, for a whole batch at once.

They look for the nearest boundary instead of filling a ball, and read the scores of all classes
instead of a loss. Hence they stand beside `perturb`; an epsilon is a box of theirs. Each example
stops by itself and leaves the batch: what it costs and becomes does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llm_attack.attacks.closures import check_bounds, check_floats, leaf

Scores = Callable[[Tensor], Tensor]
OnGradient = Callable[[Tensor], None]
Bounds = tuple[float | Tensor, float | Tensor]
Box = tuple[Tensor, Tensor]

_LEAST = 1e-4  # the shortest step, of DeepFool (L2) and along one coordinate
_BEYOND = 1e-3  # by how much the linear solver passes the hyperplane


class _Search(NamedTuple):
    """How DeepFool looks for a boundary; see `deepfool`."""

    scores: Scores
    overshoot: float
    steps: int
    classes: int
    on_gradient: OnGradient | None


def deepfool(
    scores: Scores,
    x: Tensor,
    *,
    labels: Tensor | None = None,
    bounds: Bounds | None = None,
    overshoot: float = 0.02,
    steps: int = 50,
    classes: int = 10,
    on_gradient: OnGradient | None = None,
) -> Tensor:
    """The point across the nearest boundary in L2: Moosavi-Dezfooli et al. 2016.

    As published with SparseFool: linearised where the steps end, without the overshoot.

    Args:
        scores: of the classes before the softmax, (N, C) from points (N, ...); each example's own.
        x: the clean points, (N, ...).
        labels: (N,); where the prediction is another one already, the clean point is returned.
        bounds: box that the point stays in: numbers, or tensors that broadcast to `x`; None for
            features.
        overshoot: share by which the perturbation is lengthened.
        steps: at most so many linearisations.
        classes: only boundaries with so many of the likeliest classes are looked at.
        on_gradient: called with every gradient that was followed, (n, ...).

    Returns:
        Tensor like `x`, detached. Where no boundary was found, where the search ended.

    Raises:
        TypeError: `x` is no tensor of floats.
        ValueError: the bounds are no interval, or `x` is not within them.
    """
    check_floats(x)
    if bounds is not None:
        check_bounds(x, bounds)
    x = x.detach()
    perturbed = x.clone()
    active, _ = _to_fool(scores, x, labels)
    if len(active):
        box = _rows(_box(bounds, x), active)
        search = _Search(scores, overshoot, steps, classes, on_gradient)
        r, _, _ = _boundary(search, x[active], box)
        perturbed[active] = _boxed(x[active] + (1 + overshoot) * r, box)
    return perturbed


def sparsefool(
    scores: Scores,
    x: Tensor,
    *,
    labels: Tensor | None = None,
    bounds: Bounds | None = (0.0, 1.0),
    lambda_: float = 3.0,
    overshoot: float = 0.02,
    steps: int = 20,
    deepfool_steps: int = 50,
    classes: int = 10,
    on_gradient: OnGradient | None = None,
) -> Tensor:
    """The point across a boundary that differs from `x` in few coordinates: Modas et al. 2019.

    Defined as by the authors' program: DeepFool finds a point on the boundary and the hyperplane
    there; the coordinates along which it is steepest are moved, one after the other and each as far
    as the box allows, up to the hyperplane through the point `lambda_` times as far; again from
    there until the prediction changes.

    Args:
        scores: as for `deepfool`.
        x: as for `deepfool`.
        labels: as for `deepfool`.
        bounds: box that the point stays in, as for `deepfool`; the authors' `lb` and `ub`. None:
            one coordinate a step moves, as far as it takes. An amplitude is a box round `x`.
        lambda_: how far behind the boundary the hyperplane is put.
        overshoot: share by which the perturbation is lengthened, here and in DeepFool.
        steps: at most so many searches of DeepFool.
        deepfool_steps: the steps of each.
        classes: as for `deepfool`.
        on_gradient: as for `deepfool`.

    Returns:
        Tensor like `x`, detached. Where no boundary was found, where the search ended.

    Raises:
        TypeError: `x` is no tensor of floats.
        ValueError: the bounds are no interval, or `x` is not within them.
    """
    check_floats(x)
    if bounds is not None:
        check_bounds(x, bounds)
    x = x.detach()
    perturbed, point = x.clone(), x.clone()
    active, predicted = _to_fool(scores, x, labels)
    whole = _box(bounds, x)
    search = _Search(scores, overshoot, deepfool_steps, classes, on_gradient)
    for _ in range(steps):
        if not len(active):
            break
        start, box = point[active], _rows(whole, active)
        r, left, reached = _boundary(search, start)
        pair = torch.stack((left, reached), dim=1)
        normal = _slopes(scores, start + r, pair)[1][:, 0]
        if on_gradient is not None:
            on_gradient(normal)
        moved = _sparsest(start, normal, (lambda_ * r * normal).flatten(1).sum(1), box)
        point[active] = moved
        perturbed[active] = _boxed(x[active] + (1 + overshoot) * (moved - x[active]), box)
        fooled = _predict(scores, perturbed[active]) != predicted[active]
        stuck = (moved == start).flatten(1).all(1)  # every further search would end here, too
        active = active[~(fooled | stuck)]
    return perturbed


def _boundary(search: _Search, x: Tensor, box: Box | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """DeepFool's perturbation of `x` without the overshoot, the classes it left and it reached."""
    with torch.no_grad():
        first = search.scores(x)
    candidates = first.topk(min(search.classes, first.shape[1]), dim=1).indices
    left = candidates[:, 0]
    reached = left.clone()
    r = torch.zeros_like(x)
    active = torch.arange(len(x), device=x.device)
    for _ in range(search.steps):
        if not len(active):
            break
        start, before = x[active], r[active]
        gaps, slopes = _slopes(search.scores, start + before, candidates[active])
        norms = slopes.flatten(2).norm(dim=2)
        distance = torch.where(norms > 0, gaps.abs() / norms, torch.inf)
        nearest = distance.argmin(1, keepdim=True)
        rows = torch.arange(len(active), device=x.device)
        slope = slopes[rows, nearest[:, 0]]
        if search.on_gradient is not None:
            search.on_gradient(slope)
        flat = norms.gather(1, nearest) == 0  # no class has a gradient: nowhere to go
        length = distance.gather(1, nearest).clamp(min=_LEAST) / norms.gather(1, nearest)
        length = torch.where(flat, 0, length).reshape(-1, *[1] * (x.dim() - 1))
        r[active] += length * slope
        limits = _rows(box, active)
        if limits is not None:
            r[active] = _boxed(start + r[active], limits) - start
        tested = _boxed(start + (1 + search.overshoot) * r[active], limits)
        reached[active] = _predict(search.scores, tested)
        stuck = (r[active] == before).flatten(1).all(1)  # in a corner, or without a gradient
        active = active[(reached[active] == left[active]) & ~stuck]
    return r, left, reached


def _slopes(scores: Scores, x: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The lead of each candidate (n, k) but the first over the first, (n, k - 1), and how that
    grows: the gradients (n, k - 1, ...).
    """
    with torch.inference_mode(False), torch.enable_grad():
        x, candidates = leaf(x), candidates.clone()
        chosen = scores(x).gather(1, candidates)
        gaps = chosen[:, 1:] - chosen[:, :1]
        slopes = [
            torch.autograd.grad(gaps[:, i].sum(), x, retain_graph=i + 1 < gaps.shape[1])[0]
            for i in range(gaps.shape[1])
        ]
    return gaps.detach(), torch.stack(slopes, dim=1)


def _sparsest(x: Tensor, normal: Tensor, gap: Tensor, box: Box | None) -> Tensor:
    """`x` moved until normal . x has grown by `gap` (n,), in the fewest coordinates.

    The steepest coordinates go first, each to the edge of the box, and the last one as far as is
    needed. That is the published loop over coordinates in closed form: what one of them can
    contribute does not depend on the others, so a running sum tells where the loop would stop.
    """
    norm = normal.flatten(1).norm(dim=1, keepdim=True)
    w, gap, flat = normal.flatten(1) / norm, gap[:, None] / norm, x.flatten(1)
    steep, order = w.abs().sort(dim=1, descending=True)
    room = torch.full_like(flat, torch.inf)
    if box is not None:
        low, high = (edge.flatten(1) for edge in box)
        room = torch.where(w > 0, high - flat, flat - low).gather(1, order)
    gained = torch.where(steep > 0, steep * room, 0).cumsum(1)
    before = torch.cat((torch.zeros_like(gap), gained[:, :-1]), dim=1)
    step = ((gap - before + _BEYOND) / steep).clamp(min=_LEAST).minimum(room)
    step = torch.where((before < gap) & (steep > 0), step, 0)
    behind = gap[:, 0] < 0
    if box is not None and behind.any():
        step[behind] = _away(-gap[behind], steep[behind], room[behind])
    step = torch.zeros_like(flat).scatter(1, order, step)
    moved = torch.where(step > 0, flat + w.sign() * step, flat)
    return _boxed(moved.reshape(x.shape), box)


def _away(gap: Tensor, steep: Tensor, room: Tensor) -> Tensor:
    """The published loop where the hyperplane lies the other way, by `gap` (n, 1), as (n, D) steps.

    Each step takes it further away, so that every coordinate moves: the first few as far as the
    hyperplane was away, and from where that is outside of the box, all to the edge.
    """
    step = torch.where(steep > 0, room, 0)
    ahead = (steep * room).flip(1).cummax(1).values.flip(1)  # the most that is still to be gained
    for k in range(steep.shape[1]):
        if (gap[:, 0] + _BEYOND >= ahead[:, k]).all():
            break
        least = ((gap + _BEYOND) / steep[:, k : k + 1]).clamp(min=_LEAST)
        step[:, k : k + 1] = step[:, k : k + 1].minimum(least)
        gap = gap + steep[:, k : k + 1] * step[:, k : k + 1]
    return step


def _to_fool(scores: Scores, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows to work on, and all predictions."""
    predicted = _predict(scores, x)
    rows = torch.ones_like(predicted) if labels is None else predicted == labels
    return rows.nonzero()[:, 0], predicted


def _predict(scores: Scores, x: Tensor) -> Tensor:
    with torch.no_grad():
        return scores(x).argmax(1)


def _box(bounds: Bounds | None, x: Tensor) -> Box | None:
    """The edges of the box, each like `x`."""
    if bounds is None:
        return None
    low, high = (torch.as_tensor(edge, dtype=x.dtype, device=x.device) for edge in bounds)
    return low.expand_as(x), high.expand_as(x)


def _rows(box: Box | None, rows: Tensor) -> Box | None:
    return None if box is None else (box[0][rows], box[1][rows])


def _boxed(x: Tensor, box: Box | None) -> Tensor:
    return x if box is None else x.clamp(*box)
