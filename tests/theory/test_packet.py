"""The relation against closed forms and another integration, and its invariances."""

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from adaptive import uncertainty
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import simpson

from llm_attack.theory.packet import (
    Uncertainty,
    gauss_legendre,
    uncertainty_on_nodes,
)

inf = math.inf


def at(psi, x):
    return psi(torch.tensor(x, dtype=torch.float64)).item()


def sine(n, length):
    """An eigenstate of the box [0, length]."""
    k = n * math.pi / length
    dx = length * math.sqrt(1 / 12 - 1 / (2 * (n * math.pi) ** 2))
    psi, slope = lambda x: torch.sin(k * x), lambda x: k * math.cos(k * x)
    return psi, slope, 0.0, length, (length / 2, dx, 0, k, 0.5)


def gaussian(centre, sigma):
    psi = lambda x: 3 * torch.exp(-(((x - centre) / sigma) ** 2) / 4)  # noqa: E731
    slope = lambda x: (centre - x) / (2 * sigma**2) * at(psi, x)  # noqa: E731
    return psi, slope, -inf, inf, (centre, sigma, 0, 1 / (2 * sigma), 0.5)


def constant(a, b):
    mean, dx = (a + b) / 2, (b - a) / math.sqrt(12)
    return lambda x: torch.full_like(x, -2), lambda x: 0.0, a, b, (mean, dx, 0, 0, 0)


def line(b):
    """Proportional to x on [0, b]: it leaves the interval at full height."""
    expected = (3 * b / 4, b * math.sqrt(3 / 80), 3 / (2 * b), math.sqrt(3) / (2 * b), 1 / 8)
    return lambda x: x, lambda x: 1.0, 0.0, b, expected


def exponential(k, b):
    """exp(kx) on [0, b] is an eigenfunction of the derivative: dp is 0, and so is the bound."""
    e = math.exp(2 * k * b)
    mean = b * e / (e - 1) - 1 / (2 * k)
    square = b**2 * e / (e - 1) - mean / k
    psi, slope = lambda x: torch.exp(k * x), lambda x: k * math.exp(k * x)
    return psi, slope, 0.0, b, (mean, math.sqrt(square - mean**2), k, 0, 0)


def half_line():
    """exp(-x) on [0, inf): one end only."""
    return lambda x: torch.exp(-x), lambda x: -math.exp(-x), 0.0, inf, (0.5, 0.5, -1, 0, 0)


def secant():
    """1 / cosh x on the line: above ½, at π / 6."""
    psi, slope = lambda x: 1 / torch.cosh(x), lambda x: -math.tanh(x) / math.cosh(x)
    expected = (0, math.pi / math.sqrt(12), 0, 1 / math.sqrt(3), 0.5)
    return psi, slope, -40.0, 40.0, expected


KNOWN = {
    "gaussian": gaussian(0.0, 1.0),
    "narrow gaussian off the origin": gaussian(3.0, 0.2),
    "lowest sine": sine(1, 1.0),
    "third sine": sine(3, 2.5),
    "constant": constant(-1.0, 1.0),
    "constant off the origin": constant(2.0, 7.0),
    "line": line(1.0),
    "longer line": line(3.0),
    "exponential": exponential(1.5, 2.0),
    "falling exponential": exponential(-0.7, 3.0),
    "half-line": half_line(),
    "secant": secant(),
}
known = pytest.mark.parametrize("case", KNOWN.values(), ids=KNOWN)


def close(found, expected, tolerance=1e-9):
    for name, value, wanted in zip(
        Uncertainty.__dataclass_fields__, astuple(found), expected, strict=True
    ):
        assert value == pytest.approx(wanted, abs=tolerance), name


@known
def test_closed_forms_with_the_derivative_given(case):
    psi, slope, a, b, expected = case
    close(
        uncertainty(lambda x: at(psi, x), a, b, slope),
        expected,
        1e-7,
    )


@known
@pytest.mark.sampled(4)
def test_closed_forms_with_the_derivative_found(case):
    psi, _, a, b, expected = case
    close(uncertainty(psi, a, b), expected, 1e-7)


@known
def test_closed_forms_on_nodes(case):
    psi, _, a, b, expected = case
    if math.isinf(b):
        middle, sigma, *_ = expected
        a, b = max(a, middle - 15 * sigma), middle + 30 * sigma
    close(uncertainty_on_nodes(psi, a, b, panels=64), expected)


def test_a_gaussian_meets_one_half():
    found = uncertainty(lambda x: torch.exp(-(x**2) / 4), -inf, inf)
    assert found.product == pytest.approx(0.5, abs=1e-12)
    assert found.bound == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("k", (0.5, 4.0, 40.0))
