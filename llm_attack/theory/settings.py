"""Settings and presets of the binary toy (Fig. 4) and of word sentiment (Fig. 6). No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llm_attack.errors import invalid
from llm_attack.experiment import Integers, check_settings, setting

_DEVICE = "cuda, cuda:1, cpu, ...; cuda where there is one unless given."


@dataclass(frozen=True)
class BinarySettings:
    """The binary toy: points in the square [-1, 1]², told apart by the sign of x1.

    Raises:
        UsageError: a value is out of range; the message names it.
    """

    seeds: int = setting(5, "Networks, each with points of its own.", least=1)
    epochs: int = setting(500, "Passes over the points.", least=1)
    points: int = setting(1000, "Training points of each network.", least=1)
    test_points: int = setting(1000, "Points for the accuracies.", least=1)
    width: int = setting(32, "Units in each of the two hidden layers.", least=1)
    learning_rate: float = setting(1e-3, "Of Adam.", least=0)
    batch_size: int = setting(1000, "Points per step; all of them unless given.", least=1)
    attack: str = setting("fgsm", "Any attack of the project, for the robust accuracy.")
    epsilon: float = setting(0.1, "L-infinity amplitude of the attack.", least=0)
    label: int = setting(1, "Class whose loss is the packet: 1 is x1 > 0, 0 the other.")
    seed: int = setting(0, "The first seed; the others follow.")
    device: str | None = setting(None, _DEVICE, type=str)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.label not in (0, 1):
            raise invalid("label", self.label, "0 or 1")


@dataclass(frozen=True)
class SentimentSettings:
    """Word sentiment: characters, their embedding, and a classifier of three classes.

    Raises:
        UsageError: a value is out of range; the message names it.
    """

    words: str | None = setting(
        None,
        "CSV file with the columns word, language, label; the package's unless given.",
        type=str,
    )
    embedding_sizes: tuple[int, ...] = setting(
        (8, 16, 32), "Numbers in the embedding of a character.", least=1, type=Integers()
    )
    seeds: int = setting(10, "Networks of each size, each with a split of its own.", least=1)
    epochs: int = setting(1000, "Passes over the words.", least=1)
    width: int = setting(64, "Units in the hidden layer.", least=1)
    learning_rate: float = setting(1e-3, "Of Adam.", least=0)
    test_share: float = setting(0.2, "Share of the words held out.", least=0)
    seed: int = setting(0, "The first seed; the others follow.")
    device: str | None = setting(None, _DEVICE, type=str)

    def __post_init__(self) -> None:
        check_settings(self)
        if not 0 < self.test_share < 1:
            raise invalid("test_share", self.test_share, "between 0 and 1")


# The toy takes seconds: it is never cut down.
BINARY = {"quick": BinarySettings(), "paper": BinarySettings()}
SENTIMENT = {
    "quick": replace(SentimentSettings(), seeds=5, epochs=200),
    "paper": SentimentSettings(),
}
