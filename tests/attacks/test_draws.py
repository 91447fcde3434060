"""Random draws: SplitMix64 to the bit, independent of the other elements, fair and uncorrelated."""

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_attack.attacks import Attack, keys_for, perturb, signs, uniform

from .helpers import keys, most_from_half, rng, same_bits

WORD = (1 << 64) - 1
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
INT64 = st.integers(-(2**63), 2**63 - 1)
over_draws = pytest.mark.parametrize("draw", (signs, uniform), ids=lambda draw: draw.__name__)


def splitmix64(state, n):
    """The published generator, on Python's integers."""
    for _ in range(n):
        state = (state + GOLDEN) & WORD
        z = state
        z = ((z ^ (z >> 30)) * MIX_1) & WORD
        z = ((z ^ (z >> 27)) * MIX_2) & WORD
        yield z ^ (z >> 31)


def key_of(word):
    """The key whose first word is `word`: the generator run backwards."""

    def unshift(z, n):
        return z ^ (z >> n) ^ (z >> 2 * n)  # n > 64 / 3

    z = unshift(word, 31) * pow(MIX_2, -1, 2**64) & WORD
    z = unshift(z, 27) * pow(MIX_1, -1, 2**64) & WORD
    key = (unshift(z, 30) - GOLDEN) & WORD
    return torch.tensor([key - 2**64 if key >= 2**63 else key])


def test_the_reference_is_splitmix64():
    """Against the values printed with the public C code for seeds 0 and 1234567."""
    assert next(splitmix64(0, 1)) == 0xE220A8397B1DCDAF
    assert list(splitmix64(1234567, 3)) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@settings(max_examples=50, deadline=None)
@given(st.lists(INT64, min_size=1, max_size=3), st.integers(1, 40))
def test_the_draws_are_those_of_splitmix64(some, n):
    own, x = torch.tensor(some), torch.zeros(len(some), n)
    words = [list(splitmix64(key & WORD, n)) for key in some]
    assert signs(own, x).tolist() == [[-1 if w >> 63 else 1 for w in row] for row in words]
    exact = [[(2 * (w >> 41) + 1 - 2**23) / 2**23 for w in row] for row in words]
    assert uniform(own, x).tolist() == exact


@pytest.mark.parametrize(
    "dtype",
    (
        torch.float32,
        torch.float64,
    ),
    ids=str,
)
def test_uniform_is_strictly_inside_even_at_its_ends(dtype):
    x = torch.zeros(1, 1, dtype=dtype)
    lowest, highest = (uniform(key_of(word), x).item() for word in (0, WORD))
    assert (lowest, highest) != (-1, 1)
    assert -1 < lowest == -highest
    if dtype != torch.bfloat16:
        assert highest == 1 - 2**-23
    middle = [uniform(key_of(word), x).item() for word in ((1 << 63) - 1, 1 << 63)]
    assert middle == [-(2**-23), 2**-23]  # never zero


def test_a_sign_is_the_top_bit():
    words = (0, (1 << 63) - 1, 1 << 63, WORD)
    assert [signs(key_of(word), torch.zeros(1, 1)).item() for word in words] == [1, 1, -1, -1]


@over_draws
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_shape_dtype_and_rounding(draw, dtype):
    x = torch.zeros(3, 4, 5, dtype=dtype)
    got = draw(keys(3), x)
    assert (got.shape, got.dtype) == (x.shape, dtype)
    assert same_bits(got, draw(keys(3), x.float()).to(dtype))


@over_draws
@settings(max_examples=50, deadline=None)
@given(
    st.lists(INT64, min_size=1, max_size=6),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(0, 4),
    st.randoms(use_true_random=False),
)
def test_an_element_has_the_same_draw_whatever_surrounds_it(draw, some, length, width, more, rand):
    """In any batch, in any order, with any padding on the right, at any value of the point."""
    own = torch.tensor(some)
    whole = draw(own, torch.zeros(len(some), length + more, width))
    order = rand.sample(range(len(some)), len(some))
    assert same_bits(draw(own[order], torch.ones(len(some), length + more, width)), whole[order])
    for i in range(len(some)):
        alone = draw(own[i : i + 1], torch.full((1, length, width), math.nan))
        assert same_bits(alone[0], whole[i, :length])


@over_draws
def test_keys_of_two_dimensions_are_as_many_examples(draw):
    own = keys(6)
    flat = draw(own, torch.zeros(6, 7))
    assert same_bits(draw(own.reshape(2, 3), torch.zeros(2, 3, 7)), flat.reshape(2, 3, 7))
    single = draw(own, torch.zeros(6))  # a key per element
    assert same_bits(single, flat[:, 0])


@over_draws
@pytest.mark.parametrize("shape", ((3,), (2, 2), (2, 3, 4, 1)), ids=str)
def test_keys_that_do_not_fit(draw, shape):
    with pytest.raises(ValueError, match=r"keys of shape .* for a point of \(2, 3, 4\)"):
        draw(torch.zeros(shape, dtype=torch.int64), torch.zeros(2, 3, 4))


@over_draws
def test_an_empty_batch(draw):
    assert draw(keys(0), torch.zeros(0, 5)).shape == (0, 5)


