"""The uncertainty relation of a real, one-dimensional packet psi on an interval [a, b].

With psi normalised to ∫psi² = 1, x is position and p the derivative:

    <x> = ∫x psi²   dx² = ∫(x - <x>)² psi²   <p> = ∫psi psi'   dp² = ∫(psi' - <p> psi)²

Integration by parts and the inequality of Cauchy and Schwarz give

    dx dp >= ½ |1 - [(x - <x>) psi²] from a to b|

The bound is ½ if psi vanishes at both ends. Both sides are equal if psi' - <p> psi is a multiple of
(x - <x>) psi. This holds for every exp(-αx² + βx), on any interval and for either sign of α. The
packet has to be continuous, with a square-integrable derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Ends = tuple[tuple[float, Any], tuple[float, Any]]


@dataclass(frozen=True)
class Uncertainty:
    """The two sides of the relation: numbers, or tensors with a value for each packet of a batch.

    Attributes:
        mean_x: <x>, in the units of x.
        dx: width in position, in the units of x.
        mean_p: <p>, in 1 / units of x.
        dp: width in the derivative, in 1 / units of x.
        bound: lower bound of dx · dp on this interval, without a unit.
    """

    mean_x: Any
    dx: Any
    mean_p: Any
    dp: Any
    bound: Any

    @property
    def product(self) -> Any:
        return self.dx * self.dp

    def check(self, tolerance: float = 1e-8) -> None:
        """Raises `ArithmeticError` unless dx · dp >= bound - tolerance holds for every packet.

        The relation is a theorem. So a violation shows an inaccurate integral, or a NaN.
        """
        margin = torch.as_tensor(self.product - self.bound)
        if not (margin >= -tolerance).all():
            raise ArithmeticError(f"dx·dp is below its bound: by {-margin}")


def uncertainty_on_nodes(
    psi: Callable[[Tensor], Tensor],
    a: float,
    b: float,
    panels: int = 32,
    order: int = 16,
    kinks: Sequence[float] = (),
) -> Uncertainty:
    """The relation for a batch of smooth torch functions, with one call of `psi`.

    It uses composite Gauss-Legendre quadrature with exact derivatives (forward-mode
    differentiation). The error falls exponentially with `order` if panels resolve the packet.

    Args:
        psi: maps positions (M,) in float64 to values (..., M), of any norm.
        a: left end of the interval, finite.
        b: right end, finite.
        panels: number of equal parts of the interval.
        order: nodes in each part.
        kinks: positions at which the derivative of a packet jumps. Parts are divided there.

    Returns:
        Tensors of the shape of the batch.

    Raises:
        ValueError: psi is zero on the whole interval, or an integral is not finite.
    """
    x, weights = gauss_legendre(a, b, panels, order, kinks)
    x = torch.cat([x, torch.tensor([a, b], dtype=x.dtype)])
    value, slope = _with_slope(psi, x)
    ends = ((a, value[..., -2]), (b, value[..., -1]))
    x, value, slope = (y[..., :-2].to(value.device) for y in (x, value, slope))
    weights = weights.to(value.device)
    return _relation(lambda integrand, _: (integrand(x, value, slope) * weights).sum(-1), ends)


def gauss_legendre(
    a: float, b: float, panels: int, order: int, kinks: Sequence[float] = ()
) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the composite rule on [a, b], in float64, with `order` nodes per panel.

    Panels are equal, except that `kinks` divide some of them.
    """
    nodes, weights = np.polynomial.legendre.leggauss(order)
    edges = np.union1d(np.linspace(a, b, panels + 1), np.asarray(kinks, dtype=float))
    half = np.diff(edges)[:, None] / 2
    x = (edges[:-1, None] + half * (nodes + 1)).ravel()
    return torch.from_numpy(x), torch.from_numpy((half * weights).ravel())


def _with_slope(psi: Callable[[Any], Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative of an elementwise function; each packet of a batch has its own."""
    with torch.no_grad():
        pair = torch.func.jvp(psi, (x,), (torch.ones_like(x),))
    return pair[0], pair[1]


def _relation(integrate: Callable[[Callable[..., Any], Any], Any], ends: Ends) -> Uncertainty:
    """All five numbers, from integrals of functions of (x, psi, psi') over the interval.

    Args:
        integrate: takes such a function, and an amount that is negligible for its integral.
        ends: (a, psi(a)) and (b, psi(b)). The values have the shape of the batch.
    """
    norm = integrate(lambda x, f, d: f * f, 0)
    if not (torch.as_tensor(norm) > 0).all():
        raise ValueError("psi: must not vanish on the whole interval, nor be NaN")
    # Means and variances may be 0, so the mean square says what is negligible.
    square_x = integrate(lambda x, f, d: (x * f) ** 2, 0)
    square_p = integrate(lambda x, f, d: d * d, 0)
    mean_x = integrate(lambda x, f, d: x * f * f, 1e-10 * (norm * square_x) ** 0.5) / norm
    mean_p = integrate(lambda x, f, d: f * d, 1e-10 * (norm * square_p) ** 0.5) / norm
    m, p = _column(mean_x), _column(mean_p)
    dx = (integrate(lambda x, f, d: ((x - m) * f) ** 2, 1e-16 * square_x) / norm) ** 0.5
    dp = (integrate(lambda x, f, d: (d - p * f) ** 2, 1e-16 * square_p) / norm) ** 0.5
    left, right = ((end - mean_x) * f * f / norm if math.isfinite(end) else 0 for end, f in ends)
    relation = Uncertainty(mean_x, dx, mean_p, dp, 0.5 * abs(1 - (right - left)))
    if not torch.isfinite(torch.as_tensor(relation.product + relation.bound)).all():
        raise ValueError("psi: its moments are not finite on this interval")
    return relation


def _column(value: Any) -> Any:
    """Adds a last axis, that of the positions, to a value per packet."""
    return value.unsqueeze(-1) if isinstance(value, Tensor) else value
