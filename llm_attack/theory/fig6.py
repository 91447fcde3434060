"""Fig. 6, word sentiment: the angle between a word's embedding and the gradient of the loss there.

`lexicon` has the words, `sentiment` the networks and what is measured. No torch is imported here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from llm_attack.declare import check, setting
from llm_attack.drawing import COLOURS, new_figure
from llm_attack.errors import invalid
from llm_attack.record import Stopwatch, write_text
from llm_attack.reproduce import DEVICE, Integers, figure_command

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("test", "train")
MEASURED = ("accuracy", "cosine_right", "cosine_wrong")


@dataclass(frozen=True)
class Settings:
    """Word sentiment: characters, their embedding, and a classifier of three classes.

    Raises:
        UsageError: a value is out of range; the message names it.
    """

    words: str | None = setting(
        None,
        "CSV file with the columns word, language and label, which is negative, neutral or "
        "positive; unless given, the package's own",
    )
    embedding_sizes: tuple[int, ...] = setting(
        (8, 16, 32),
        "How many numbers the embedding of a character has, separated by commas",
        least=1,
        option=Integers(),
    )
    seeds: int = setting(10, "Number of networks of each size, each with its own split", least=1)
    epochs: int = setting(1000, "Number of passes over the words", least=1)
    width: int = setting(64, "Number of units in the hidden layer", least=1)
    learning_rate: float = setting(1e-3, "Learning rate of Adam", least=0)
    test_share: float = setting(0.2, "Share of the words held out, between 0 and 1", least=0)
    seed: int = setting(0, "The first seed; the others follow")
    device: str | None = setting(None, DEVICE)

    def __post_init__(self) -> None:
        check(self)
        if not 0 < self.test_share < 1:
            raise invalid("test_share", self.test_share, "between 0 and 1")


PRESETS = {"quick": replace(Settings(), seeds=5, epochs=200), "paper": Settings()}


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """Word sentiment: cosine of embedding and gradient, for words classified rightly or wrongly."""
    import pandas as pd

    from llm_attack.theory.bands import over_seeds
    from llm_attack.theory.lexicon import load_words

    words = load_words(settings.words)
    clock, tables = Stopwatch(), []
    for size in settings.embedding_sizes:
        tables.append(run_size(words, size, settings))
        clock.lap(f"size {size}")
    table = pd.concat(tables, ignore_index=True)
    curves = over_seeds(table, ["size", "epoch", "split"])
    write_text(folder / "curves.csv", curves.to_csv(index=False, float_format="%.5g"))
    draw(folder)
    last = table[table.epoch == settings.epochs].groupby(["size", "split"])
    return {
        "words": words.groupby(["language", "label"]).size().unstack(fill_value=0).to_dict("index"),
        "last_epoch": {
            f"size {size}, {split}": {name: _numbers(part[name]) for name in MEASURED}
            for (size, split), part in last
        },
        "seconds": clock,
    }


def _numbers(column: pd.Series) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [None if math.isnan(value) else round(value, 5) for value in column]


def run_size(words: pd.DataFrame, size: int, settings: Settings) -> pd.DataFrame:
    """Trains all seeds with one embedding size; measures before the first epoch and after each.

    Returns:
        A row for each epoch, split and seed: size, epoch, split, seed and `MEASURED`.
    """
    import pandas as pd

    from llm_attack.theory.sentiment import measured_epochs

    seeds = range(settings.seed, settings.seed + settings.seeds)
    epochs, total = measured_epochs(words, size, settings), settings.epochs + 1
    tables = [
        pd.DataFrame(values).assign(size=size, epoch=epoch, split=split, seed=seeds)
        for epoch, found in tqdm(epochs, f"fig6, size {size}", total, unit="epoch", disable=None)
        for split, values in found.items()
    ]
    return pd.concat(tables, ignore_index=True)


def draw(folder: Path) -> None:
    """Draws, from curves.csv, a column for each size: cosines above, accuracies below."""
    import pandas as pd

    from llm_attack.theory.bands import shaded
    from llm_attack.theory.lexicon import LABELS

    table = pd.read_csv(folder / "curves.csv")
    sizes = table["size"].unique()
    right, wrong = COLOURS[0], COLOURS[3]
    with new_figure(folder, (1.3 + 2 * len(sizes), 4.2)) as figure:
        axes = figure.subplots(2, len(sizes), sharex=True, sharey="row", squeeze=False)
        for (above, below), size in zip(axes.T, sizes, strict=True):
            for split, line in zip(SPLITS, ("-", "--"), strict=True):
                part = table[(table["size"] == size) & (table.split == split)]
                shaded(above, part, "cosine_right", right, linestyle=line, label=f"right, {split}")
                shaded(above, part, "cosine_wrong", wrong, linestyle=line, label=f"wrong, {split}")
                shaded(below, part, "accuracy", COLOURS[6], linestyle=line, label=split)
            above.axhline(0, color="black", linewidth=0.8)
            above.set(title=f"embedding size {size}")
            chance = {"color": "black", "linewidth": 1, "linestyle": ":", "label": "chance"}
            below.axhline(1 / len(LABELS), **chance)
            below.set(xlabel="epoch", xlim=(0, table.epoch.max()), ylim=(0, 1.02))
        axes[0, 0].set(ylabel="cosine of embedding\nand gradient")
        axes[1, 0].set(ylabel="accuracy")
        for row in axes:
            row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))


COMMAND = figure_command("fig6", PRESETS, run)
