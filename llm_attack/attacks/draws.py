"""Random draws that depend on a key and not on the batch: SplitMix64 as a counter-based generator.

The draw of an element is a hash of its example's key and of its index in the example. So it is the
same for every batch size, order, device and number of processes. SplitMix64: Steele, Lea and Flood
2014, "Fast splittable pseudorandom number generators".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(word: int) -> int:
    """The 64-bit word as the int64 that has the same bits."""
    return word - (1 << 64) if word >= 1 << 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
_LOW = (1 << 32) - 1


def keys_for(seed: int, tokens: Sequence[int]) -> int:
    """Hashes the seed and the example's own tokens to the int64 key of the example."""
    text = f"{seed}:{','.join(map(str, tokens))}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def signs(keys: Tensor, x: Tensor) -> Tensor:
    """Draws uniformly from {-1, +1}, in the shape and dtype of `x`; `keys`: int64, x.shape[:k]."""
    return torch.where(words(keys, x) < 0, -1.0, 1.0).to(x.dtype)


def uniform(keys: Tensor, x: Tensor) -> Tensor:
    """Draws uniformly from (-1, 1), in the shape and dtype of `x`; `keys`: int64, x.shape[:k].

    In a dtype of few bits, such as bfloat16, a draw may round to -1 or 1.
    """
    top = _shift(words(keys, x), 41)  # 23 bits: every value and its mirror are exact in float32
    return ((2 * top + 1).float() / (1 << 23) - 1).to(x.dtype)


def normal(keys: Tensor, x: Tensor) -> Tensor:
    """Draws from the standard normal distribution, in the shape of `x`; `keys`: int64, x.shape[:k].

    The Box-Muller transform is applied to the two halves of a word. The result is float32, or has
    the dtype of `x` if that is wider.
    """
    word = words(keys, x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    first, second = ((half.to(dtype) + 0.5) / 2**32 for half in (_shift(word, 32), word & _LOW))
    return (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()


def rehashed(keys: Tensor) -> Tensor:
    """New keys that depend only on the given ones."""
    return words(keys, keys[..., None])[..., 0]


def words(keys: Tensor, x: Tensor) -> Tensor:
    """One 64-bit hash per element of `x`, int64."""
    if keys.shape != x.shape[: keys.dim()]:
        raise ValueError(f"keys of shape {tuple(keys.shape)} for a point of {tuple(x.shape)}")
    rest = x.shape[keys.dim() :]
    index = torch.arange(1, rest.numel() + 1, device=x.device) * _GOLDEN
    z = keys.to(x.device).unsqueeze(-1) + index
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return (z ^ _shift(z, 31)).reshape(x.shape)


def _shift(z: Tensor, n: int) -> Tensor:
    """Logical right shift. The operator of torch keeps the sign."""
    return (z >> n) & ((1 << (64 - n)) - 1)
