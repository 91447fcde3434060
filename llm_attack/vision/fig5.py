"""Fig. 5: as Fig. 2, with the features between two blocks of a network attacked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_attack.declare import setting
from llm_attack.reproduce import figure_command
from llm_attack.vision import fig2
from llm_attack.vision.settings import QUICK


@dataclass(frozen=True)
class Settings(fig2.Settings):
    """Data sets and networks may be several here, as in Fig. 2."""

    at: str = setting(
        "layer3",
        "Block whose output is attacked: normalise in all; conv1, conv2, fc1 in cnn; stem, layer1 "
        "to layer4, pool in resnet18; stem, inception3a, inception3b, pool3, inception4a to "
        "inception4e, pool4, inception5a, inception5b, pool in googlenet",
    )
    epsilon_unit: str = setting(
        "absolute",
        "Unit of epsilon: that of the features, or their root mean square",
        choices=("absolute", "rms"),
    )


PRESETS = {
    "quick": Settings(**QUICK, network="resnet18", subset=100),
    "paper": Settings(dataset="mnist,cifar10", network="resnet18", subset=1000),
}


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """Features attacked: as fig2, with the output of a block of the network perturbed.

    --dataset and --network may be several, separated by commas.
    """
    return fig2.curves(settings, folder, at=settings.at, epsilon_unit=settings.epsilon_unit)


COMMAND = figure_command("fig5", PRESETS, run)
