"""The little world: its things, its facts, and the facts that the training text does not contain.

It has sixty creatures and sixty wares with invented names. Their factors (kind and home, or
material and trade) are drawn from a seed, and the training text states all of them. All other facts
follow from the factors by the tables of `grammar`: what is true of one bird is true of every bird.
A hash holds a share of the (thing, relation) pairs out of the training text, and the questions ask
only for these. So an answer combines "a morlet is a bird" with facts about birds. `questions` turns
pairs into text. This module imports only the standard library.
"""

import hashlib
import random
from dataclasses import dataclass
from functools import cached_property

from .grammar import FACTORS, RELATIONS, Factor, Relation

SEED = 2205
THINGS_PER_FAMILY = 60
HELD_OUT_SHARE = 0.4

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
ENDINGS = ("n", "l", "r", "k", "t", "sh", "")

# Random names that are words already.
NOT_NAMES = {"baker", "metal", "pile", "raven", "rural", "tune"}


@dataclass(frozen=True)
class Thing:
    """A creature or a ware; `factors` maps a factor's name to the index of its value."""

    name: str
    family: str
    factors: tuple[tuple[str, int], ...]

    def index(self, factor: str) -> int:
        """Index of this thing's value of a factor, and of every relation that follows from it."""
        (first, i), (_, j) = self.factors
        return i if factor == first else j


class World:
    """All things and facts of one seed. Two worlds of the same seed are equal in every word."""

    def __init__(self, seed: int = SEED) -> None:
        self.seed = seed
        self.relations: tuple[Relation, ...] = RELATIONS
        rng = random.Random(f"things/{seed}")
        names = invented_names(2 * THINGS_PER_FAMILY, rng)
        self.things: list[Thing] = []
        for family in ("creature", "ware"):
            first, second = factors_of(family)
            # Runs through both factors out of step: every value of either is as frequent as any
            # other, and so is, nearly, every pair of values.
            size = len(first.values)
            cells = [(k % size, (k + k // size) % size) for k in range(THINGS_PER_FAMILY)]
            rng.shuffle(cells)
            for i, j in cells:
                self.things.append(Thing(names.pop(), family, ((first.name, i), (second.name, j))))

    def held_out(self, thing: Thing, relation: Relation) -> bool:
        """Whether the training text never contains this thing with this relation."""
        return (thing.name, relation.name) in self._silent

    @cached_property
    def _silent(self) -> set[tuple[str, str]]:
        keys = [(t.name, r.name) for t in self.things for r in relations_of(t.family)]
        return {key for key in keys if _share(f"{self.seed}/{key[0]}/{key[1]}") < HELD_OUT_SHARE}

    def value(self, thing: Thing, relation: Relation) -> int:
        """Index of the value that this relation has for this thing."""
        return thing.index(relation.factor)

    @cached_property
    def _pairs(self) -> dict[bool, list[tuple[Thing, Relation]]]:
        pairs: dict[bool, list[tuple[Thing, Relation]]] = {True: [], False: []}
        for thing in self.things:
            for relation in relations_of(thing.family):
                pairs[self.held_out(thing, relation)].append((thing, relation))
        return pairs

    @cached_property
    def _things(self) -> dict[tuple[str, bool], list[Thing]]:
        things: dict[tuple[str, bool], list[Thing]] = {}
        for side in (True, False):
            for thing, relation in self.pairs(side):
                things.setdefault((relation.name, side), []).append(thing)
        return things

    def pairs(self, held_out: bool) -> list[tuple[Thing, Relation]]:
        """All (thing, relation) pairs on one side of the split."""
        return self._pairs[held_out]

    def things_of(self, relation: Relation, held_out: bool) -> list[Thing]:
        """All things that have this relation on one side of the split."""
        return self._things[relation.name, held_out]


def _share(key: str) -> float:
    """A number in [0, 1) that depends only on the key, and is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def factors_of(family: str) -> tuple[Factor, Factor]:
    """The two factors of a creature or of a ware."""
    first, second = (factor for factor in FACTORS.values() if factor.family == family)
    return first, second


def relations_of(family: str) -> list[Relation]:
    """The relations that a creature or a ware has."""
    return [relation for relation in RELATIONS if FACTORS[relation.factor].family == family]


def invented_names(count: int, rng: random.Random) -> list[str]:
    """`count` different names of two syllables that begin with a consonant ("a morlet")."""
    taken = {word for factor in FACTORS.values() for word in factor.values} | NOT_NAMES
    taken |= {word for relation in RELATIONS for word in relation.values + relation.past}
    names: list[str] = []
    while len(names) < count:
        syllables = (rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(2))
        name = "".join(syllables) + rng.choice(ENDINGS)
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names
