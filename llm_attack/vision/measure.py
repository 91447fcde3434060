"""Accuracy of a classifier without and with attacks, and the perturbations of the attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llm_attack.attacks import (
    ATTACKS,
    Attack,
    Losses,
    Watch,
    deepfool,
    keys_for,
    least_likely,
    perturb,
    perturb_each,
    sparsefool,
)
from llm_attack.vision.data import Images
from llm_attack.vision.networks import split
from llm_attack.vision.settings import SEARCHES, UNBOUNDED

_SEARCHES: dict[str, Callable[..., Tensor]] = dict(
    zip(SEARCHES, (deepfool, sparsefool), strict=True)
)
_EACH_CLASS = "apgdt"  # targets one class after the other

Row = dict[str, Any]


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """(N,) -log softmax of each label's score, with a gradient that never cancels.

    If the network is sure, 1 - softmax is below the resolution of float32. Then the gradient of
    torch's cross-entropy in the label's score rounds to zero. Here it is computed from the other
    classes' scores.
    """
    own = scores.gather(1, labels[:, None])[:, 0]
    others = scores.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return nn.functional.softplus(others - own)


def towards(scores: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """(N,) lead of the label's score over that of a target, in units of the scores' own spread.

    To lower it is to raise the targeted DLR loss of Croce and Hein 2020. The lead is divided by z1
    - (z3 + z4) / 2 of the scores (N, C) in descending order. With fewer than four classes, it is
    not divided.
    """
    lead = (scores.gather(1, labels[:, None]) - scores.gather(1, target[:, None]))[:, 0]
    if scores.shape[1] < 4:
        return lead
    first, _, third, fourth = scores.topk(4, dim=1).values.unbind(1)
    return lead / (first - (third + fourth) / 2 + 1e-12)


class Examples(NamedTuple):
    """Clean points to attack.

    Attributes:
        points: (N, ...) pixels or features.
        labels: (N,) right classes.
        keys: (N,) seeds of the random draws.
    """

    points: Tensor
    labels: Tensor
    keys: Tensor


def attacked(
    names: Sequence[str],
    classifier: Callable[[Tensor], Tensor],
    examples: Examples,
    like: Attack,
    bounds: tuple[float, float] | None,
    on_gradient: Callable[[str, Tensor], None] = lambda name, gradient: None,
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, attacked points) for each attack.

    For `apgd`, `apgdt` and `blocks`, any point on the way with a wrong answer counts, as in their
    authors' code. `apgdt` attacks only the remaining images with the next class. For all other
    attacks, the last point counts.

    Args:
        names: members of `settings.KNOWN`.
        classifier: maps points (N, ...) to scores (N, C).
        examples: the clean points.
        like: settings of all attacks; its name has no effect. Epsilon is the L-infinity amplitude
            in the units of the points. `deepfool_unbounded` and `sparsefool_unbounded` do not use
            it, and DeepFool and SparseFool have their own steps.
        bounds: box of the points; (0, 1) for pixels.
        on_gradient: called with the attack's name and each gradient that it used.
    """
    x, labels, keys = examples
    with torch.no_grad():
        scores = classifier(x)
    target = least_likely(scores, labels)

    now = ""  # the current attack: its points, gradients and result come one attack at a time
    watch = _Watch(classifier, examples)

    def note(gradient: Tensor) -> None:
        on_gradient(now, gradient)

    low, high = x - like.epsilon, x + like.epsilon
    box = (low, high) if bounds is None else (low.clamp(*bounds), high.clamp(*bounds))
    in_ball = {name: replace(like, name=name) for name in names if name in ATTACKS}
    losses = Losses(
        lambda point: watch.loss(point),
        lambda point: cross_entropy(classifier(point), target),
    )
    each = perturb_each(
        [attack for name, attack in in_ball.items() if name != _EACH_CLASS],
        x,
        losses,
        bounds=bounds,
        keys=keys,
        watch=Watch(note),
    )
    for now in names:
        if now in ATTACKS:
            watch = _Watch(classifier, examples)
            if now == _EACH_CLASS:
                others = range(scores.shape[1] - 1)
                point = _towards_each(in_ball[now], watch, others, bounds, note)
            else:
                point = next(each)
            any_counts = ATTACKS[now].reads_values
            yield now, _where(watch.wrong, watch.there, point) if any_counts else point
            continue
        search = _SEARCHES[now.removesuffix(UNBOUNDED)]
        limits = bounds if now.endswith(UNBOUNDED) else box
        yield now, search(classifier, x, labels=labels, bounds=limits, on_gradient=note)


