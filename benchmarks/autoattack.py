"""Compares robust accuracy under our APGD, APGD-T and block search with that under AutoAttack.

    python benchmarks/autoattack.py --load networks/mnist-cnn.safetensors -o autoattack

The first test images are attacked. AutoAttack is `pyautoattack` as published ("standard": APGD-CE,
APGD-T, FAB-T and Square with 5,000 queries; Croce and Hein 2020, arXiv 2003.01690). Ours are
`apgd`, `apgdt` and `blocks`, with the same number of steps. On both sides, an attack sees only
images that earlier attacks have left right.
"""

import logging
import shlex
import sys
import time
from pathlib import Path

import click
import torch
from pyautoattack import AutoAttack
from scipy.stats import binomtest
from torch import nn

from llm_attack.attacks import Attack, keys_for
from llm_attack.base.declare import DIALECT
from llm_attack.base.record import hardware, versions, write_json
from llm_attack.vision.checkpoints import read_metadata, settled
from llm_attack.vision.data import load_dataset
from llm_attack.vision.measure import Examples, attacked, frozen
from llm_attack.vision.settings import Amplitude, ImageSettings
from llm_attack.vision.stages import amplitude, untrained

OURS = ("apgd", "apgdt", "blocks")


class Plain(nn.Module):
    """The network for images in torch's usual layout, which the library expects of gradients."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x.flatten(1).reshape(x.shape))


def ours(network, x, labels, *, epsilon, steps, restarts, queries):
    """Which images are right before and after, and how many after each attack."""
    keys = torch.tensor([keys_for(0, [i]) for i in range(len(x))])
    stays = network(x).argmax(1) == labels
    left = {"clean": stays.sum().item()}
    like = Attack(epsilon=epsilon, steps=steps, restarts=restarts, queries=queries)
    for name in OURS:
        rows = stays.nonzero()[:, 0]
        if len(rows):
            now = Examples(x[rows], labels[rows], keys[rows])
            ((_, point),) = attacked([name], network, now, like, (0, 1))
            stays[rows] = network(point).argmax(1) == labels[rows]
        left[name] = stays.sum().item()
    return stays, left


def autoattack(network, x, labels, *, epsilon):
    """Which images are right before and after."""
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    library = AutoAttack(Plain(network).eval(), eps=epsilon, norm="Linf", seed=0)
    point, _ = library.run_standard_evaluation(x.contiguous(), labels)
    return network(point).argmax(1) == labels


@click.command(context_settings={"show_default": True, **DIALECT})
@click.option("--load", "path", required=True, help="Network that --save kept.")
@click.option("--images", default=200, help="Test images, from the first.")
@click.option("--epsilon", type=Amplitude(), help="The paper's unless given.")
@click.option("--steps", default=100, help="Steps of apgd and apgdt.")
@click.option("--restarts", default=1, help="Starts of apgd and apgdt.")
@click.option("--queries", default=1000, help="Queries of blocks.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for run.json.")
def main(path, images, epsilon, steps, restarts, queries, output):
    about = read_metadata(path)
    settings = settled(ImageSettings(load=path, epsilon=epsilon, dataset=about["dataset"]))
    data = load_dataset(settings.dataset, settings)
    network = untrained(data, settings.network, settings)
    x, labels = data.test[:images].scaled(), data.test.labels[:images]
    epsilon = amplitude(settings, data)
    found, seconds = {}, {}
    with frozen(network):
        start = time.perf_counter()
        how = {"steps": steps, "restarts": restarts, "queries": queries}
        found["llm_attack"], left = ours(network, x, labels, epsilon=epsilon, **how)
        seconds["llm_attack"] = time.perf_counter() - start
        start = time.perf_counter()
        found["autoattack"] = autoattack(network, x, labels, epsilon=epsilon)
        seconds["autoattack"] = time.perf_counter() - start
    results = {}
    for name, stays in found.items():
        right = stays.sum().item()
        low, high = binomtest(right, len(x)).proportion_ci(0.95, "wilson")
        results[name] = {"accuracy": right / len(x), "low": float(low), "high": float(high)}
        print(f"{name}: {right} of {len(x)} right, {seconds[name]:.1f} s")
    both = (found["llm_attack"] & found["autoattack"]).sum().item()
    print(f"after each of ours: {left}; right under both: {both}")
    if output is not None:
        record = {
            "command": shlex.join(["python", "benchmarks/autoattack.py", *sys.argv[1:]]),
            "network": {key: about[key] for key in ("network", "dataset", "epochs", "parameters")},
            "width": about["settings"]["width"],
            "images": len(x),
            "epsilon": epsilon,
            "results": results,
            "left": left,
            "right_under_both": both,
            "seconds": seconds,
            "versions": versions(),
            "hardware": hardware(),
        }
        write_json(output / "run.json", record)


if __name__ == "__main__":
    main()
