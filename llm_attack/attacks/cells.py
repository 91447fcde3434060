"""Rounding cells: for each coordinate, the interval of numbers that a format rounds to one code.

A point in the cells of x is quantized to the same codes as x, with the same scales. The ends of the
cells are exact in the dtype of x: the next number beyond an end has another code, or would change
the scale.

An attack that is confined to cells moves in coordinates z, where the cell is the box [0, 1]. So the
attacks of this package apply unchanged, and their lengths are in widths of a cell.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llm_attack.attacks.closures import Known, Loss, Losses, Watch
from llm_attack.attacks.formats import NF4, Format
from llm_attack.attacks.loop import trajectory
from llm_attack.attacks.norms import Ball, Elements
from llm_attack.attacks.settings import Attack
from llm_attack.base.errors import UsageError

# Dettmers et al. 2023, "QLoRA" (arXiv 2305.14314), appendix E
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16}
_INTEGERS |= {torch.float32: torch.int32, torch.float64: torch.int64}

_ALL, _NOTHING, _NOBODY = Elements(), Known(), Watch()

Codes = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cells:
    """The cells of a point x, and the point itself. All tensors are like x.

    Attributes:
        x: the point.
        low, high: the ends of the cells, which belong to them. Coordinates that set a scale cannot
            move: both ends are x.
        rounded: the numbers that the format keeps in place of x, in the dtype of x.
    """

    x: Tensor
    low: Tensor
    high: Tensor
    rounded: Tensor

    @classmethod
    def of(cls, format: Format, x: Tensor) -> Cells:
        """The cells of `x`, whose last dimension is a row of a table.

        Raises:
            ValueError: the rows are no whole number of groups.
        """
        x = x.detach()
        codes, values, limits = _quantizer(format, x)
        code = codes(x)
        rounded = values(code).to(x.dtype)
        if limits is None:
            end = torch.full_like(x, torch.finfo(x.dtype).max)
            least, most, stays = -end, end, ~x.isfinite()
        else:
            least, most = limits
            stays = ((x == least) & (least < 0)) | ((x == most) & (most > 0))
        ends = [_farthest(codes, code, x, end) for end in (least, most)]
        low, high = (torch.where(stays, x, end) for end in ends)
        return cls(x, low, high, rounded)

    @property
    def width(self) -> Tensor:
        """The widths of the cells."""
        return self.high - self.low

    @property
    def start(self) -> Tensor:
        """The coordinates z of x, from 0 to 1; in a cell that is a single number, 0."""
        x, low, high = self.x, self.low, self.high
        about = torch.finfo(x.dtype)
        inside = ((x - low) / self.width).clamp(about.tiny, 1 - about.eps / 2)
        return torch.where(x == low, 0, torch.where(x == high, 1, inside))

    def point(self, z: Tensor) -> Tensor:
        """The point with coordinates z, exactly in the cells. Its gradient is the width.

        At the start it is x, and at 0 and 1 the ends of the cells, to the bit.
        """
        with torch.no_grad():
            inside = torch.minimum(torch.maximum(self.low + self.width * z, self.low), self.high)
            inside = torch.where(z == 1, self.high, inside)
            inside = torch.where(z == self.start, self.x, inside)
        return inside + self.width * (z - z.detach()) if z.requires_grad else inside


def check_cells(name: str, dtype: torch.dtype, widths: Collection[int]) -> None:
    """Refuses a format whose cells do not exist for points of this kind.

    Args:
        name: name of the format.
        dtype: dtype of the points.
        widths: the lengths of their rows.

    Raises:
        UsageError: its groups do not divide the rows, or its cells are single numbers.
    """
    format = Format.of(name)
    odd = next((width for width in widths if width % (format.group or 1)), None)
    if odd is not None:
        raise UsageError(f"cells={name}: must have groups that divide the width, {odd}")
    if not format.scaled:
        coarse, own = (torch.finfo(kind).eps for kind in (getattr(torch, name), dtype))
        if coarse <= own:
            raise UsageError(
                f"cells={name}: must be a format with fewer digits than the model's dtype, {dtype}"
            )


def confined(
    attack: Attack,
    cells: Cells,
    losses: Losses,
    *,
    known: Known = _NOTHING,
    watch: Watch = _NOBODY,
    elements: Elements = _ALL,
    **options: Any,
) -> Iterator[Tensor]:
    """`trajectory` of an attack in cells, with lengths in widths of a cell.

    Args:
        attack: the attack, with epsilon 1 for the whole cell.
        cells: the cells of the clean point.
        losses: functions of a point like `cells.x`.
        known: values at the clean point; its gradient is with respect to the point.
        watch: gets gradients with respect to z; coordinates that cannot move have 1.
        elements: as for `trajectory`.
        **options: the other arguments of `trajectory`.
    """
    if attack.kind.inside == "none":
        moves = Ball.of(attack, cells.x, elements=elements).moves
        yield torch.where(moves, cells.rounded, cells.x)
        return

    def through(loss: Loss) -> Loss:
        return lambda z: loss(cells.point(z))

    def maybe(loss: Loss | None) -> Loss | None:
        return None if loss is None else through(loss)

    def count(slope: Tensor) -> None:
        seen(slope.masked_fill(fixed, 1))

    width, fixed, seen = cells.width, cells.width == 0, watch.on_gradient
    if known.gradient is not None:
        known = replace(known, gradient=known.gradient * width)
    inner = Losses(
        maybe(losses.loss),
        maybe(losses.target_loss),
        [through(loss) for loss in losses.target_losses],
        maybe(losses.gap),
    )
    watch = replace(watch, on_gradient=count)
    more: Any = {"known": known, "watch": watch, "elements": elements, **options}
    for z in trajectory(attack.in_ball, cells.start, inner, bounds=(0, 1), **more):
        yield cells.point(z)


def _quantizer(format: Format, x: Tensor) -> tuple[Codes, Codes, tuple[Tensor, Tensor] | None]:
    """The codes of numbers, the numbers of codes, and the ends of the range of each coordinate.

    The scales are computed from `x`. Codes never fall as numbers rise. The arithmetic is in
    float32, or in the dtype of `x` if that is wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if not format.scaled:
        dtype = getattr(torch, format.kind)
        return (lambda v: v.to(dtype).to(wide)), (lambda code: code), None
    group = format.group or x.shape[-1]
    if x.shape[-1] % group:
        raise ValueError(
            f"cells={format.name}: must have groups that divide the width, {x.shape[-1]}"
        )
    grouped = (*x.shape[:-1], x.shape[-1] // group, group)
    of_x = x.to(wide).reshape(grouped)
    if format.zero_point:
        least, most = of_x.amin(-1, True).clamp(max=0), of_x.amax(-1, True).clamp(min=0)
    else:
        most = of_x.abs().amax(-1, True)
        least = -most
    limits = (end.expand(grouped).reshape(x.shape).to(x.dtype) for end in (least, most))

    def in_groups(function: Codes) -> Codes:
        return lambda v: function(v.to(wide).reshape(grouped)).reshape(x.shape)

    codes, values = _nf4(most) if format.kind == NF4 else _integers(format, least, most)
    low, high = limits
    return in_groups(codes), in_groups(values), (low, high)


def _integers(format: Format, least: Tensor, most: Tensor) -> tuple[Codes, Codes]:
    """Integer codes: scale and zero-point as in torchao's `choose_qparams_affine`.

    Symmetric codes go from -127 to 127 (-7 to 7), those with a zero-point from 0 to 255 (0 to 15).
    """
    steps = {"int8": 255, "int4": 15}[format.kind]
    first, last = (0, steps) if format.zero_point else (-(steps // 2), steps // 2)
    scale = (most - least) / (last - first) if format.zero_point else most / last
    scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)
    zero = torch.zeros_like(scale)
    if format.zero_point:
        zero = (-torch.round(least / scale)).clamp(first, last)
    return (
        lambda v: (torch.round(v * (1.0 / scale)) + zero).clamp(first, last),
        lambda code: (code - zero) * scale,
    )


def _nf4(most: Tensor) -> tuple[Codes, Codes]:
    """NF4: the nearest of 16 values, times the largest absolute value (as in bitsandbytes)."""
    table = torch.tensor(_NF4, dtype=most.dtype, device=most.device)
    bounds = (table[:-1] + table[1:]) / 2
    inverse = 1.0 / most.clamp(min=torch.finfo(most.dtype).tiny)
    return (
        lambda v: torch.bucketize((v * inverse).clamp(-1, 1), bounds).to(most.dtype),
        lambda code: table[code.long()] * most,
    )


def _farthest(codes: Codes, code: Tensor, x: Tensor, end: Tensor) -> Tensor:
    """The number with the code of `x` that is nearest to `end`, by bisection over all numbers."""
    inside, outside = _ordered(x), _ordered(end)
    reached = codes(end) == code
    for _ in range(8 * x.element_size() + 1):
        middle = (inside >> 1) + (outside >> 1) + (inside & outside & 1)  # without overflow
        same = codes(_numbers(middle, x.dtype)) == code
        inside, outside = torch.where(same, middle, inside), torch.where(same, outside, middle)
    return torch.where(reached, end, _numbers(inside, x.dtype))


def _ordered(x: Tensor) -> Tensor:
    """int64 numbers in the order of floats, with a step of 1 between neighbours."""
    bits = x.contiguous().view(_INTEGERS[x.dtype])
    least = torch.iinfo(bits.dtype).min
    return torch.where(bits < 0, least - bits, bits).long()


def _numbers(ordered: Tensor, dtype: torch.dtype) -> Tensor:
    """The floats of `_ordered`."""
    kind = _INTEGERS[dtype]
    least = torch.iinfo(kind).min
    return torch.where(ordered < 0, least - ordered, ordered).to(kind).view(dtype)