class _Watch:
    """A classifier that records where it was wrong on the way.

    Attributes:
        wrong: (N,) whether it was wrong at some point.
        there: the last wrong point of each example, or the clean point.
    """

    def __init__(self, classifier: Callable[[Tensor], Tensor], examples: Examples) -> None:
        self.classifier, self.examples, self.labels = classifier, examples, examples.labels
        self.wrong = torch.zeros_like(examples.labels, dtype=torch.bool)
        self.there = examples.points.clone()

    def _scores(self, point: Tensor, rows: Tensor | slice) -> Tensor:
        scores = self.classifier(point)
        fallen = scores.detach().argmax(1) != self.labels[rows]
        self.wrong[rows] |= fallen
        self.there[rows] = _where(fallen, point.detach(), self.there[rows])
        return scores

    def loss(self, point: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """The cross-entropy of points that belong to the images `rows`."""
        return cross_entropy(self._scores(point, rows), self.labels[rows])

    def lead(self, point: Tensor, rows: Tensor, target: Tensor) -> Tensor:
        return towards(self._scores(point, rows), self.labels[rows], target)


def _towards_each(
    attack: Attack,
    watch: _Watch,
    others: Iterable[int],
    bounds: tuple[float, float] | None,
    on_gradient: Callable[[Tensor], None],
) -> Tensor:
    """The points of the largest loss of a targeted attack on one class after the other.

    Images that an earlier class has made wrong keep their points. `others` are numbers of target
    classes, without counting an image's own class.
    """
    x, _, keys = watch.examples
    with torch.no_grad():
        best, most = x.clone(), watch.loss(x)
    for other in others:
        rows = (~watch.wrong).nonzero()[:, 0]
        if not len(rows):
            break
        target = other + (watch.labels[rows] <= other).long()
        loss = partial(watch.loss, rows=rows)
        point = perturb(
            attack,
            x[rows],
            Losses(loss, target_losses=[partial(watch.lead, rows=rows, target=target)]),
            bounds=bounds,
            keys=keys[rows],
            watch=Watch(on_gradient),
        )
        with torch.no_grad():
            value = loss(point)
        better = value > most[rows]
        best[rows] = _where(better, point, best[rows])
        most[rows] = torch.where(better, value, most[rows])
    return best


def _where(chosen: Tensor, this: Tensor, other: Tensor) -> Tensor:
    """`this` for the examples with `chosen` (N,), and `other` for the rest."""
    return torch.where(chosen.reshape(-1, *[1] * (this.dim() - 1)), this, other)


def _is_search(name: str) -> bool:
    return name.removesuffix(UNBOUNDED) in SEARCHES


class _Tally:
    """Results under one condition, image by image."""

    def __init__(self) -> None:
        self.right: list[Tensor] = []
        self.norms: list[Tensor] = []  # of fooled images: L0, L2, Linf, (n, 3)
        self.zeros = torch.zeros((), dtype=torch.int64)
        self.elements = 0

    def gradient(self, slope: Tensor) -> None:
        self.zeros = self.zeros.to(slope.device) + (slope == 0).sum()
        self.elements += slope.numel()

    def add(self, right: Tensor, change: Tensor | None = None) -> None:
        """Adds a batch: which images are right, and the perturbations of the wrong ones."""
        self.right.append(right)
        if change is not None:
            change = change.flatten(1).float()
            norms = [change.norm(p, dim=1) for p in (0, 2, torch.inf)]
            self.norms.append(torch.stack(norms, dim=1))

    def row(self, condition: str, right_before: Tensor) -> Row:
        norms = torch.cat(self.norms) if self.norms else torch.zeros(0, 3)
        l0, l2, linf = norms.median(0).values.tolist() if len(norms) else [None] * 3
        shares = wilson_of(torch.cat(self.right))
        before = right_before[: shares["images"]].double().mean().item()
        return {
            "condition": condition,
            **shares,
            "before": before,
            "fooled": 1 - shares["accuracy"] / before if before else None,
            "l0": l0,
            "l2": l2,
            "linf": linf,
            "zero_gradient": self.zeros.item() / self.elements if self.elements else None,
        }


def wilson_of(right: Tensor) -> Row:
    """The accuracy with its 95 % Wilson interval, and the number of images."""
    from llm_attack.stats import wilson

    successes, n = int(right.sum()), len(right)
    low, high = wilson(successes, n)
    return {"accuracy": successes / n, "low": low, "high": high, "images": n}


def measure(
    network: nn.Module,
    images: Images,
    names: Sequence[str],
    *,
    epsilon: float,
    steps: int = 10,
    subset: int | None = None,
    searched: int | None = None,
    at: str | None = None,
    epsilon_unit: str = "absolute",
    batch_size: int = 250,
    seed: int = 0,
) -> list[Row]:
    """A row for each condition: `none`, the attacks, their `lowest` and `highest`, and `all`.

    Attacks without an amplitude do not count for `lowest` and `highest`, unless there are no
    others. Robust accuracy is the share of images that are right before *and* after an attack.
    Images that are wrong before are not attacked, because they could not count.

    Args:
        network: maps pixels in [0, 1] to scores; a chain of blocks if `at` is given.
        images: labelled images.
        names: names of attacks, at least one; members of `settings.KNOWN`.
        epsilon: L-infinity amplitude.
        steps: number of steps of the iterative attacks.
        subset: number of images for all conditions except `all`: the first ones; None for all.
        searched: number of these that DeepFool and SparseFool attack: the first ones; None for all.
        at: the block whose output is attacked, without a box; None for the pixels, in [0, 1].
        epsilon_unit: `rms` for an epsilon in units of the point's root mean square.
        batch_size: images at once.
        seed: seed of the random draws, which belong to images, so batches do not matter.

    Returns:
        Rows with these entries:

            - `accuracy`: clean (`none`, `all`) or robust, with its 95 % Wilson interval (`low`,
              `high`)
            - `images`: their number
            - `before`: the share that was right before the attack
            - `fooled`: the share of these that the attack made wrong
            - `l0`, `l2`, `linf`: norms of the perturbation, medians over the fooled images
            - `zero_gradient`: the share of gradient coordinates that were exactly zero
            - `epsilon`: the amplitude in the units of the point
            - `rms`: the root mean square of the point
    """
    extract, classifier = (nn.Identity(), network) if at is None else split(network, at)
    few = len(images) if subset is None else min(subset, len(images))
    fewer = few if searched is None else min(searched, few)
    starts = (range(0, fewer, batch_size), range(fewer, few, batch_size))
    edges = sorted({*starts[0], *starts[1], *range(few, len(images), batch_size)})
    batches = [slice(a, b) for a, b in zip(edges, [*edges[1:], len(images)], strict=True)]
    keys = torch.tensor([keys_for(seed, [i]) for i in range(few)]).to(images.labels.device)
    tallies = {name: _Tally() for name in ("none", *names)}
    everything = _Tally()
    with frozen(network):

        def points(rows: slice) -> Tensor:
            with torch.no_grad():
                point: Tensor = extract(images[rows].scaled())
            return point

        def right(x: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                logits: Tensor = classifier(x)
            return logits.argmax(1) == labels

        attacked_batches = [rows for rows in batches if rows.start < few]
        squares = [points(rows).flatten(1).double().square().mean(1) for rows in attacked_batches]
        rms = torch.cat(squares).mean().sqrt().item()
        amplitude = epsilon * (rms if epsilon_unit == "rms" else 1.0)
        for rows in tqdm(batches, desc="attacks", leave=False, disable=None):
            x, labels = points(rows), images.labels[rows]
            clean = right(x, labels)
            everything.add(clean)
            if rows.start >= few:
                continue
            tallies["none"].add(clean)
            now = [name for name in names if rows.start < fewer or not _is_search(name)]
            if not clean.any():
                for name in now:
                    tallies[name].add(clean)
                continue
            x, labels = x[clean], labels[clean]
            for name, point in attacked(
                now,
                classifier,
                Examples(x, labels, keys[rows][clean]),
                Attack(epsilon=amplitude, steps=steps),
                (0, 1) if at is None else None,
                on_gradient=lambda name, slope: tallies[name].gradient(slope),
            ):
                stays = right(point, labels)
                after = clean.clone()
                after[clean] = stays
                tallies[name].add(after, (point - x)[~stays])
    right_before = torch.cat(tallies["none"].right)
    table = [tally.row(condition, right_before) for condition, tally in tallies.items()]
    bounded = [row for row in table[1:] if not row["condition"].endswith(UNBOUNDED)]
    robust = sorted(bounded or table[1:], key=lambda row: row["accuracy"])
    kept = ("accuracy", "low", "high", "images", "before")
    for condition, row in (("lowest", robust[0]), ("highest", robust[-1])):
        table.append({"condition": condition, **{name: row[name] for name in kept}})
    table.append({"condition": "all", **wilson_of(torch.cat(everything.right))})
    return [{**row, "epsilon": amplitude, "rms": rms} for row in table]


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """While the context lasts, the network evaluates, and its parameters get no gradients.

    On a GPU, convolutions use float32. The default of cuDNN is TF32, which has ten of its 23 bits.
    """
    modes = [(module, module.training) for module in network.modules()]
    before = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    network.eval().requires_grad_(False)
    rounded = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = rounded
        for module, mode in modes:
            module.training = mode
        for parameter, needs in before:
            parameter.requires_grad_(needs)
