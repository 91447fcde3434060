"""Token sequences as a trie, which holds shared prefixes once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Trie:
    """A trie over sequences. A node is a token behind a prefix.

    The nodes are in preorder. So node j is an ancestor of node i, or i itself, exactly if
    j <= i < end[j]. An attention mask needs only `end`.

    Attributes:
        tokens: (n,) token of each node.
        depth: (n,) number of tokens before it: its position in every sequence that it belongs to.
        end: (n,) the first node after it that is not its descendant.
        paths: for each sequence, the nodes of its tokens.
    """

    tokens: Ints
    depth: Ints
    end: Ints
    paths: tuple[Ints, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def keys(self, seed: int) -> list[int]:
        """One key per node for random draws: `attacks.keys_for` of its prefix and its token."""
        # the digest of the whole prefix, but without hashing the prefix again at each node
        hashers = [hashlib.blake2b(f"{seed}:".encode(), digest_size=8)]
        keys = []
        for token, depth in zip(self.tokens.tolist(), self.depth.tolist(), strict=True):
            hasher = hashers[depth].copy()
            hasher.update(f",{token}".encode() if depth else f"{token}".encode())
            hashers[depth + 1 :] = [hasher]
            keys.append(int.from_bytes(hasher.digest(), "little", signed=True))
        return keys


def build(sequences: Sequence[Sequence[int]]) -> Trie:
    """Builds the trie of `sequences`. Equal sequences have equal paths."""
    tokens: list[int] = []
    depths: list[Ints] = []
    paths: list[Ints] = [np.empty(0, np.int64)] * len(sequences)
    before: Sequence[int] = ()
    path = paths[0]
    # in lexicographic order, a sequence shares most with the one just before it
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    for i in order:
        sequence = sequences[i]
        pairs = enumerate(zip(before, sequence, strict=False))
        shortest = min(len(before), len(sequence))
        shared = next((k for k, (a, b) in pairs if a != b), shortest)
        new = np.arange(len(tokens), len(tokens) + len(sequence) - shared)
        path = paths[i] = np.concatenate([path[:shared], new])
        tokens.extend(sequence[shared:])
        depths.append(np.arange(shared, len(sequence)))
        before = sequence
    end = np.empty(len(tokens), np.int64)
    for i in order:
        if len(paths[i]):
            # a node on several paths keeps the end of the last path, which is the furthest
            end[paths[i]] = paths[i][-1] + 1
    return Trie(np.array(tokens, np.int64), np.concatenate(depths), end, tuple(paths))
