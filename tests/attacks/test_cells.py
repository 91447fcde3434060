"""Rounding cells: exact to the bit for each format, and attacks that stay in them."""

import numpy as np
import pytest
import torch

from llm_attack.attacks import Attack, Elements, Known, Losses, trajectory
from llm_attack.attacks.cells import Cells, check_cells, confined
from llm_attack.attacks.formats import FLOATS, Format
from llm_attack.base.errors import UsageError

from .helpers import keys, linear, rng

INTEGERS = ("int8", "int4", "int8-g32", "int4-asym", "int8-asym-g16", "int4-asym-g32")
ALL = (*INTEGERS, "nf4", "nf4-g32", *FLOATS)
NAMES = ("rounding", "random_rounding", "fgsm_rounding", "worst_rounding")


def table(dtype=torch.float32, rows=24, seed=1):
    """Rows of several scales, with a row of zeros, one of a sign, and a tie of two codes."""
    x = torch.randn(rows, 64, generator=rng(seed), dtype=torch.float64)
    x *= torch.logspace(-3, 1, rows, dtype=torch.float64)[:, None]
    x[0], x[1] = 0, x[1].abs()
    x[2, :3] = torch.tensor([127.0, 2.5, -3.5])  # with scale 1 in int8, exact ties
    x[2, 3:] = x[2, 3:].clamp(-1, 1)
    return x.to(dtype)


def quantized(name, x):
    """Codes and scales in NumPy, by the definition of the format, from the table itself."""
    rows = x.numpy()
    kind, *more = name.split("-")
    wide = np.float64 if rows.dtype == np.float64 else np.float32
    group = next((int(part[1:]) for part in more if part[0] == "g"), rows.shape[-1])
    rows = rows.reshape(len(rows), -1, group)
    steps = {"int8": 255, "int4": 15}[kind]
    if "asym" in more:
        low, high = rows.min(-1, keepdims=True), rows.max(-1, keepdims=True)
        low, high = np.minimum(low, wide(0)), np.maximum(high, wide(0))
        scale = np.maximum((high - low) / wide(steps), np.finfo(wide).tiny)
        zero = np.clip(-np.rint(low / scale), 0, steps)
        return np.clip(np.rint(rows * (wide(1) / scale)) + zero, 0, steps), scale, zero
    last = steps // 2
    scale = np.maximum(np.abs(rows).max(-1, keepdims=True) / wide(last), np.finfo(wide).tiny)
    codes = np.clip(np.rint(rows * (wide(1) / scale)), -last, last)
    return codes, scale, np.zeros_like(scale)


