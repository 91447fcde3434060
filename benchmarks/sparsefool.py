"""How much faster our SparseFool is than those of torchattacks and of the authors, per image.

    python benchmarks/sparsefool.py --dataset mnist --authors SparseFool -o sparsefool

trains a network and takes a batch of test images that it classifies right. Each program attacks the
batch several times, in turns. The output has the medians, their ratios, and how well and how
sparsely each program fools. Parameters need no gradients, so no program computes any. The authors'
program is a checkout of https://github.com/LTS4/SparseFool, which attacks one image at a time. It
was written for torch 0.4. The benchmark adds a function that torch has lost since, which sets
gradients to zero.

torchattacks 3.5.1 differs from Modas et al. and their program. It clips DeepFool and lengthens it
by its overshoot at every step. It starts DeepFool from the last attacked image, and then multiplies
the whole change by lambda. The normal is the gradient at this point, which is beyond the boundary
and not on it. The linear solver starts from the clean image each time. There are at most 10
searches instead of 20.
"""

import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torchattacks
from torch import Tensor, nn

from llm_attack.attacks import sparsefool
from llm_attack.base.declare import DIALECT
from llm_attack.base.record import hardware, versions, write_json
from llm_attack.vision.data import load_dataset
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
@click.option(
    "--authors",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the authors' program, which is left out unless given.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for run.json.")
def main(dataset, network, epochs, train_size, batch, rounds, authors, output):
    settings = ImageSettings(
        epochs=epochs,
        train_size=train_size,
        batch_size=32,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    images = load_dataset(dataset, settings)
    classifier = untrained(images, network, settings)
    for epoch, loss, _ in train(classifier, images.train, settings):
        print(f"epoch {epoch} of {epochs}, loss {loss:.4f}")
    with frozen(classifier):
        x = images.test[: 2 * batch].scaled()
        labels = images.test.labels[: 2 * batch]
        known = (classifier(x).argmax(1) == labels).nonzero()[:batch, 0]
        if not len(known):
            raise click.UsageError("the network knows none of these images: more --epochs")
        x, labels = x[known].contiguous(), labels[known]
        contiguous = Contiguous(classifier).eval()  # torchattacks restores the mode of its model
        theirs = torchattacks.SparseFool(contiguous)
        ways = {
            "llm_attack": lambda: sparsefool(classifier, x, labels=labels),
            "torchattacks": lambda: theirs(x, labels),
        }
        if authors is not None:
            ways["authors"] = authors_own(authors, contiguous, x)
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
    ratios = {name: medians[name] / medians["llm_attack"] for name in list(ways)[1:]}
    print(f"ratios of the medians: {ratios}")
    if output is not None:
        record = {
            "command": shlex.join(["python", "benchmarks/sparsefool.py", *sys.argv[1:]]),
            "images": len(x),
            "coordinates": x[0].numel(),
            "found": found,
            "seconds": {"per_image": taken, "medians": medians, "ratios": ratios},
            "versions": versions(),
            "hardware": hardware(),
        }
        write_json(output / "run.json", record)


class Contiguous(nn.Module):
    """A classifier whose gradients are contiguous, as the other two programs need them."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x.flatten().reshape(x.shape))


def authors_own(folder: Path, classifier: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The authors' program in `folder`, unchanged, on each image of `x`."""

    def zero_gradients(point: Tensor) -> None:
        if point.grad is not None:
            point.grad.zero_()

    sys.modules["torch.autograd.gradcheck"].zero_gradients = zero_gradients
    sys.path.insert(0, str(folder))
    from sparsefool import sparsefool as attack

    low, high = torch.zeros_like(x[:1]), torch.ones_like(x[:1])

    def run() -> Tensor:
        rows = x.split(1)
        return torch.cat([attack(row, classifier, low, high, device=x.device)[0] for row in rows])

    return run


if __name__ == "__main__":
    main()
