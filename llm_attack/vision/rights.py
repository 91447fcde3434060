"""Is each single image classified right, without an attack and under each attack?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llm_attack.attacks import Attack, keys_for
from llm_attack.vision.data import Images
from llm_attack.vision.measure import Examples, attacked, frozen
from llm_attack.vision.networks import split


def right_under(
    network: nn.Module,
    images: Images,
    names: Sequence[str],
    *,
    epsilon: float,
    steps: int = 10,
    at: str | None = None,
    batch_size: int = 250,
    seed: int = 0,
) -> dict[str, Tensor]:
    """(N,) whether each image is right without an attack (`none`), and both before and after each.

    For the arguments see `measure`. Epsilon is in the units of the point.
    """
    extract, classifier = (nn.Identity(), network) if at is None else split(network, at)
    bounds = (0, 1) if at is None else None
    keys = torch.tensor([keys_for(seed, [i]) for i in range(len(images))]).to(images.labels.device)
    parts: dict[str, list[Tensor]] = {name: [] for name in ("none", *names)}
    with frozen(network):
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            labels = images.labels[rows]
            with torch.no_grad():
                x = extract(images[rows].scaled())
                clean = classifier(x).argmax(1) == labels
            parts["none"].append(clean)
            examples = Examples(x[clean], labels[clean], keys[rows][clean])
            if not clean.any():
                for name in names:
                    parts[name].append(clean)
                continue
            like = Attack(epsilon=epsilon, steps=steps)
            for name, point in attacked(names, classifier, examples, like, bounds):
                after = clean.clone()
                with torch.no_grad():
                    after[clean] = classifier(point).argmax(1) == examples.labels
                parts[name].append(after)
    return {name: torch.cat(rights) for name, rights in parts.items()}


def clean_accuracy(network: nn.Module, images: Images, batch_size: int = 250) -> float:
    """The share of images that the network classifies right."""
    starts = range(0, len(images), batch_size)
    with frozen(network), torch.no_grad():
        batches = (images[i : i + batch_size] for i in starts)
        right = [network(batch.scaled()).argmax(1) == batch.labels for batch in batches]
    return torch.cat(right).double().mean().item()