def points(cells):
    """Points of the cells: both ends, mixtures of them, and points inside."""
    mixed = torch.rand(cells.x.shape, generator=rng(3)) < 0.5
    inside = torch.rand(cells.x.shape, generator=rng(4), dtype=torch.float64).to(cells.x.dtype)
    return [cells.low, cells.high, torch.where(mixed, cells.low, cells.high), cells.point(inside)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", INTEGERS)
def test_points_of_cells_have_the_codes_and_the_scales_of_the_table(name, dtype):
    x = table(dtype)
    cells = Cells.of(Format.of(name), x)
    codes, scale, zero = quantized(name, x)
    assert np.array_equal(((codes - zero) * scale).reshape(x.shape), cells.rounded.numpy())
    for point in points(cells):
        for here, there in zip(quantized(name, point), (codes, scale, zero), strict=True):
            assert np.array_equal(here, there)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", INTEGERS)
def test_the_next_number_beyond_a_cell_has_another_code_or_a_wider_range(name, dtype):
    x, format = table(dtype), Format.of(name)
    cells = Cells.of(format, x)
    codes, _, _ = quantized(name, x)
    moves = (cells.width > 0).numpy()
    for end, way in ((cells.high, torch.inf), (cells.low, -torch.inf)):
        beyond = torch.nextafter(end, torch.tensor(way, dtype=dtype))
        outside = outside_of_range(format, x, beyond)
        for i in range(64):  # each coordinate leaves its cell alone
            alone = x.clone()
            alone[:, i] = beyond[:, i]
            changed = (quantized(name, alone)[0] != codes).reshape(x.shape)[:, i]
            assert (changed | outside[:, i] | ~moves[:, i]).all()


def outside_of_range(format, x, beyond):
    """Booleans like x: whether the coordinate is outside of the range of its row or group."""
    grouped = x.reshape(len(x), -1, format.group or 64)
    low, high = grouped.amin(-1, True).clamp(max=0), grouped.amax(-1, True).clamp(min=0)
    if not format.zero_point:
        high = torch.maximum(-low, high)
        low = -high
    beyond = beyond.reshape(grouped.shape)
    return ((beyond < low) | (beyond > high)).reshape(x.shape).numpy()


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cells_of_floats_are_those_of_the_cast(name, dtype):
    x, kind = table(dtype), getattr(torch, name)
    cells = Cells.of(Format.of(name), x)
    assert torch.equal(cells.rounded, x.to(kind).to(dtype))
    for point in points(cells):
        assert torch.equal(point.to(kind), x.to(kind))
    for end, way in ((cells.high, torch.inf), (cells.low, -torch.inf)):
        beyond = torch.nextafter(end, torch.tensor(way, dtype=dtype))
        assert (beyond.to(kind) != x.to(kind)).all()


@pytest.mark.parametrize("name", INTEGERS)
def test_torchao_gives_the_points_of_cells_the_same_codes(name):
    ao = pytest.importorskip("torchao.quantization.quant_primitives", reason="torchao")
    format, x = Format.of(name), table()[1:]
    steps = {"int8": 255, "int4": 15}[format.kind]
    first, last = (0, steps) if format.zero_point else (-(steps // 2), steps // 2)
    block, kind = (1, format.group or 64), torch.uint8 if format.zero_point else torch.int8
    mapping = ao.MappingType.ASYMMETRIC if format.zero_point else ao.MappingType.SYMMETRIC

    def coded(x):
        scale, zero = ao.choose_qparams_affine(
            x, mapping, block, kind, first, last, eps=torch.finfo(x.dtype).tiny
        )
        codes = ao.quantize_affine(x, block, scale, zero, kind, first, last)
        values = ao.dequantize_affine(codes, block, scale, zero, kind, first, last)
        return codes, scale, zero, values

    cells = Cells.of(format, x)
    codes, scale, zero, values = coded(x)
    assert torch.equal(values, cells.rounded)
    for point in points(cells):
        for here, there in zip(coded(point), (codes, scale, zero, values), strict=True):
            assert torch.equal(here, there)
    for end, way in ((cells.high, torch.inf), (cells.low, -torch.inf)):
        beyond = torch.nextafter(end, torch.tensor(way))
        other = ao.quantize_affine(beyond, block, scale, zero, kind, first, last)
        inside = (cells.width > 0).numpy() & ~outside_of_range(format, x, beyond)
        assert (other != codes).numpy()[inside].all()


@pytest.mark.parametrize("name", ["nf4", "nf4-g32"])
def test_bitsandbytes_gives_the_points_of_cells_the_same_codes(name):
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes").functional
    group, x = Format.of(name).group, table()[1:]

    def coded(x):
        return functional.quantize_4bit(x.contiguous(), blocksize=group, quant_type="nf4")

    cells = Cells.of(Format.of(name), x)
    packed, state = coded(x)
    assert torch.equal(functional.dequantize_4bit(packed, state), cells.rounded)
    for point in points(cells):
        here, there = coded(point)
        assert torch.equal(here, packed)
        assert torch.equal(there.absmax, state.absmax)
    # beyond an end, the coordinate has another code
    for end, way in ((cells.high, torch.inf), (cells.low, -torch.inf)):
        beyond = torch.nextafter(end, torch.tensor(way))
        ends = x.reshape(len(x), -1, group).abs().amax(-1, True).expand(-1, -1, group)
        inside = (cells.width > 0) & (beyond.abs() <= ends.reshape(x.shape))
        codes = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], -1)
        new, _ = coded(torch.where(inside, beyond, x))
        new = torch.stack([new.reshape(-1) >> 4, new.reshape(-1) & 15], -1)
        assert torch.equal(new.flatten() != codes.flatten(), inside.flatten())


def test_gguf_gives_points_inside_the_cells_the_same_codes():
    """Q8_0 rounds ties away from zero, so points inside; its scale is kept in float16."""
    gguf = pytest.importorskip("gguf", reason="gguf")
    x = table()[3:]
    cells = Cells.of(Format.of("int8-g32"), x)
    whole = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0)
    for share in (0.001, 0.3, 0.999):
        point = cells.point(torch.full_like(x, share))
        again = gguf.quants.quantize(point.numpy(), gguf.GGMLQuantizationType.Q8_0)
        assert np.array_equal(again, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ALL)
def test_coordinates_of_cells_are_exact_at_the_start_and_at_the_ends(name, dtype):
    x = table(dtype)
    cells = Cells.of(Format.of(name), x)
    assert torch.equal(cells.point(cells.start), x)
    moves = cells.width > 0
    for z, end in ((0.0, cells.low), (1.0, cells.high)):
        assert torch.equal(cells.point(torch.full_like(x, z))[moves], end[moves])
    z = torch.rand(x.shape).to(dtype).requires_grad_(True)
    (slope,) = torch.autograd.grad(cells.point(z).sum(), z)
    assert torch.equal(slope, cells.width)


