"""The uncertainty relation by adaptive quadrature: a reference for the package's rule."""

import math
from functools import cache

import torch
from scipy.integrate import quad_vec

from llm_attack.theory.packet import _relation, _with_slope


def uncertainty(psi, a, b, slope=None):
    """The relation for a function of floats; without `slope`, its derivative, psi takes tensors.

    Raises:
        ValueError: psi is zero on the whole interval, or an integral is not finite.
    """

    @cache  # the integrals share most of their nodes
    def at(x):
        if slope is not None:
            return psi(x), slope(x)
        value, change = _with_slope(psi, torch.tensor(x, dtype=torch.float64))
        return value.item(), change.item()

    def integrate(integrand, negligible):
        # least absolute tolerance: reached where the integrand is 0 everywhere
        options = {"epsrel": 1e-10, "epsabs": max(negligible, 1e-290), "limit": 2000}
        value, _, info = quad_vec(lambda x: integrand(x, *at(x)), a, b, full_output=True, **options)
        if info.status not in (0, 2):  # 2: exact but for rounding
            raise ValueError(f"psi: its integrals do not converge on [{a}, {b}]")
        return float(value)

    ends = ((a, at(a)[0] if math.isfinite(a) else 0), (b, at(b)[0] if math.isfinite(b) else 0))
    return _relation(integrate, ends)
