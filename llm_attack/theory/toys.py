"""Fig. 4 D for several optimisers and domains: which of them reproduce the figure?

The paper states neither. No torch is imported here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from llm_attack.base.declare import parts, setting
from llm_attack.base.drawing import COLOURS, lettered, new_figure
from llm_attack.base.errors import invalid
from llm_attack.base.options import Numbers
from llm_attack.base.record import Stopwatch, as_csv, write_text
from llm_attack.reproduce import figure_command
from llm_attack.theory.settings import OPTIMISERS, PACKETS, STEP, ToySettings

if TYPE_CHECKING:
    import pandas as pd

RATES = {"adam": 1e-3, "sgd": 0.1}
"""The learning rates: Adam's default, and one with which plain SGD learns in as many epochs."""
BETWEEN = (10, 50)
"""The epochs between which accuracy under attack falls in the paper's Fig. 4 D."""
KIND = ["optimiser", "batch_size", "domain"]
_UNDER = ("clean", "robust", "stepped")
_EVERY = 5  # epochs from one measurement to the next


@dataclass(frozen=True)
class Settings(ToySettings):
    """The settings. Optimisers, batch sizes and domains may be several."""

    optimisers: str = setting(
        ",".join(OPTIMISERS),
        "Optimisers, separated by commas: "
        + ", ".join(f"{name} (learning rate {rate:g})" for name, rate in RATES.items()),
        group="training",
    )
    batch_sizes: tuple[int, ...] = setting(
        (1000, 100),
        "Numbers of points per step",
        option=Numbers(int),
        minimum=1,
        group="training",
    )
    domains: tuple[float, ...] = setting(
        (0.5, 1.0, 3.0),
        "Halves of the sides of the squares that the points are drawn from",
        option=Numbers(float),
        minimum=0,
        exclusive_minimum=True,
        group="point",
    )


PRESETS = {"quick": Settings(seeds=3, epochs=100, points=300), "paper": Settings()}


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """The binary toy with several optimisers and domains.

    Batch sizes differ too. The paper states none of these.
    """
    import pandas as pd

    from llm_attack.theory.bands import over_seeds

    chosen = parts(settings.optimisers)
    for name in chosen:
        if name not in OPTIMISERS:
            raise invalid("optimisers", name, OPTIMISERS)
    if settings.epochs < BETWEEN[1]:
        raise invalid("epochs", settings.epochs, f"an integer, {BETWEEN[1]} or more")
    clock, tables = Stopwatch(), []
    kinds = list(itertools.product(chosen, settings.batch_sizes, settings.domains))
    for optimiser, batch_size, domain in kinds:
        known: Any = {"optimiser": optimiser, "batch_size": batch_size, "domain": domain}
        one = replace(settings, **known, learning_rate=RATES[optimiser])
        name = ", ".join(map(str, known.values()))
        tables.append(train(one, name).assign(**known))
        clock.lap(name)
    table = pd.concat(tables, ignore_index=True)
    curves = over_seeds(table[[*KIND, "epoch", "seed", *_UNDER]], [*KIND, "epoch"])
    write_text(folder / "curves.csv", as_csv(curves, "%.4g"))
    write_text(folder / "verdicts.csv", as_csv(verdicts(table), "%.4g"))
    draw(folder)
    return {"kinds": len(kinds), "seconds": clock}


