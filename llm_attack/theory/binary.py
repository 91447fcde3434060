"""The networks of the binary toy, Fig. 4, and their measurements.

Points are uniform in a square round 0, and their label is the sign of x1. A packet is a loss along
the line x2 = 0: psi(x1) = loss((x1, 0), label) / norm. The fixed packet has the same label on the
whole line. The predicted packet has the class that the network predicts at x1. So it is large only
at the border of the classes, where it is continuous and its derivative jumps. (With the label of
each point's own side, psi itself would jump, and have no derivative.) All seeds train as one
batched model, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_attack.attacks import Attack, Elements, Groups, Losses, keys_for, perturb
from llm_attack.theory.packet import Uncertainty, uncertainty_on_nodes
from llm_attack.theory.settings import PACKETS, STEP, ToySettings
from llm_attack.theory.stacked import StackedMLP, cross_entropy, generators, pick, stack

GRID = 51  # points along each side of a landscape
_SCANNED = 2001  # points of the line between which borders are searched
_HALVINGS = 45  # of the distance between them, down to the last bit


class Toy:
    """Networks, points and optimiser of all seeds.

    Attributes:
        network: maps (seeds, N, 2) to logits (seeds, N, 2).
        x: (seeds, points, 2) training points.
        test: (seeds, test_points, 2) points for the accuracies.
    """

    def __init__(self, settings: ToySettings) -> None:
        self.settings = settings
        self.attack = Attack(settings.attack, epsilon=settings.epsilon)
        self.generators = generators(settings.seed, settings.seeds)
        sizes = (2, settings.width, settings.width, 2)
        self.network = StackedMLP(sizes, self.generators, torch.float64).to(settings.device)
        self.x, self.test = self._points(settings.points), self._points(settings.test_points)
        numbers = range(settings.seed, settings.seed + settings.seeds)
        keys = [[keys_for(s, [i]) for i in range(settings.test_points)] for s in numbers]
        self.keys = torch.tensor(keys, device=settings.device)
        kind = torch.optim.Adam if settings.optimiser == "adam" else torch.optim.SGD
        self.optimiser = kind(self.network.parameters(), lr=settings.learning_rate, fused=True)

    def _points(self, n: int) -> Tensor:
        draw = stack(self.generators, lambda g: torch.rand(n, 2, generator=g, dtype=torch.float64))
        return (self.settings.domain * (2 * draw - 1)).to(self.settings.device)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy (seeds, N) at points (seeds, N, 2) with labels (seeds, N)."""
        return cross_entropy(self.network(x), labels)

    def epoch(self) -> None:
        """One pass over the training points. Each seed has its own order."""
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
            Losses(lambda x: self.loss(x, labels).flatten(), of_other, [of_other]),
            bounds=(-self.settings.domain, self.settings.domain),
            keys=self.keys,
            elements=Elements(examples=Groups(points, points.numel())),
        )
        with torch.no_grad():
            right_of = [self.network(x).argmax(-1) == labels for x in (self.test, attacked)]
        clean, robust = (right.double().mean(1) for right in right_of)
        return clean, robust

    def stepped_accuracy(self) -> Tensor:
        """Accuracy of each seed after a plain step of `STEP` along the gradient, (seeds,).

        Each point moves to x + STEP · ∇loss(x), and stays in the square. Unlike an attack with an
        amplitude, this step moves a point far if the loss is steep, and hardly if it is flat.
        """
        labels = labels_of(self.test)
        x = self.test.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(x, labels).sum(), x)
        side = self.settings.domain
        with torch.no_grad():
            logits: Tensor = self.network((self.test + STEP * gradient).clamp(-side, side))
        return (logits.argmax(-1) == labels).double().mean(1)

    def training_loss(self) -> Tensor:
        """Mean cross-entropy of the training points of each seed, (seeds,)."""
        with torch.no_grad():
            return self.loss(self.x, labels_of(self.x)).mean(1)

    def relation(self, predicted: bool = False) -> Uncertainty:
        """The relation for the fixed or the predicted packet of each seed, (seeds,)."""
        return uncertainty_on_nodes(
            lambda x1: self.on_plane(x1, torch.zeros_like(x1), predicted),
            *(-self.settings.domain, self.settings.domain),
            # the predicted packet becomes as narrow as the border
            panels=128 if predicted else 32,
            kinks=self.borders().tolist() if predicted else (),
        )

    def borders(self) -> Tensor:
        """The places on the line x2 = 0 at which the predicted class of any seed changes."""
        x1 = self._side(_SCANNED)
        class_at = self._predicted(x1)
        seed, i = (class_at[:, 1:] != class_at[:, :-1]).nonzero(as_tuple=True)
        low, high = x1[i.cpu()], x1[i.cpu() + 1]
        at, left = torch.arange(len(i), device=i.device), class_at[seed, i]
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            beyond = (self._predicted(middle)[seed, at] != left).cpu()
            low, high = middle.where(~beyond, low), middle.where(beyond, high)
        return (low + high) / 2

    def _predicted(self, x1: Tensor) -> Tensor:
        """(seeds, M) classes at points (M,) of the line x2 = 0."""
        with torch.no_grad():
            logits: Tensor = self.network(self._points_of(x1, torch.zeros_like(x1)))
        return logits.argmax(-1)

    def landscape(self) -> dict[str, Tensor]:
        """The packets of the first seed on a grid of the square; each entry is (GRID²,).

        The coordinates are `x1` and `x2`. The packets `fixed` and `predicted` have ∫∫psi² = 1 (by
        trapezoids). `loss` is the loss of the fixed class.
        """
        side = self._side(GRID)
        x1, x2 = torch.cartesian_prod(side, side).unbind(-1)
        with torch.no_grad():
            losses = [self.on_plane(x1, x2, predicted)[0].cpu() for predicted in (False, True)]
        landscape = {"x1": x1, "x2": x2, "loss": losses[0]}
        for name, loss in zip(PACKETS, losses, strict=True):
            square = loss.reshape(GRID, GRID).square()
            landscape[name] = loss / torch.trapezoid(torch.trapezoid(square, side), side).sqrt()
        return landscape

    def on_plane(self, x1: Tensor, x2: Tensor, predicted: bool = False) -> Tensor:
        """The loss of the packet's class at points (M,) of the plane, (seeds, M)."""
        x = self._points_of(x1, x2)
        if predicted:
            return self.loss(x, self.network(x).argmax(-1))
        return self.loss(x, x.new_full(x.shape[:2], self.settings.label, dtype=torch.long))

    def _side(self, n: int) -> Tensor:
        """(n,) coordinates from one end of the square to the other."""
        return torch.linspace(-self.settings.domain, self.settings.domain, n, dtype=torch.float64)

    def _points_of(self, x1: Tensor, x2: Tensor) -> Tensor:
        """(seeds, M, 2) points with these coordinates, for each seed."""
        return torch.stack([x1, x2], -1).to(self.x.device).expand(len(self.x), -1, -1)


def labels_of(x: Tensor) -> Tensor:
    """The class of each point: 1 if x1 > 0, else 0."""
    return (x[..., 0] > 0).long()
