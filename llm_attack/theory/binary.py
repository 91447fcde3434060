"""The binary toy (Fig. 4): a class boundary sharpens, and its packet obeys the relation.

Points are uniform in the square [-1, 1]² and labelled by the sign of x1. The packet is the loss of
one class along the line x2 = 0, psi(x1) = loss((x1, 0), label) / norm, with the label the same on
the whole line: with the label of each point's own side, the loss would jump where the sign changes,
and psi would have no derivative there. All seeds train as one batched model, in float64.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from llm_attack.attacks import Attack, keys_for, perturb
from llm_attack.drawing import COLOURS, save_figure, style
from llm_attack.record import write_text
from llm_attack.theory.figures import shaded
from llm_attack.theory.packet import Uncertainty, uncertainty_on_nodes
from llm_attack.theory.settings import BinarySettings
from llm_attack.theory.stacked import StackedMLP, cross_entropy, generators, pick, stack

GRID = 51  # points along each side of a landscape


class Toy:
    """Networks, points and optimiser of all seeds.

    Attributes:
        network: maps (seeds, N, 2) to logits (seeds, N, 2).
        x: training points, (seeds, points, 2).
        test: points for the accuracies, (seeds, test_points, 2).
    """

    def __init__(self, settings: BinarySettings) -> None:
        self.settings = settings
        self.attack = Attack(settings.attack, epsilon=settings.epsilon)
        self.generators = generators(settings.seed, settings.seeds)
        sizes = (2, settings.width, settings.width, 2)
        self.network = StackedMLP(sizes, self.generators, torch.float64).to(settings.device)
        self.x, self.test = self._points(settings.points), self._points(settings.test_points)
        numbers = range(settings.seed, settings.seed + settings.seeds)
        keys = [[keys_for(s, [i]) for i in range(settings.test_points)] for s in numbers]
        self.keys = torch.tensor(keys, device=settings.device)
        self.optimiser = torch.optim.Adam(
            self.network.parameters(), lr=settings.learning_rate, fused=True
        )

    def _points(self, n: int) -> Tensor:
        draw = stack(self.generators, lambda g: torch.rand(n, 2, generator=g, dtype=torch.float64))
        return (2 * draw - 1).to(self.settings.device)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy (seeds, N) at points (seeds, N, 2) with labels (seeds, N)."""
        return cross_entropy(self.network(x), labels)

    def epoch(self) -> None:
        """One pass over the training points, in an order of its own for each seed."""
        n = self.settings.points
        order = stack(self.generators, lambda g: torch.randperm(n, generator=g))
        for x in pick(self.x, order.to(self.x.device)).split(self.settings.batch_size, 1):
            self.optimiser.zero_grad()
            self.loss(x, labels_of(x)).mean(1).sum().backward()
            self.optimiser.step()

    def accuracies(self) -> tuple[Tensor, Tensor]:
        """Clean and robust accuracy of each seed, (seeds,)."""
        labels = labels_of(self.test)
        attacked = perturb(
            self.attack,
            self.test,
            lambda x: self.loss(x, labels),
            target_loss=lambda x: self.loss(x, 1 - labels),
            bounds=(-1, 1),
            keys=self.keys,
        )
        with torch.no_grad():
            found = [self.network(x).argmax(-1) == labels for x in (self.test, attacked)]
        clean, robust = (right.double().mean(1) for right in found)
        return clean, robust

    def relation(self) -> Uncertainty:
        """The relation for the packet of each seed, (seeds,)."""
        return uncertainty_on_nodes(lambda x1: self.on_plane(x1, torch.zeros_like(x1)), -1, 1)

    def on_plane(self, x1: Tensor, x2: Tensor) -> Tensor:
        """The loss of the packet's class at points (M,) of the plane, (seeds, M)."""
        x = torch.stack([x1, x2], -1).to(self.x.device).expand(len(self.x), -1, -1)
        return self.loss(x, x.new_full(x.shape[:2], self.settings.label, dtype=torch.long))


def labels_of(x: Tensor) -> Tensor:
    """The class of each point: 1 where x1 > 0."""
    return (x[..., 0] > 0).long()


