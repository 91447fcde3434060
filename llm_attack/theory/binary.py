"""The networks of the binary toy, Fig. 4, and what is measured on them.

Points are uniform in the square [-1, 1]² and labelled by the sign of x1. The packet is the loss of
one class along the line x2 = 0, psi(x1) = loss((x1, 0), label) / norm, with the label the same on
the whole line: with the label of each point's own side, the loss would jump where the sign changes,
and psi would have no derivative there. All seeds train as one batched model, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_attack.attacks import ATTACKS, Attack, Groups, keys_for, perturb
from llm_attack.errors import invalid
from llm_attack.theory.fig4 import Settings
from llm_attack.theory.packet import Uncertainty, uncertainty_on_nodes
from llm_attack.theory.stacked import StackedMLP, cross_entropy, generators, pick, stack

GRID = 51  # points along each side of a landscape


class Toy:
    """Networks, points and optimiser of all seeds.

    Attributes:
        network: maps (seeds, N, 2) to logits (seeds, N, 2).
        x: training points, (seeds, points, 2).
        test: points for the accuracies, (seeds, test_points, 2).
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        in_ball = [name for name, kind in ATTACKS.items() if not kind.minimal]
        if settings.attack not in in_ball:
            raise invalid("attack", settings.attack, in_ball)
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
        points = torch.arange(labels.numel(), device=labels.device).reshape(labels.shape)

        def of_other(x: Tensor) -> Tensor:
            return self.loss(x, 1 - labels).flatten()

        attacked = perturb(
            self.attack,
            self.test,
            lambda x: self.loss(x, labels).flatten(),
            target_loss=of_other,
            target_losses=[of_other],
            bounds=(-1, 1),
            keys=self.keys,
            examples=Groups(points, points.numel()),
        )
        with torch.no_grad():
            found = [self.network(x).argmax(-1) == labels for x in (self.test, attacked)]
        clean, robust = (right.double().mean(1) for right in found)
        return clean, robust

    def relation(self) -> Uncertainty:
        """The relation for the packet of each seed, (seeds,)."""
        return uncertainty_on_nodes(lambda x1: self.on_plane(x1, torch.zeros_like(x1)), -1, 1)

    def landscape(self) -> dict[str, Tensor]:
        """The loss of the packet's class in the first seed on a grid: x1, x2, loss, (GRID²,)."""
        side = torch.linspace(-1, 1, GRID, dtype=torch.float64)
        x1, x2 = torch.cartesian_prod(side, side).unbind(-1)
        with torch.no_grad():
            return {"x1": x1, "x2": x2, "loss": self.on_plane(x1, x2)[0].cpu()}

    def on_plane(self, x1: Tensor, x2: Tensor) -> Tensor:
        """The loss of the packet's class at points (M,) of the plane, (seeds, M)."""
        x = torch.stack([x1, x2], -1).to(self.x.device).expand(len(self.x), -1, -1)
        return self.loss(x, x.new_full(x.shape[:2], self.settings.label, dtype=torch.long))


def labels_of(x: Tensor) -> Tensor:
    """The class of each point: 1 where x1 > 0."""
    return (x[..., 0] > 0).long()
