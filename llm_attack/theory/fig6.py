"""Fig. 6, word sentiment: the angle between a word's embedding and the gradient of the loss there.

`lexicon` has the words, and `sentiment` the networks and their measurements. No torch is imported
here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from llm_attack.base.drawing import COLOURS, lettered, new_figure
from llm_attack.base.record import Stopwatch, as_csv, write_text
from llm_attack.reproduce import figure_command
from llm_attack.theory.settings import FEWEST, SPLITS, Kind, SentimentSettings

if TYPE_CHECKING:
    import pandas as pd


_COSINES = ("cosine_right", "cosine_wrong")
PRESETS = {"quick": replace(SentimentSettings(), seeds=5, epochs=200), "paper": SentimentSettings()}


def run(settings: SentimentSettings, folder: Path) -> dict[str, Any]:
    """Word sentiment: cosine of embedding and gradient.

    Words that are classified right and wrong are compared.
    """
    import pandas as pd

    from llm_attack.theory.bands import over_seeds
    from llm_attack.theory.lexicon import load_words

    words = load_words(settings.words)
    clock, tables = Stopwatch(), []
    for kind in settings.kinds:
        tables.append(run_kind(words, kind, settings))
        clock.lap(_name(kind))
    table = pd.concat(tables, ignore_index=True)
    curves = over_seeds(table, [*Kind._fields, "epoch", "split"])
    write_text(folder / "curves.csv", as_csv(curves, "%.5g"))
    last = table[table.epoch == settings.epochs].drop(columns="epoch")
    write_text(folder / "networks.csv", as_csv(last, "%.5g"))
    draw(folder)
    return {
        "words": words.groupby(["language", "label"]).size().unstack(fill_value=0).to_dict("index"),
        "trends": trends(last),
        "seconds": clock,
    }


def _name(kind: Kind) -> str:
    """A name from the size of a network and its other unusual settings."""
    usual = Kind(kind.size)._asdict()
    others = [f"{name} {value:g}" for name, value in kind._asdict().items() if value != usual[name]]
    return ", ".join([f"size {kind.size}", *others])


def run_kind(words: pd.DataFrame, kind: Kind, settings: SentimentSettings) -> pd.DataFrame:
    """Trains all seeds of one kind; measures before the first epoch and after each.

    Returns:
        A row for each epoch, split and seed, with the columns of `Kind`, epoch, split, seed and
            `settings.MEASURED`.
    """
    import pandas as pd

    from llm_attack.theory.sentiment import measured_epochs

    seeds = range(settings.seed, settings.seed + settings.seeds)
    epochs, total = measured_epochs(words, kind, settings), settings.epochs + 1
    known = kind._asdict()
    tables = [
        pd.DataFrame(values).assign(**known, epoch=epoch, split=split, seed=seeds)
        for epoch, splits in tqdm(epochs, f"fig6, {_name(kind)}", total, unit="epoch", disable=None)
        for split, values in splits.items()
    ]
    return pd.concat(tables, ignore_index=True)


def trends(last: pd.DataFrame) -> dict[str, dict[str, float | int | None]]:
    """Do the cosines on new words follow the accuracy there?

    The measure is Spearman's rank correlation over the kinds of networks, of their means over the
    seeds, with its 95 % interval and p-value (`rank_correlation`). Cosines are multiplied by the
    root of the size, so those of random vectors are equal.

    Args:
        last: the rows of the last epoch.
    """
    from llm_attack.stats import rank_correlation

    new = scaled(last[last.split == "test"])
    means = new.groupby(list(Kind._fields))[["accuracy", *_COSINES]].mean()
    correlations: dict[str, dict[str, float | int | None]] = {}
    for name in _COSINES:
        known = means[["accuracy", name]].dropna()
        correlation = rank_correlation(known["accuracy"], known[name])
        numbers = zip(("correlation", "low", "high", "p"), correlation, strict=True)
        correlations[name] = {"kinds": len(known)} | {k: _number(value) for k, value in numbers}
    return correlations


def _number(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return None if math.isnan(value) else round(value, 5)


def scaled(table: pd.DataFrame) -> pd.DataFrame:
    """The table with cosines in units of 1 / √size, in which those of random vectors are equal."""
    table = table.copy()
    for name in table.columns[table.columns.str.startswith("cosine")]:
        table[name] *= table["size"] ** 0.5
    return table


def draw(folder: Path) -> None:
    """Draws a column for each size, from the CSV files: cosines, accuracies, wrong words.

    The cosine of wrong words ends when a network has fewer than `FEWEST` of them, as a mean over
    the seeds. If networks differ in more than their size, each is a point: cosine against accuracy.
    """
    import pandas as pd

    networks = pd.read_csv(folder / "networks.csv")
    if (networks[list(Kind._fields[1:])].nunique() > 1).any():
        return _draw_networks(folder, networks)
    table = scaled(pd.read_csv(folder / "curves.csv"))
    _draw_curves(folder, table)


def _draw_curves(folder: Path, table: pd.DataFrame) -> None:
    from llm_attack.theory.bands import shaded
    from llm_attack.theory.lexicon import LABELS

    sizes = table["size"].unique()
    right, wrong = COLOURS[0], COLOURS[3]
    with new_figure(folder, (1.3 + 2 * len(sizes), 5.6)) as figure:
        axes = figure.subplots(3, len(sizes), sharex=True, sharey="row", squeeze=False)
        for (above, below, last), size in zip(axes.T, sizes, strict=True):
            for split, line in zip(SPLITS, ("-", "--"), strict=True):
                part = table[(table["size"] == size) & (table.split == split)]
                shaded(above, part, "cosine_right", right, linestyle=line, label=f"right, {split}")
                enough = part[part["wrong_mean"] >= FEWEST]
                shaded(above, enough, "cosine_wrong", wrong, ls=line, label=f"wrong, {split}")
                shaded(below, part, "accuracy", COLOURS[6], linestyle=line, label=split)
                shaded(last, part, "wrong", wrong, linestyle=line, label=f"wrong, {split}")
            above.axhline(0, color="black", linewidth=0.8)
            above.set(title=f"embedding size {size}")
            chance = {"color": "black", "linewidth": 1, "linestyle": ":", "label": "chance"}
            below.axhline(1 / len(LABELS), **chance)
            below.set(ylim=(0, 1.02))
            fewest = {"color": "0.5", "linewidth": 1, "linestyle": ":", "label": f"{FEWEST} words"}
            last.axhline(FEWEST, **fewest)
            last.set(xlabel="epoch", xlim=(0, table.epoch.max()))
            last.set_yscale("symlog", linthresh=10)
            last.set_ylim(0, None)
        lettered(axes.flat)
        axes[0, 0].set(ylabel="cosine of embedding\nand gradient · √size")
        axes[1, 0].set(ylabel="accuracy")
        axes[2, 0].set(ylabel="wrong words\nof a network")
        for row in axes:
            row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))


def _draw_networks(folder: Path, networks: pd.DataFrame) -> None:
    from llm_attack.theory.lexicon import LABELS

    new = scaled(networks[networks.split == "test"])
    with new_figure(folder, (4.6, 3.2)) as figure:
        axes = figure.subplots()
        for size, marker in zip(sorted(new["size"].unique()), "o^sDvP*X<>", strict=False):
            part = new[new["size"] == size]
            for name, colour in (("right", COLOURS[0]), ("wrong", COLOURS[3])):
                form: Any = {"s": 12, "marker": marker, "color": colour, "alpha": 0.7, "lw": 0}
                label = f"{name}, size {size}"
                axes.scatter(part["accuracy"], part[f"cosine_{name}"], label=label, **form)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvline(1 / len(LABELS), color="black", linewidth=1, linestyle=":", label="chance")
        axes.set(xlabel="accuracy on new words", ylabel="cosine of embedding\nand gradient · √size")
        figure.legend(loc="outside right upper", fontsize=7)


COMMAND = figure_command("fig6", PRESETS, run)