def run(settings: BinarySettings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Trains all seeds; measures before the first epoch and after each.

    Returns:
        The curves, a row for each epoch and seed (epoch, seed, clean, robust, dx, dp, product,
        bound), and the landscapes of the first seed after a fifth, two fifths and all of the
        epochs (epoch, x1, x2, loss).

    Raises:
        ArithmeticError: dx · dp was below its bound.
    """
    toy = Toy(settings)
    pictured = {max(1, settings.epochs * part // 5) for part in (1, 2, 5)}
    curves, landscapes = [], []
    for epoch in tqdm(range(settings.epochs + 1), desc="fig4", unit="epoch", disable=None):
        if epoch:
            toy.epoch()
        clean, robust = toy.accuracies()
        found = toy.relation()
        try:
            found.check()
        except ArithmeticError as error:
            raise ArithmeticError(f"epoch {epoch}: {error}") from error
        columns = {"clean": clean, "robust": robust, "dx": found.dx, "dp": found.dp}
        columns |= {"product": found.product, "bound": found.bound}
        table = pd.DataFrame({name: value.tolist() for name, value in columns.items()})
        table.insert(0, "epoch", epoch)
        table.insert(1, "seed", range(settings.seed, settings.seed + settings.seeds))
        curves.append(table)
        if epoch in pictured:
            landscapes.append(_landscape(toy, epoch))
    return pd.concat(curves, ignore_index=True), pd.concat(landscapes, ignore_index=True)


def _landscape(toy: Toy, epoch: int) -> pd.DataFrame:
    side = torch.linspace(-1, 1, GRID, dtype=torch.float64)
    x1, x2 = torch.cartesian_prod(side, side).unbind(-1)
    with torch.no_grad():
        loss = toy.on_plane(x1, x2)[0]
    return pd.DataFrame({"epoch": epoch, "x1": x1, "x2": x2, "loss": loss.cpu()})


def reproduce(settings: BinarySettings, folder: Path) -> dict[str, Any]:
    """Runs the experiment; writes figure, curves.csv and landscapes.csv.

    Returns:
        What the last epoch was like, for each seed in turn, and seconds.
    """
    start = time.perf_counter()
    curves, landscapes = run(settings)
    trained = time.perf_counter()
    with style():
        save_figure(figure(curves, landscapes, settings), folder)
    write_text(folder / "curves.csv", curves.to_csv(index=False, float_format="%.6g"))
    write_text(folder / "landscapes.csv", landscapes.to_csv(index=False, float_format="%.5g"))
    last = curves[curves.epoch == settings.epochs].drop(columns=["epoch", "seed"])
    return {
        "last_epoch": {name: last[name].round(6).tolist() for name in last},
        "lowest_margin": (curves["product"] - curves["bound"]).min(),
        "seconds": {"training": trained - start, "figure": time.perf_counter() - trained},
    }


def figure(curves: pd.DataFrame, landscapes: pd.DataFrame, settings: BinarySettings) -> Any:
    """The figure: landscapes of the first seed, and curves with the range over seeds."""
    from matplotlib.figure import Figure

    result = Figure(figsize=(7.2, 4.6))
    axes = result.subplots(2, 3)
    top = landscapes.loss.max()
    for ax, (epoch, table) in zip(axes[0], landscapes.groupby("epoch"), strict=False):
        plane = table.pivot(index="x2", columns="x1", values="loss")
        sides, heights = [plane.columns, plane.index], plane.to_numpy()
        image = ax.pcolormesh(
            *sides, heights, vmin=0, vmax=top, cmap="cividis", shading="gouraud", rasterized=True
        )
        ax.contour(*sides, heights, levels=[math.log(2)], colors="white", linewidths=1)
        ax.set(title=f"epoch {epoch}", xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
        ax.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        ax.grid(False)
    result.colorbar(image, ax=axes[0], label=f"loss, class {settings.label}")

    accuracy, widths, relation = axes[1]
    robust = f"{settings.attack}, ε = {settings.epsilon:g}"
    shaded(accuracy, curves, "clean", COLOURS[0], label="clean")
    shaded(accuracy, curves, "robust", COLOURS[3], label=robust, linestyle="--")
    accuracy.set(ylabel="accuracy", ylim=(None, 1.02))
    shaded(widths, curves, "dx", COLOURS[0], label="Δx")
    shaded(widths, curves, "dp", COLOURS[3], label="Δp", linestyle="--")
    widths.set(ylabel="width of the packet", yscale="log")
    shaded(relation, curves, "product", COLOURS[0], label="Δx · Δp")
    shaded(relation, curves, "bound", COLOURS[3], label="bound on [-1, 1]", linestyle="--")
    relation.axhline(0.5, color="black", linewidth=1, linestyle=":", label="½")
    highest = max(0.5, curves["product"].max())
    relation.set(ylabel="product and bound", ylim=(0, 1.6 * highest))  # room for the legend
    for ax in axes[1]:
        ax.set(xlabel="epoch", xlim=(0, settings.epochs))
        ax.legend()
    return result