def train(settings: ToySettings, name: str) -> pd.DataFrame:
    """A row for each measured epoch and seed: accuracies, and width and spread of both packets.

    Raises:
        ArithmeticError: dx · dp was below its bound.
    """
    import pandas as pd

    from llm_attack.theory.binary import Toy

    toy, tables = Toy(settings), []
    seeds = range(settings.seed, settings.seed + settings.seeds)
    last = settings.epochs
    for epoch in tqdm(range(last + 1), name, unit="epoch", disable=None):
        if epoch:
            toy.epoch()
        if epoch % _EVERY and epoch != last:
            continue
        clean, robust = toy.accuracies()
        values = {"clean": clean, "robust": robust, "stepped": toy.stepped_accuracy()}
        for packet in PACKETS:
            relation = toy.relation(predicted=packet == "predicted")
            relation.check()
            for what in ("dx", "dp", "product"):
                values[f"{what}_{packet}"] = getattr(relation, what)
        rows = {key: value.tolist() for key, value in values.items()}
        tables.append(pd.DataFrame({"epoch": epoch, "seed": seeds, **rows}))
    return pd.concat(tables, ignore_index=True)


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """The effect of each kind of training on the accuracies, and the final products.

    Args:
        table: a frame with the columns of `KIND`, epoch, seed, and those of `train`.

    Returns:
        A row for each kind and accuracy (`clean`; `robust`, under the attack; `stepped`, after the
            plain step). It has the means over the seeds at both epochs of `BETWEEN` and at the last
            one, and the mean final products of the packets. `change` is the mean change between the
            epochs of `BETWEEN`, with its 95 % interval over the seeds (`low`, `high`) and its
            `verdict`.
    """
    import pandas as pd

    from llm_attack.vision.trends import t_interval, verdict

    rows = []
    for key, kind in table.groupby(KIND, sort=False):
        known = dict(zip(KIND, key, strict=True))
        last = kind[kind["epoch"] == kind["epoch"].max()]
        products = {f"product_{packet}": last[f"product_{packet}"].mean() for packet in PACKETS}
        for name in _UNDER:
            curves = kind.pivot(index="seed", columns="epoch", values=name)
            first, second = (curves[epoch] for epoch in BETWEEN)
            change, low, high = t_interval(second - first)
            means = {f"epoch_{epoch}": curves[epoch].mean() for epoch in BETWEEN}
            means["last"] = curves[max(curves)].mean()
            rows.append(
                {
                    **{**known, "accuracy": name, **means, "change": change},
                    **{"low": low, "high": high, "verdict": verdict(low, high), **products},
                }
            )
    return pd.DataFrame(rows)


def draw(folder: Path) -> None:
    """Draws curves.csv: a row of panels for each optimiser and batch size, a column per domain."""
    import pandas as pd

    from llm_attack.theory.bands import shaded

    table = pd.read_csv(folder / "curves.csv")
    rows = list(table.groupby(["optimiser", "batch_size"], sort=False))
    domains = list(table["domain"].unique())
    labels = {"clean": "clean", "robust": "sign of the gradient", "stepped": f"x + {STEP} ∇loss"}
    looks = zip(labels, (COLOURS[0], COLOURS[3], COLOURS[2]), ("-", "--", "-."), strict=True)
    styles = [(name, colour, {"linestyle": line}) for name, colour, line in looks]
    with new_figure(folder, (2.1 * len(domains) + 1.9, 1.6 * len(rows) + 0.4)) as figure:
        axes = figure.subplots(len(rows), len(domains), sharex=True, sharey=True, squeeze=False)
        for ((optimiser, batch_size), row), panels in zip(rows, axes, strict=True):
            for domain, axis in zip(domains, panels, strict=True):
                for name, colour, line in styles:
                    curve = row[row["domain"] == domain]
                    shaded(axis, curve, name, colour, label=labels[name], **line)
                axis.axvspan(*BETWEEN, color="0.92", zorder=0)
                axis.set_title(f"{optimiser}, batches of {batch_size}, ±{domain:g}", fontsize=7.5)
            panels[0].set_ylabel("accuracy")
        lettered(axes.flat)
        for axis in axes[-1]:
            axis.set(xlabel="epoch", xscale="symlog", xlim=(0, table["epoch"].max()))
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center")


COMMAND = figure_command(
    "toys", PRESETS, run, without=("optimiser", "batch_size", "domain", "learning_rate")
)
