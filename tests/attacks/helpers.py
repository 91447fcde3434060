"""Shared by the tests of the attacks: losses and points with known answers, bits of tensors."""

import torch

from llm_attack.attacks import ATTACKS, Losses, keys_for, perturb

KINDS = ATTACKS.items()
NOISE = tuple(n for n, kind in KINDS if kind.start and not kind.gradient)
MINIMAL = tuple(n for n, kind in KINDS if kind.minimal)
ALL_ATTACKS = tuple(ATTACKS)
GRADIENT_ATTACKS = tuple(
    n for n, kind in KINDS if kind.gradient and n not in MINIMAL
)  # fill a ball
ADAPTIVE = tuple(n for n in GRADIENT_ATTACKS if ATTACKS[n].adaptive)
TARGETED = tuple(n for n in GRADIENT_ATTACKS if ATTACKS[n].targeted and n not in ADAPTIVE)
ITERATIVE = tuple(n for n in GRADIENT_ATTACKS if ATTACKS[n].iterative)
DESCENDING = (*TARGETED, *(n for n in GRADIENT_ATTACKS if ATTACKS[n].reverse))
IN_BALL = tuple(n for n in GRADIENT_ATTACKS if not ATTACKS[n].reverse)
STEPPING = tuple(name for name in GRADIENT_ATTACKS if name not in ADAPTIVE)  # of lengths set before


def closures(name, loss):
    """`loss` in the places where the attack looks for it; what apgdt lowers is its negative."""
    if name == "apgdt":
        return {"loss": Losses(loss, target_losses=[lambda point: -loss(point)])}
    return {"loss": Losses(target_loss=loss) if name in TARGETED else loss}


def attacked(attack, x, loss, **options):
    """`perturb` with `loss` in its place, and with keys."""
    return perturb(attack, x, keys=keys(len(x)), **closures(attack.name, loss), **options)


def gradients(name, steps=10):
    """How many an attack takes."""
    return steps if name in ITERATIVE else 1


def rng(seed):
    return torch.Generator().manual_seed(seed)


def grid(*shape, seed=0, low=-64, high=64):
    """Multiples of 1/64 in [low / 64, high / 64]: sums with other such numbers are exact."""
    return torch.randint(low, high + 1, shape, generator=rng(seed)) / 64


def keys(n):
    return torch.tensor([keys_for(0, [i]) for i in range(n)], dtype=torch.int64)


def linear(w):
    """The loss w.x of each example; its gradient is `w` everywhere."""
    return lambda point: (w * point).flatten(1).sum(1)


def most_from_half(n, odds):
    """The least d such that of n fair coins, P(|heads - n/2| > d) is below 1 / odds; exact."""
    tail, ways, k = 0, 1, 0  # `ways` to get k heads, `tail` of them to get fewer than k
    while 2 * (tail + ways) * odds < 2**n:
        tail, ways, k = tail + ways, ways * (n - k) // (k + 1), k + 1
    return n / 2 - k


class Counted:
    """A loss that counts its calls and keeps the points that it saw."""

    def __init__(self, loss):
        self.loss = loss
        self.points = []

    @property
    def calls(self):
        return len(self.points)

    def __call__(self, point):
        self.points.append(point.detach().clone())
        return self.loss(point)


def bits(tensor):
    """The raw bits as integers, so that -0.0 differs from 0.0 and a NaN equals itself."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return tensor.contiguous().view(integer)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
