"""Does robustness cost accuracy? Clean and robust accuracy of networks during their trainings.

No torch is imported here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_attack.base.declare import again, parts, setting
from llm_attack.base.drawing import COLOURS, new_figure
from llm_attack.base.errors import invalid
from llm_attack.base.record import Stopwatch, as_csv, write_text
from llm_attack.reproduce import figure_command
from llm_attack.vision import fig2
from llm_attack.vision.settings import KNOWN, QUICK, TRAININGS, shown

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from llm_attack.vision.data import Images


@dataclass(frozen=True)
class Settings(fig2.SeveralNetworks):
    """The settings. Data sets, networks, widths, trainings and seeds may be several."""

    train_attack: str = setting(
        "none,pgd,trades", "Trainings, separated by commas: none, pgd, trades", group="training"
    )
    attacks: str = again(fig2.Settings, "attacks", "pgd")


PRESETS = {
    "quick": Settings(**{**QUICK, "width": 0.125}, network="cnn,resnet18", subset=100),
    "paper": Settings(
        dataset="mnist,cifar10", network="cnn,resnet18", subset=1000, width=0.25, widths=(1.0, 4.0)
    ),
}
_NETWORK = ["dataset", "network", "width", "training"]
_PAIRS = (("clean", "robust"), ("clean", "fooled"), ("clean", "dp"), ("dp", "fooled"))
_LOOKS = "osD^vP*X"  # of networks and widths


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """Compare networks with and without adversarial training.

    Does robustness cost accuracy? Both are measured by epoch. --dataset, --network, --widths and
    --train_attack may be several, separated by commas. correlations.csv has the rank correlations
    of clean accuracy, robust accuracy and dp. trends.csv shows what rises and what falls over the
    epochs.
    """
    import pandas as pd

    clock = Stopwatch()
    table = pd.DataFrame(_rows(settings, folder, clock))
    overview, changes = correlations(table), trends(table)
    for name, frame in (("table", table), ("correlations", overview), ("trends", changes)):
        write_text(folder / f"{name}.csv", as_csv(frame, "%.6g"))
    draw(folder)
    overall = overview[(overview["training"] == "all") & (overview["epochs"] == "all")]
    return {"overall": overall.round(4).to_dict("records"), "seconds": clock}


def _rows(settings: Settings, folder: Path, clock: Stopwatch) -> Iterator[dict[str, Any]]:
    """Trains and attacks all networks. Yields rows of `measure`, with dp."""
    from llm_attack.vision import stages
    from llm_attack.vision.data import load_dataset

    for name in ("load", "weights"):
        if getattr(settings, name) is not None:
            raise invalid(name, getattr(settings, name), "absent: networks are trained here")
    attacks = stages.listed("attacks", settings.attacks, KNOWN)
    trainings = stages.listed("train_attack", settings.train_attack, TRAININGS)
    names = stages.networks(settings)
    kinds = list(itertools.product(names, settings.widths))
    sets = list(dict.fromkeys(parts(settings.dataset)))
    first = [load_dataset(name, settings) for name in sets]
    for dataset, (name, width) in itertools.product(first, kinds):
        stages.amplitude(settings, dataset)
        stages.untrained(dataset, name, replace(settings, width=settings.width * width))
    clock.lap("data")
    for seed, i in itertools.product(range(settings.seeds), range(len(sets))):
        here = replace(settings, seed=settings.seed + seed)
        dataset = first[i] if seed == 0 else load_dataset(sets[i], here)
        few = dataset.test[: settings.subset]
        clock.lap("data")
        for (name, times), training in itertools.product(kinds, trainings):
            own = replace(here, width=settings.width * times, train_attack=training)
            known = {"width": own.width, "training": training, "seed": own.seed}
            label = "-".join(f"{part}" for part in (dataset.name, name, *known.values()))
            _, rows = stages.trained(
                dataset,
                name,
                own,
                attacks,
                clock,
                label=label,
                besides=partial(_spread, images=few),
                state=stages.state_file(folder, label),
                epsilon=stages.amplitude(own, dataset),
                subset=settings.subset,
                attacked_epochs=settings.attacked_epochs,
            )
            for row in rows:
                yield {"dataset": dataset.name, "network": name, **known, **row}


def _spread(network: nn.Module, images: Images) -> dict[str, Any]:
    from llm_attack.vision.momentum import momentum_spread

    return {"dp": momentum_spread(network, images)}


def points(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each network, seed, epoch and attack, with the columns of the correlations.

    These are `clean` and `robust` accuracy, `dp`, and `fooled`, the share of right images that the
    attack made wrong.
    """
    keys = [*_NETWORK, "seed", "epoch"]
    clean = table[table["condition"] == "none"].set_index(keys)["accuracy"].rename("clean")
    attacks = table[~table["condition"].isin(fig2.NOT_ATTACKS)]
    kept = attacks[[*keys, "condition", "accuracy", "fooled", "dp"]]
    return kept.rename(columns={"accuracy": "robust", "condition": "attack"}).join(clean, on=keys)


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rank correlations over networks, in all trainings together and in each.

    Args:
        table: rows of `table.csv`.

    Returns:
        A row for each data set, attack, `training`, `epochs` (`all`: each epoch is a point; `last`:
            each network is a point) and pair `x`, `y`. `n` is the number of points. `correlation`
            has a 95 % interval (`low`, `high`), which takes points as independent. `lowest` and
            `highest` are the extremes over single seeds. NaN if there are fewer than four points,
            or if one quantity does not vary.
    """
    import pandas as pd

    from llm_attack.stats import rank_interval

    rows = []
    for (dataset, attack), group in points(table).groupby(["dataset", "attack"], sort=False):
        for training, some in (("all", group), *group.groupby("training", sort=False)):
            ends = some[some["epoch"] == some["epoch"].max()]
            for (epochs, those), (x, y) in itertools.product(
                (("all", some), ("last", ends)), _PAIRS
            ):
                value, n = _spearman(those, x, y)
                low, high = rank_interval(value, n) if n > 3 else (math.nan, math.nan)
                seeds = [_spearman(one, x, y)[0] for _, one in those.groupby("seed")]
                rows.append(
                    {
                        **{"dataset": dataset, "attack": attack, "training": training},
                        **{"epochs": epochs, "x": x, "y": y, "n": n, "correlation": value},
                        **{"low": low, "high": high, "lowest": min(seeds), "highest": max(seeds)},
                    }
                )
    return pd.DataFrame(rows)


def _spearman(rows: pd.DataFrame, x: str, y: str) -> tuple[float, int]:
    """The rank correlation of two columns, and the number of pairs."""
    from llm_attack.stats import spearman

    pairs = rows[[x, y]].dropna()
    if len(pairs) < 4 or (pairs.nunique() == 1).any():
        return math.nan, len(pairs)
    return float(spearman(pairs[x], pairs[y])), len(pairs)


def trends(table: pd.DataFrame) -> pd.DataFrame:
    """The trend of each accuracy over the epochs, over all seeds of a network.

    Returns:
        A row for each network and condition, and for `dp`: the number of `seeds` and `epochs`, the
            mean over seeds after the `first` and the `last` epoch, the `trend` with its 95 %
            interval (`low`, `high`) as in `llm_attack.vision.trends`, and the `verdict`.
    """
    import pandas as pd

    from llm_attack.vision.trends import trend, verdict

    rows, clean = [], table[table["condition"] == "none"]
    table = pd.concat([table, clean.assign(condition="dp", accuracy=clean["dp"])])
    for key, group in table.groupby([*_NETWORK, "condition"], sort=False):
        curves = group.pivot(index="seed", columns="epoch", values="accuracy")
        value, low, high = trend(curves)
        rows.append(
            {
                **dict(zip([*_NETWORK, "condition"], key, strict=True)),
                **{"seeds": len(curves), "epochs": len(curves.columns)},
                **{"first": curves.iloc[:, 0].mean(), "last": curves.iloc[:, -1].mean()},
                **{"trend": value, "low": low, "high": high, "verdict": verdict(low, high)},
            }
        )
    return pd.DataFrame(rows)


def draw(folder: Path) -> None:
    """Draws table.csv: a row of panels for each data set, a column for each attack.

    A point is a network after an epoch. Points after the last epoch have an outline.
    """
    import pandas as pd

    table = points(pd.read_csv(folder / "table.csv"))
    attacks, datasets = (list(table[column].unique()) for column in ("attack", "dataset"))
    trainings = list(table["training"].unique())
    kinds = list(table[["network", "width"]].drop_duplicates().itertuples(index=False))
    size = (3.2 * len(attacks) + 1.6, 2.9 * len(datasets) + 0.2)
    with new_figure(folder, size) as figure:
        axes = figure.subplots(len(datasets), len(attacks), squeeze=False)
        for (dataset, attack), panel in table.groupby(["dataset", "attack"], sort=False):
            axis = axes[datasets.index(dataset), attacks.index(attack)]
            axis.axline((0, 0), slope=1, color="0.4", linestyle="--", linewidth=0.8)
            last = panel["epoch"] == panel["epoch"].max()
            for (look, kind), (colour, training) in itertools.product(
                zip(itertools.cycle(_LOOKS), kinds), zip(COLOURS, trainings, strict=False)
            ):
                those = (panel["network"] == kind.network) & (panel["width"] == kind.width)
                those &= panel["training"] == training
                style: Any = {"marker": look, "color": colour}
                axis.scatter(
                    *(panel[those & ~last][name] for name in ("clean", "robust")),
                    **{**style, "s": 12, "alpha": 0.35, "linewidths": 0},
                )
                axis.scatter(
                    *(panel[those & last][name] for name in ("clean", "robust")),
                    **{**style, "s": 26, "edgecolors": "black", "linewidths": 0.7},
                )
            axis.set_title(f"{shown(dataset)}, {shown(attack)}", fontsize=8)
            axis.set(xlabel="clean accuracy", ylabel="robust accuracy")
            axis.set_xlim(panel["clean"].min() - 0.03, panel["clean"].max() + 0.03)
            axis.set_ylim(-0.02, panel["robust"].max() + 0.05)
        figure.legend(handles=_legend(kinds, trainings), loc="outside right center")


def _legend(kinds: list[Any], trainings: list[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    blank: Any = {"linestyle": "", "markersize": 5}
    names = {"none": "clean images", "pgd": "PGD", "trades": "TRADES"}
    return [
        *(
            Line2D([], [], marker="o", color=colour, label=names[training], **blank)
            for colour, training in zip(COLOURS, trainings, strict=False)
        ),
        *(
            Line2D(
                [], [], marker=look, color="0.5", label=f"{shown(k.network)} × {k.width:g}", **blank
            )
            for look, k in zip(itertools.cycle(_LOOKS), kinds)
        ),
    ]


# Networks are trained here, so none is loaded. Nobody varied the momentum.
_NO_OPTIONS = ("load", "weights", "momentum")

COMMAND = figure_command(
    "tradeoff", PRESETS, run, "llm_attack.vision.settings:with_recipe", without=_NO_OPTIONS
)
