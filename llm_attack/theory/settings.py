"""Settings of Fig. 4 and Fig. 6, and the names of their measurements. No torch here."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

from llm_attack.attacks.settings import ATTACKS
from llm_attack.base.declare import check, setting
from llm_attack.base.errors import invalid
from llm_attack.base.options import Numbers
from llm_attack.reproduce import DEVICE

# The label of a packet: always the same, or the class that the network predicts at the point.
PACKETS = ("fixed", "predicted")
STEP = 0.3  # of the plain step x + STEP · ∇loss(x), our reading of the paper's Fig. 4 D

OPTIMISERS = ("adam", "sgd")

SPLITS = ("test", "train")
MEASURED = ("accuracy", "cosine_right", "cosine_wrong", "wrong")
FEWEST = 20  # wrong words; a mean cosine over fewer shows nothing


@dataclass(frozen=True)
class ToySettings:
    """The binary toy: points in a square round 0, labelled by the sign of x1.

    Raises:
        UsageError: a value is out of range; the message names it.
    """

    seeds: int = setting(
        5, "Number of networks, each with points of its own", minimum=1, group="training"
    )
    epochs: int = setting(500, "Number of passes over the points", minimum=1, group="training")
    points: int = setting(
        1000, "Number of training points of each network", minimum=1, group="point"
    )
    test_points: int = setting(1000, "Number of test points", minimum=1, group="point")
    width: int = setting(
        32, "Number of units in each of the two hidden layers", minimum=1, group="network"
    )
    domain: float = setting(
        1.0,
        "Half the side of the square that the points are drawn from",
        minimum=0,
        exclusive_minimum=True,
        group="point",
    )
    optimiser: str = setting(
        "adam", "Optimiser: adam, or plain sgd", choices=OPTIMISERS, group="training"
    )
    learning_rate: float = setting(
        1e-3, "Learning rate of the optimiser", minimum=0, group="training"
    )
    batch_size: int = setting(1000, "Number of points per step", minimum=1, group="training")
    attack: str = setting(
        "fgsm",
        "Attack for the robust accuracy",
        choices=tuple(name for name, kind in ATTACKS.items() if not kind.minimal),
        group="attack",
    )
    epsilon: float = setting(0.1, "L-infinity amplitude of the attack", minimum=0, group="attack")
    label: int = setting(
        1, "Class whose loss is the fixed packet: 1, that of x1 above 0, or 0", group="point"
    )
    seed: int = setting(0, "The first seed; the others follow", group="engine")
    device: str | None = setting(None, DEVICE, group="engine")

    def __post_init__(self) -> None:
        check(self)
        if self.label not in (0, 1):
            raise invalid("label", self.label, "0 or 1")


class Kind(NamedTuple):
    """The settings that networks of different seeds share, by their names in the singular.

    The accuracy on new words depends on all of them except the size.
    """

    size: int
    ngram: int = 1
    train_share: float = 1.0
    noise: float = 0.0


@dataclass(frozen=True)
class SentimentSettings:
    """Word sentiment: characters, their embedding, and a classifier of three classes.

    Raises:
        UsageError: a value is out of range; the message names it.
    """

    words: str | None = setting(
        None,
        "CSV file with the columns word, language and label (negative, neutral or positive). The"
        " default is the file of the package",
        group="word",
    )
    embedding_sizes: tuple[int, ...] = setting(
        (8, 16, 32),
        "Sizes of the embedding of a character, separated by commas",
        minimum=1,
        option=Numbers(int),
        group="network",
    )
    ngrams: tuple[int, ...] = setting(
        (1,),
        "Lengths, in characters, of the overlapping pieces of a word that are embedded, separated"
        " by commas",
        minimum=1,
        option=Numbers(int),
        group="word",
    )
    train_shares: tuple[float, ...] = setting(
        (1.0,),
        "Shares of the training words to learn from, separated by commas",
        minimum=0,
        option=Numbers(float),
        group="word",
    )
    label_noise: tuple[float, ...] = setting(
        (0.0,),
        "Shares of the training words that get a wrong label, separated by commas",
        minimum=0,
        option=Numbers(float),
        group="word",
    )
    seeds: int = setting(
        10, "Number of networks of each size, each with its own split", minimum=1, group="training"
    )
    epochs: int = setting(1000, "Number of passes over the words", minimum=1, group="training")
    width: int = setting(64, "Number of units in the hidden layer", minimum=1, group="network")
    learning_rate: float = setting(1e-3, "Learning rate of Adam", minimum=0, group="training")
    test_share: float = setting(
        0.2, "Share of the words held out, between 0 and 1", minimum=0, group="word"
    )
    seed: int = setting(0, "The first seed; the others follow", group="engine")
    device: str | None = setting(None, DEVICE, group="engine")

    def __post_init__(self) -> None:
        check(self)
        if not 0 < self.test_share < 1:
            raise invalid("test_share", self.test_share, "between 0 and 1")
        for share in self.train_shares:
            if not 0 < share <= 1:
                raise invalid("train_shares", share, "above 0 and at most 1")
        for share in self.label_noise:
            if share > 1:
                raise invalid("label_noise", share, "from 0 to 1")

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of networks. There is one network of each kind for each seed."""
        parts = (self.embedding_sizes, self.ngrams, self.train_shares, self.label_noise)
        return [Kind(*values) for values in itertools.product(*parts)]