def test_keys_for_is_the_hash_of_the_seed_and_the_tokens():
    digest = hashlib.blake2b(b"7:1,22,3", digest_size=8).digest()
    assert keys_for(7, [1, 22, 3]) == int.from_bytes(digest, "little", signed=True)
    assert torch.tensor([keys_for(0, range(n)) for n in range(100)]).dtype == torch.int64


def test_keys_differ():
    inputs = [(s, t) for s in (0, 1, 12) for t in ([], [1], [2], [1, 2], [2, 1], [12], [1, 2, 0])]
    assert len({keys_for(s, t) for s, t in inputs}) == len(inputs)
    assert keys_for(3, (1, 2)) == keys_for(3, [1, 2])


# Statistics. The draws are fixed, so that a test passes always or never; 5 sigma is the deviation
# that a fair generator exceeds once in 1.7 million.
ROWS, COLUMNS = 64, 4096
N = ROWS * COLUMNS
STATISTICS_KEYS = {
    "hashes": torch.tensor([keys_for(1, [i]) for i in range(ROWS)]),
    "neighbours": torch.arange(ROWS),
    "powers of two": torch.tensor([1 << i for i in range(63)] + [-(1 << 63)]),
}
over_keys = pytest.mark.parametrize("own", STATISTICS_KEYS.values(), ids=STATISTICS_KEYS)


@over_keys
def test_signs_are_fair(own):
    drawn = signs(own, torch.zeros(ROWS, COLUMNS))
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    ups = (drawn > 0).sum(1)
    assert abs(ups.sum().item() - N / 2) <= 5 * math.sqrt(N) / 2
    assert (ups - COLUMNS / 2).abs().max() <= most_from_half(COLUMNS, odds=1_700_000)


@over_keys
def test_uniform_has_the_moments_and_the_histogram_of_its_name(own):
    drawn = uniform(own, torch.zeros(ROWS, COLUMNS, dtype=torch.float64))
    assert -1 < drawn.min() and drawn.max() < 1  # noqa: SIM300
    assert abs(drawn.mean()) <= 5 * math.sqrt(1 / 3 / N)
    assert abs((drawn**2).mean() - 1 / 3) <= 5 * math.sqrt(4 / 45 / N)  # Var(u²) = 1/5 - 1/9
    counts = torch.histc(drawn, bins=32, min=-1, max=1)
    assert (counts - N / 32).abs().max() <= 5 * math.sqrt(N * 31 / 32**2)


@over_keys
@over_draws
@pytest.mark.parametrize("lag", (1, 2, 3, 64))
def test_neighbours_are_not_correlated(draw, lag, own):
    """Of neighbouring positions, and of neighbouring keys: products of centred draws average 0."""
    drawn = draw(own, torch.zeros(ROWS, COLUMNS, dtype=torch.float64))
    variance = 1 if draw is signs else 1 / 3
    for product in (
        drawn[:, lag:] * drawn[:, :-lag],
        drawn * drawn.roll(lag, 0) if lag < ROWS else drawn[1:] * drawn[:-1].roll(lag, 1),
    ):
        assert abs(product.mean()) <= 5 * variance / math.sqrt(product.numel())


@over_draws
def test_keys_matter(draw):
    """Two examples agree in half of the signs and in next to no uniform draw."""
    one, other = draw(keys(2), torch.zeros(2, COLUMNS))
    if draw is signs:
        agreed = (one == other).sum().item()
        assert abs(agreed - COLUMNS / 2) <= most_from_half(COLUMNS, odds=1_700_000)
    else:
        assert (one == other).sum() <= 2  # expected 4096 / 2^23


def test_the_point_gives_nothing_but_its_shape():
    x = torch.randn(3, 8, generator=rng(1))
    assert same_bits(uniform(keys(3), x), uniform(keys(3), torch.zeros_like(x)))


@pytest.mark.parametrize("norm", ("linf", "l2"))
def test_gaussian_noise_has_the_power_of_random_signs(norm):
    """Mean square of n coordinates within five standard errors; half of them positive."""
    x = torch.zeros(40, 5, 100, dtype=torch.float64)
    n, own = x.numel(), keys(40)
    noise = perturb(Attack("gaussian", 0.25, norm=norm), x, keys=own)
    of_signs = perturb(Attack("random", 0.25, norm=norm), x, keys=own)
    power = of_signs.square().mean()
    assert abs(noise.square().mean() - power) < 5 * power * (2 / n) ** 0.5
    ratio = noise / power.sqrt()
    for bound, share in ((1, 0.682689), (2, 0.954500)):
        inside = (ratio.abs() < bound).double().mean()
        assert abs(inside - share) < 5 * (share * (1 - share) / n) ** 0.5
    assert noise.abs().max() > 3 * power.sqrt()  # no ball holds it


def test_uniform_noise_fills_the_ball():
    x = torch.zeros(40, 5, 100, dtype=torch.float64)
    noise = perturb(Attack("uniform", 0.25), x, keys=keys(40))
    n = x.numel()
    assert noise.abs().max() <= 0.25
    for bound in (0.05, 0.125, 0.2):
        share = bound / 0.25
        inside = (noise.abs() < bound).double().mean()
        assert abs(inside - share) < 5 * (share * (1 - share) / n) ** 0.5
