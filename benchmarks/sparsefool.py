"""How much faster SparseFool is than that of torchattacks, per image, in one run, taking turns.

    python benchmarks/sparsefool.py --dataset mnist --network cnn -o results/sparsefool

trains a network, takes a batch of test images that it knows, and lets both attack it several times
in turn; prints the medians, their ratio, and how well and how sparsely each fools. The parameters
need no gradients, so that neither library computes any.

What torchattacks 3.5.1 does otherwise than Modas et al. and their program: DeepFool is clipped and
lengthened by its overshoot at every step and starts from the last attacked image, whose change is
then multiplied by lambda as a whole; the normal is the gradient there, beyond the boundary, and not
on it; the linear solver starts from the clean image each time; at most 10 searches, not 20.
"""

import shlex
import statistics
import sys
import time
from pathlib import Path

import click
import torch
import torchattacks

from llm_attack.attacks import sparsefool
from llm_attack.declare import DIALECT
from llm_attack.record import hardware, versions, write_json
from llm_attack.vision.data import load
from llm_attack.vision.measure import frozen
from llm_attack.vision.settings import ImageSettings
from llm_attack.vision.stages import untrained
from llm_attack.vision.train import train


@click.command(context_settings={"show_default": True, **DIALECT})
@click.option("--dataset", default="digits")
@click.option("--network", default="cnn")
@click.option("--epochs", default=1)
@click.option("--train_size", type=int, help="Training images; all unless given.")
@click.option("--batch", default=64, help="Images attacked at once.")
@click.option("--rounds", default=3, help="Turns of each.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for run.json.")
def main(dataset, network, epochs, train_size, batch, rounds, output):
    settings = ImageSettings(
        epochs=epochs,
        train_size=train_size,
        batch_size=32,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    images = load(dataset, settings)
    classifier = untrained(images, network, settings)
    for epoch, loss in train(classifier, images.train, settings, []):
        print(f"epoch {epoch} of {epochs}, loss {loss:.4f}")
    with frozen(classifier):
        x = images.test[: 2 * batch].scaled()
        labels = images.test.labels[: 2 * batch]
        known = (classifier(x).argmax(1) == labels).nonzero()[:batch, 0]
        x, labels = x[known], labels[known]
        theirs = torchattacks.SparseFool(classifier)
        ways = {
            "llm_attack": lambda: sparsefool(classifier, x, labels=labels),
            "torchattacks": lambda: theirs(x, labels),
        }
        ways["llm_attack"]()  # the first call of a network sets up its convolutions
        taken = {name: [] for name in ways}
        found = {}
        for _ in range(rounds):
            for name, attack in ways.items():
                start = time.perf_counter()
                point = attack()
                taken[name].append((time.perf_counter() - start) / len(x))
                change = (point != x).flatten(1).sum(1)
                fooled = classifier(point).argmax(1) != labels
                found[name] = {
                    "fooled": fooled.double().mean().item(),
                    "median_l0": change[fooled].median().item(),
                }
    medians = {name: statistics.median(values) for name, values in taken.items()}
    for name, median in medians.items():
        print(f"{name}: {1e3 * median:.1f} ms an image, {found[name]}")
    ratio = medians["torchattacks"] / medians["llm_attack"]
    print(f"ratio of the medians: {ratio:.1f}")
    if output is not None:
        record = {
            "command": shlex.join(["python", "benchmarks/sparsefool.py", *sys.argv[1:]]),
            "images": len(x),
            "coordinates": x[0].numel(),
            "found": found,
            "seconds": {"per_image": taken, "medians": medians, "ratio": ratio},
            "versions": versions(),
            "hardware": hardware(),
        }
        write_json(output / "run.json", record)


if __name__ == "__main__":
    main()
