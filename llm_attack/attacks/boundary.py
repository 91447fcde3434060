"""DeepFool and SparseFool: small changes that reach another class, for a whole batch at once.

They look for the nearest decision boundary, and read the scores of all classes. `perturb` raises a
loss within a ball, so they are functions of their own. To limit the amplitude, pass a box round the
point as `bounds`. Each example stops by itself and leaves the batch. So its result and its cost do
not depend on the other examples.
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

_LEAST = 1e-4  # the shortest step of DeepFool (in L2), and along one coordinate
_BEYOND = 1e-3  # how far the linear solver goes past the hyperplane


class _Search(NamedTuple):
    """The settings of DeepFool; see `deepfool`."""

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
    """Moves each point across the nearest boundary in L2 (Moosavi-Dezfooli et al. 2016).

    As in the authors' SparseFool program, each linearisation is made where the last step ended,
    without the overshoot.

    Args:
        scores: points (N, ...) -> scores of the classes before the softmax, (N, C). The scores of
            an example must not depend on the other examples.
        x: the clean points, (N, ...).
        labels: (N,); an example whose prediction is already another class stays as it is.
        bounds: box that the point stays in: numbers, or tensors that broadcast to `x`; None for
            features.
        overshoot: share by which the perturbation is lengthened.
        steps: largest number of linearisations.
        classes: number of the likeliest classes whose boundaries are considered.
        on_gradient: called with every gradient that is followed, (n, ...).

    Returns:
        Tensor like `x`, detached. If no boundary was found, the point where the search ended.

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
    """Moves each point across a boundary by changing few coordinates (Modas et al. 2019).

    The definition follows the authors' program. DeepFool finds a point on the boundary, and the
    hyperplane at it. Then coordinates move one after the other, the steepest first, each as far as
    the box allows. They stop at the hyperplane through the point that is `lambda_` times as far
    away. All of this repeats from the new point until the prediction changes.

    Args:
        scores: as for `deepfool`.
        x: as for `deepfool`.
        labels: as for `deepfool`.
        bounds: box that the point stays in, as for `deepfool`; the authors' `lb` and `ub`. With
            None, each step moves one coordinate, as far as necessary. To limit the amplitude, pass
            a box round `x`.
        lambda_: how far behind the boundary the hyperplane lies.
        overshoot: share by which the perturbation is lengthened, here and in DeepFool.
        steps: largest number of DeepFool searches.
        deepfool_steps: largest number of linearisations in each of them.
        classes: as for `deepfool`.
        on_gradient: as for `deepfool`.

    Returns:
        Tensor like `x`, detached. If no boundary was found, the point where the search ended.

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
        stuck = (moved == start).flatten(1).all(1)  # every further search would also end here
        active = active[~(fooled | stuck)]
    return perturbed


def _boundary(search: _Search, x: Tensor, box: Box | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """DeepFool's perturbation without the overshoot, and the classes that it left and reached."""
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
    """The lead of the other candidates over the first, and the gradients of these leads.

    `candidates` are (n, k). The leads are (n, k - 1), and the gradients (n, k - 1, ...).
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

    The steepest coordinates move first, each to the edge of the box, and the last one as far as
    needed. This is the published loop over coordinates in closed form. A coordinate's contribution
    does not depend on the others, so a running sum shows where the loop would stop.
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
    """(n, D) steps of the published loop if the hyperplane lies the other way, by `gap` (n, 1).

    Each step increases the distance, so every coordinate moves. The first few move as far as the
    hyperplane was away. Once that is outside of the box, all others move to the edge.
    """
    step = torch.where(steep > 0, room, 0)
    ahead = (steep * room).flip(1).cummax(1).values.flip(1)  # the most that the rest can gain
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