def test_a_packet_without_closed_form(k):
    """Simpson's rule, and variances as differences of means."""
    x = np.linspace(-1, 1, 100_001)
    psi, slope = np.logaddexp(0, -k * x), -k / (1 + np.exp(k * x))
    norm = simpson(psi**2, x=x)
    mean_x = simpson(x * psi**2, x=x) / norm
    dx = math.sqrt(simpson(x**2 * psi**2, x=x) / norm - mean_x**2)
    mean_p = (psi[-1] ** 2 - psi[0] ** 2) / norm / 2
    dp = math.sqrt(simpson(slope**2, x=x) / norm - mean_p**2)
    bound = abs(simpson((x - mean_x) * psi * slope, x=x)) / norm
    expected = (mean_x, dx, mean_p, dp, bound)
    packet = lambda x: torch.nn.functional.softplus(-k * x, threshold=1000)  # noqa: E731
    close(uncertainty(packet, -1, 1), expected, 1e-8)
    close(uncertainty_on_nodes(packet, -1, 1), expected, 1e-8)


numbers = st.floats(-3, 3)
ends = st.tuples(st.floats(-2, 2), st.floats(0.5, 3)).map(lambda e: (e[0], e[0] + e[1]))


@given(numbers, numbers, ends)
def test_equality_where_cauchy_and_schwarz_have_it(alpha, beta, ends):
    found = uncertainty_on_nodes(lambda x: torch.exp(-alpha * x**2 + beta * x), *ends)
    assert found.product.item() == pytest.approx(found.bound.item(), abs=1e-7)


waves = st.lists(st.tuples(numbers, numbers, st.floats(0, 6)), min_size=1, max_size=4)


def packet_of(waves):
    return lambda x: (
        0.01 + sum(c * torch.sin(k * x + shift) * torch.exp(-(x**2) / 4) for c, k, shift in waves)
    )


@given(waves, ends)
def test_no_packet_is_below_its_bound(waves, ends):
    found = uncertainty_on_nodes(packet_of(waves), *ends)
    found.check(1e-9)
    assert found.bound >= 0


@given(waves, ends, st.floats(0.2, 5), st.floats(-5, 5), st.sampled_from((-7.0, 0.01)))
def test_units_origin_norm_and_sign_do_not_matter(waves, ends, scale, origin, factor):
    """In other units, dx and <x> go with the scale, dp and <p> against it, the bound stays."""
    psi = packet_of(waves)
    one = uncertainty_on_nodes(psi, *ends)
    moved = [end * scale + origin for end in ends]
    two = uncertainty_on_nodes(lambda x: factor * psi((x - origin) / scale), *moved)
    expected = (
        one.mean_x * scale + origin,
        one.dx * scale,
        one.mean_p / scale,
        one.dp / scale,
        one.bound,
    )
    for value, wanted in zip(astuple(two), expected, strict=True):
        # dp is the root of a difference that may be nearly 0
        assert value.item() == pytest.approx(wanted.item(), rel=1e-6, abs=1e-5)


def test_packets_of_a_batch_do_not_mix():
    k = torch.tensor([[0.5, 1.0], [2.0, 8.0]], dtype=torch.float64)
    batch = uncertainty_on_nodes(lambda x: torch.exp(torch.sin(k[..., None] * x)), -1, 2)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        alone = uncertainty(lambda x, k=k[i, j]: torch.exp(torch.sin(k * x)), -1, 2)
        close(Uncertainty(*(v[i, j].item() for v in astuple(batch))), astuple(alone))


def test_parameters_get_no_gradient():
    weight = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    found = uncertainty_on_nodes(lambda x: torch.exp(weight * x), 0, 1)
    assert not found.product.requires_grad
    assert weight.grad is None


def test_nodes_and_weights():
    """The rule is exact for polynomials below twice its order, in every panel."""
    x, weights = gauss_legendre(-1.0, 3.0, panels=4, order=3)
    assert len(x) == len(weights) == 12
    assert x.dtype == weights.dtype == torch.float64
    for panel in range(4):
        part = slice(3 * panel, 3 * panel + 3)
        a, b = panel - 1, panel
        for power in range(6):
            exact = (b ** (power + 1) - a ** (power + 1)) / (power + 1)
            assert (weights[part] * x[part] ** power).sum().item() == pytest.approx(exact)


@pytest.mark.parametrize(
    ("product", "fails"), ((0.4, True), (math.nan, True), (0.5 - 1e-6, True), (0.5 - 1e-9, False))
)
def test_check(product, fails):
    """One packet below its bound is enough."""
    found = Uncertainty(0, 1, 0, torch.tensor([0.6, product], dtype=torch.float64), 0.5)
    if fails:
        with pytest.raises(ArithmeticError, match="below its bound"):
            found.check()
    else:
        found.check()


@pytest.mark.parametrize("value", (0.0, math.nan, math.inf))
def test_packets_that_are_none(value):
    with pytest.raises(ValueError, match="psi"):
        uncertainty_on_nodes(lambda x: torch.full_like(x, value), 0, 1)


def test_noise_has_no_integral():
    draw = np.random.default_rng(0)
    with pytest.raises(ValueError, match="do not converge"):
        uncertainty(lambda x: draw.random(), 0, 1, lambda x: 0.0)
