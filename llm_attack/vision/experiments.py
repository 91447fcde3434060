"""Fig. 1, 2 and 5: networks are trained, attacked after every epoch, and shown."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from llm_attack.attacks import Attack, keys_for
from llm_attack.errors import UsageError, invalid
from llm_attack.record import write_text
from llm_attack.vision import data, figures
from llm_attack.vision.data import Dataset
from llm_attack.vision.measure import KNOWN, Row, attacked, frozen, measure
from llm_attack.vision.networks import NETWORKS, build, split
from llm_attack.vision.settings import CurveSettings, FeatureSettings, GallerySettings, Settings
from llm_attack.vision.train import train


def curves(settings: CurveSettings, folder: Path) -> dict[str, Any]:
    """Fig. 2, and Fig. 5 with `FeatureSettings`: accuracies after every epoch.

    Writes the figure and `table.csv`, the rows of `measure`; keeps in `checkpoints` what is needed
    to resume.

    Returns:
        For each data set and network the accuracies after the last epoch; and the seconds.

    Raises:
        UsageError: bad settings, or data that cannot be used; before anything is trained.
    """
    at = settings.at if isinstance(settings, FeatureSettings) else None
    unit = settings.epsilon_unit if isinstance(settings, FeatureSettings) else "absolute"
    attacks = _listed("attacks", settings.attacks, KNOWN)
    names = _listed("network", settings.network, NETWORKS)
    bench = Bench(settings)
    datasets = [bench.load(x) for x in settings.dataset.split(",")]
    epsilons = {dataset.name: _epsilon(settings, dataset) for dataset in datasets}
    pairs = [(dataset, name) for dataset in datasets for name in names]
    if at is not None:
        for dataset, name in pairs:
            split(bench.untrained(dataset, name), at)
    frames, results = [], {}
    for dataset, name in pairs:

        def after_epoch(network: nn.Sequential, dataset: Dataset = dataset) -> list[Row]:
            return measure(
                network,
                dataset.test,
                attacks,
                epsilon=epsilons[dataset.name],
                steps=settings.steps,
                subset=settings.subset,
                at=at,
                epsilon_unit=unit,
                seed=settings.seed,
            )

        label = f"{dataset.name}-{name}"
        file = re.sub(r"[^\w.-]+", "_", label)
        state = folder / "checkpoints" / f"{file}.pt"
        network, rows = bench.trained(dataset, name, after_epoch, state, settings.resume)
        frame = pd.DataFrame(rows)
        frame.insert(0, "network", name)
        frame.insert(0, "dataset", dataset.name)
        frames.append(frame)
        results[label] = _summary(dataset, network, rows)
    table = pd.concat(frames, ignore_index=True)
    _write(table, folder)
    figures.curves(table, folder, settings.width, at)
    return {**results, "seconds": dict(bench.seconds)}


def gallery(settings: GallerySettings, folder: Path) -> dict[str, Any]:
    """Fig. 1: test images that the network knows, before and after each attack.

    Writes the figure and `table.csv`: labels, confidences and norms.

    Returns:
        The network's accuracies, clean and under FGSM; and the seconds.

    Raises:
        UsageError: bad settings, or data that cannot be used; before anything is trained.
    """
    attacks = _listed("attacks", settings.attacks, KNOWN)
    (name,) = _listed("network", settings.network, NETWORKS, most=1)
    bench = Bench(settings)
    dataset = bench.load(settings.dataset)
    if settings.images > len(dataset.classes):
        raise invalid("images", settings.images, f"at most {len(dataset.classes)}, one a class")
    epsilon = _epsilon(settings, dataset)

    def after_epoch(network: nn.Sequential) -> list[Row]:
        return measure(network, dataset.test, ["fgsm"], epsilon=epsilon, seed=settings.seed)

    network, rows = bench.trained(dataset, name, after_epoch)
    with frozen(network), torch.no_grad():
        shown = _known(network, dataset, settings.images)
        x, labels = dataset.test[shown].scaled(), dataset.test.labels[shown]
        keys = torch.tensor([keys_for(settings.seed, [i]) for i in shown], device=x.device)
        points = {"none": x}
        points |= attacked(
            attacks,
            network,
            x,
            labels,
            keys,
            epsilon=epsilon,
            steps=settings.steps,
            bounds=(0, 1),
        )
        scores = {condition: network(point).softmax(1) for condition, point in points.items()}
    table = pd.DataFrame(
        {
            "image": i,
            "label": dataset.classes[labels[i]],
            "condition": condition,
            "prediction": dataset.classes[scores[condition][i].argmax()],
            "confidence": scores[condition][i].max().item(),
            **{f"l{p}": (point[i] - x[i]).flatten().norm(float(p)).item() for p in (0, 2, "inf")},
        }
        for i in range(len(shown))
        for condition, point in points.items()
    )
    _write(table, folder)
    figures.gallery({c: point.cpu() for c, point in points.items()}, table, folder)
    results = {f"{dataset.name}-{name}": _summary(dataset, network, rows)}
    return {**results, "seconds": dict(bench.seconds)}


class Bench:
    """Loads data, builds and trains networks by the settings, and adds up the seconds."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = torch.device(settings.device or "cpu")
        self.seconds: dict[str, float] = defaultdict(float)

    def load(self, name: str) -> Dataset:
        s = self.settings
        start = time.perf_counter()
        dataset = data.load(
            name.strip(),
            device=self.device,
            train_size=s.train_size,
            test_size=s.test_size,
            train_split=s.train_split,
            test_split=s.test_split,
            image_column=s.image_column,
            label_column=s.label_column,
            seed=s.seed,
        )
        self.seconds["data"] += time.perf_counter() - start
        return dataset

    def untrained(self, dataset: Dataset, name: str) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            network = build(
                name,
                *(moment.cpu() for moment in dataset.train.moments()),
                size=dataset.shape[1],
                classes=len(dataset.classes),
                width=self.settings.width,
            )
        return network.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def trained(
        self,
        dataset: Dataset,
        name: str,
        after_epoch: Callable[[nn.Sequential], list[Row]],
        state: Path | None = None,
        resume: bool = False,
    ) -> tuple[nn.Sequential, list[Row]]:
        """The trained network and the rows of all epochs."""
        s = self.settings
        label = f"{dataset.name}-{name}"
        network = self.untrained(dataset, name)
        channels, size = dataset.shape
        crop = size // 8 if s.crop is None else s.crop
        flip = channels == 3 if s.flip is None else s.flip
        attacking = 0.0

        def attack(epoch: int, loss: float) -> list[Row]:
            nonlocal attacking
            start = time.perf_counter()
            rows = after_epoch(network)
            attacking += time.perf_counter() - start
            found = ", ".join(f"{r['condition']} {r['accuracy']:.3f}" for r in rows)
            tqdm.write(f"{label}: epoch {epoch} of {s.epochs}, loss {loss:.4f}, {found}")
            return rows

        start = time.perf_counter()
        rows = train(
            network,
            dataset.train,
            s,
            attack,
            flip=flip,
            crop=crop,
            state=state,
            resume=resume,
            label=label,
        )
        self.seconds[f"{label} training"] = time.perf_counter() - start - attacking
        self.seconds[f"{label} attacks"] = attacking
        return network, rows