def attacked(name, x, loss, format="int4", **more):
    cells = Cells.of(Format.of(format), x)
    attack = Attack(name, 1.0, cells=format, **more)
    *_, point = confined(attack, cells, Losses(loss), keys=keys(len(x)))
    return cells, point


@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize("name", ["fgsm_rounding", "worst_rounding"])
def test_the_worst_of_a_linear_model_is_the_end_that_the_gradient_points_to(name, format):
    x, w = table(), torch.randn(24, 64, generator=rng(5))
    w[:, 7] = 0
    cells, point = attacked(name, x, linear(w), format, steps=4)
    expected = torch.where(w > 0, cells.high, torch.where(w < 0, cells.low, x))
    assert torch.equal(point, expected)


def test_no_point_leaves_the_cells():
    x, seen = table(), []

    def loss(point):
        seen.append(point.detach().clone())
        return (point.sin() * point.cumsum(-1).cos()).sum(-1)

    for name in NAMES[1:]:
        cells, point = attacked(name, x, loss, "int8-g32", steps=6, restarts=2)
        for other in (point, *seen):
            assert ((cells.low <= other) & (other <= cells.high)).all()
    assert len(seen) > 12


@pytest.mark.parametrize("name", ["fgsm_rounding", "worst_rounding"])
def test_a_gradient_that_is_known_gives_the_same_point(name):
    x, w = table(), torch.randn(24, 64, generator=rng(6))
    loss = linear(w)
    cells, expected = attacked(name, x, loss, steps=3)
    attack, known = Attack(name, 1.0, cells="int4", steps=3), Known(loss(x), w)
    *_, point = confined(attack, cells, Losses(loss), known=known)
    assert torch.equal(point, expected)


def test_rounding_is_the_formats_own_and_random_rounding_goes_to_the_ends():
    x = table(rows=200)
    cells, point = attacked("rounding", x, linear(torch.ones_like(x)))
    assert torch.equal(point, cells.rounded)
    cells, point = attacked("random_rounding", x, linear(torch.ones_like(x)))
    up, down = point == cells.high, point == cells.low
    assert (up | down).all()
    moves = cells.width > 0
    n, ups = int(moves.sum()), int(up[moves].sum())
    assert abs(ups - n / 2) < 3 * n**0.5  # six standard deviations


def test_elements_that_do_not_move_stay_to_the_bit():
    x = table()
    mask = torch.arange(24) % 2 == 0
    cells = Cells.of(Format.of("int4"), x)
    for name in NAMES:
        attack = Attack(name, 1.0, cells="int4", steps=2)
        more = {"keys": keys(24), "elements": Elements(mask)}
        *_, point = confined(attack, cells, Losses(linear(torch.ones_like(x))), **more)
        assert torch.equal(point[~mask], x[~mask])
        assert (point[mask] != x[mask]).any()


def test_cells_that_do_not_exist_are_refused():
    with pytest.raises(UsageError, match=r"cells=int4-g48: must have groups that divide .* 64"):
        check_cells("int4-g48", torch.float32, [64])
    with pytest.raises(UsageError, match=r"cells=bfloat16: must be a format with fewer digits"):
        check_cells("bfloat16", torch.bfloat16, [64])
    check_cells("bfloat16", torch.float16, [64])
    for name in ("int5", "int8-g0", "int4-asym-", "nf4-asym", "float16-g8"):
        with pytest.raises(UsageError, match=f"cells='{name}': must be int8 or int4"):
            Format.of(name)


def test_a_group_of_nf4_has_64_coordinates_as_in_qlora():
    plain, named, other = (Format.of(name) for name in ("nf4", "nf4-g64", "nf4-g32"))
    assert (plain.group, named.group, other.group) == (64, 64, 32)
    x = table()
    ends = [torch.stack([c.low, c.high]) for c in (Cells.of(f, x) for f in (plain, named, other))]
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_attacks_in_cells_and_in_balls_do_not_take_the_place_of_each_other():
    with pytest.raises(UsageError, match="cells=None: must be given with one of rounding"):
        Attack("worst_rounding", 1.0)
    with pytest.raises(UsageError, match=r"cells=int8: .* not with attack=fgsm"):
        Attack("fgsm", 1.0, cells="int8")
    with pytest.raises(ValueError, match=r"call attacks\.cells\.confined"):
        list(trajectory(Attack("worst_rounding", 1.0, cells="int8"), table(), lambda x: x.sum(-1)))
