"""Trains models of the little world in several sizes, with checkpoints, for docs/scaling.md.

    python benchmarks/sizes.py -o out/sizes

All have four blocks, and the width changes. Text, order, rates and number of steps are those of the
bundled model. A size that is finished is left alone, so a stopped command can go on.
"""

from __future__ import annotations

from pathlib import Path

import click

from llm_attack.base.folder import check_writable, resolved
from llm_attack.demo.train import main as train_demo

WIDTHS = 16, 24, 40, 72, 128


@click.command()
@click.option("-o", "--output", required=True, help="Folder that gets a folder for each width.")
@click.option("--steps", default=2000, show_default=True, help="Steps of each training.")
@click.option("--checkpoints", default=20, show_default=True, help="Checkpoints of each training.")
@click.option("--width", "widths", type=int, multiple=True, default=WIDTHS, show_default=True)
def main(output: str, steps: int, checkpoints: int, widths: tuple[int, ...]) -> None:
    """Train one model of each width."""
    folder: Path = resolved(output)
    check_writable(folder)
    for width in widths:
        own = folder / f"width{width}"
        if not (own / "model.safetensors").exists():  # the last file of a training
            given = {"hidden": width, "steps": steps, "checkpoints": checkpoints, "output": own}
            train_demo(
                [word for name, value in given.items() for word in (f"--{name}", f"{value}")]
            )


if __name__ == "__main__":
    main()
