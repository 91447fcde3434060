"""Fig. 4, the binary toy: a class boundary sharpens, and its packet obeys the relation.

`binary` has the networks and their measurements. No torch is imported here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from llm_attack.base.drawing import COLOURS, lettered, new_figure
from llm_attack.base.record import Stopwatch, as_csv, write_text
from llm_attack.reproduce import figure_command
from llm_attack.theory.settings import PACKETS, STEP, ToySettings

if TYPE_CHECKING:
    import pandas as pd


# It takes seconds, so the quick preset is the whole experiment.
PRESETS = {"quick": ToySettings(), "paper": ToySettings()}


def run(settings: ToySettings, folder: Path) -> dict[str, Any]:
    """Binary toy: landscapes, accuracies, uncertainty relation.

    All are computed at every epoch.
    """
    clock = Stopwatch()
    curves, landscapes = train(settings)
    clock.lap("training")
    write_text(folder / "curves.csv", as_csv(curves, "%.6g"))
    write_text(folder / "landscapes.csv", as_csv(landscapes, "%.5g"))
    draw(folder, settings)
    clock.lap("figure")
    last = curves[curves.epoch == settings.epochs].drop(columns=["epoch", "seed"])
    return {
        "last_epoch": {name: last[name].round(6).tolist() for name in last},
        "lowest_margin": {
            name: (curves[f"product_{name}"] - curves[f"bound_{name}"]).min() for name in PACKETS
        },
        "seconds": clock,
    }


def train(settings: ToySettings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trains all seeds; measures before the first epoch and after each.

    Returns:
        Two frames. The curves have a row for each epoch and seed (epoch, seed, loss, clean, robust,
            stepped, and for each packet dx_fixed, dp_fixed, product_fixed, bound_fixed,
            dx_predicted, ...). The landscapes belong to the first seed, after a fifth, two fifths
            and all of the epochs (epoch, x1, x2, loss, fixed, predicted).

    Raises:
        ArithmeticError: dx · dp was below its bound.
    """
    import pandas as pd

    from llm_attack.theory.binary import Toy

    toy = Toy(settings)
    pictured = {max(1, settings.epochs * part // 5) for part in (1, 2, 5)}
    curves, landscapes = [], []
    for epoch in tqdm(range(settings.epochs + 1), desc="fig4", unit="epoch", disable=None):
        if epoch:
            toy.epoch()
        clean, robust = toy.accuracies()
        values = {"loss": toy.training_loss(), "clean": clean, "robust": robust}
        values["stepped"] = toy.stepped_accuracy()
        for name in PACKETS:
            relation = toy.relation(predicted=name == "predicted")
            try:
                relation.check()
            except ArithmeticError as error:
                raise ArithmeticError(f"epoch {epoch}, {name} packet: {error}") from error
            for what in ("dx", "dp", "product", "bound"):
                values[f"{what}_{name}"] = getattr(relation, what)
        known = {"epoch": epoch, "seed": range(settings.seed, settings.seed + settings.seeds)}
        curves.append(pd.DataFrame(known | {name: x.tolist() for name, x in values.items()}))
        if epoch in pictured:
            landscapes.append(pd.DataFrame({"epoch": epoch, **toy.landscape()}))
    return pd.concat(curves, ignore_index=True), pd.concat(landscapes, ignore_index=True)


def draw(folder: Path, settings: ToySettings) -> None:
    """Draws the landscapes and the curves of all seeds, from curves.csv and landscapes.csv."""
    import pandas as pd

    from llm_attack.theory.bands import over_seeds, shaded

    table, landscapes = (pd.read_csv(folder / f"{x}.csv") for x in ("curves", "landscapes"))
    curves = over_seeds(table, ["epoch"])
    with new_figure(folder, (7.2, 6.9)) as figure:
        axes = figure.subplots(3, 3)
        for row, packet in zip(axes, PACKETS, strict=False):
            top = landscapes[packet].max()
            for ax, (epoch, rows) in zip(row, landscapes.groupby("epoch"), strict=False):
                plane = rows.pivot(index="x2", columns="x1", values=packet)
                sides, heights = [plane.columns, plane.index], plane.to_numpy()
                colours: Any = {"vmin": 0, "vmax": top, "cmap": "cividis", "shading": "gouraud"}
                image = ax.pcolormesh(*sides, heights, rasterized=True, **colours)
                # both classes are equally likely on this contour
                loss = rows.pivot(index="x2", columns="x1", values="loss").to_numpy()
                ax.contour(*sides, loss, levels=[math.log(2)], colors="white", linewidths=1)
                ax.set(title=f"epoch {epoch}", xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
                ticks = (-settings.domain, 0, settings.domain)
                ax.set(xticks=ticks, yticks=ticks)
                ax.grid(False)
            label = f"class {settings.label}" if packet == "fixed" else "predicted class"
            figure.colorbar(image, ax=row, label=f"ψ, {label}")

        lettered(axes.flat, ("A", "B", "C", "A′", "B′", "C′", "D", "E", "F"))
        accuracy, widths, relation = axes[2]
        robust = f"{settings.attack} (sign), ε = {settings.epsilon:g}"
        shaded(accuracy, curves, "clean", COLOURS[0], label="clean")
        shaded(accuracy, curves, "robust", COLOURS[3], label=robust, linestyle="--")
        if "stepped" in table:  # older runs have none
            step = {"label": f"plain step, x + {STEP} ∇loss", "linestyle": "-."}
            shaded(accuracy, curves, "stepped", COLOURS[2], **step)
        accuracy.set(ylabel="accuracy", ylim=(None, 1.02))
        of_packets = zip(PACKETS, ("-", "--"), (COLOURS[3], COLOURS[0]), strict=True)
        for packet, line, colour in of_packets:
            shaded(widths, curves, f"dx_{packet}", COLOURS[2], label=f"Δx, {packet}", ls=line)
            shaded(widths, curves, f"dp_{packet}", COLOURS[4], label=f"Δp, {packet}", ls=line)
            shaded(relation, curves, f"product_{packet}", colour, label=f"Δx · Δp, {packet}")
            shaded(relation, curves, f"bound_{packet}", colour, label="its bound", ls="--")
        widths.set(ylabel="width of the packet", yscale="log")
        relation.axhline(0.5, color="black", linewidth=1, linestyle=":", label="½")
        highest = max(0.5, *(table[f"product_{packet}"].max() for packet in PACKETS))
        relation.set(ylabel="product and bound", ylim=(0, 1.8 * highest))  # room for the legend
        for ax in axes[2]:
            ax.set(xlabel="epoch", xlim=(0, table.epoch.max()))
            ax.legend(fontsize=6)


COMMAND = figure_command("fig4", PRESETS, run)