def _epsilon(settings: Settings, dataset: Dataset) -> float:
    on_features = isinstance(settings, FeatureSettings)
    usual = 0.1 if on_features or dataset.shape[0] == 1 else 8 / 255
    epsilon = usual if settings.epsilon is None else settings.epsilon
    return Attack(epsilon=epsilon).epsilon  # which checks it


def _listed(argument: str, text: str, allowed: Iterable[str], most: int = 99) -> list[str]:
    """The names in `text`, which is separated by commas; at most so many."""
    allowed = list(allowed)
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in allowed:
            raise invalid(argument, name, allowed)
    if len(names) > most:
        raise invalid(argument, text, "one name")
    return names


def _known(network: nn.Module, dataset: Dataset, n: int) -> list[int]:
    """The first `n` test images that the network classifies rightly, of as many classes."""
    first = dataset.test[:250]
    right = network(first.scaled()).argmax(1) == first.labels
    seen: dict[int, int] = {}
    for i in right.nonzero()[:, 0].tolist():
        seen.setdefault(int(first.labels[i]), i)
    if len(seen) < n:
        raise UsageError(f"images={n}: the trained network knows images of {len(seen)} classes")
    return list(seen.values())[:n]


def _write(table: pd.DataFrame, folder: Path) -> None:
    write_text(folder / "table.csv", table.to_csv(index=False, float_format="%.6g"))


def _summary(dataset: Dataset, network: nn.Module, rows: Sequence[Row]) -> dict[str, Any]:
    last = [row for row in rows if row["epoch"] == rows[-1]["epoch"]]
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "train_images": len(dataset.train),
        "test_images": len(dataset.test),
        "epochs": rows[-1]["epoch"],
        "epsilon": last[0]["epsilon"],
        "accuracy": {row["condition"]: round(row["accuracy"], 4) for row in last},
    }
