"""The commands of the image experiments, for `llm-attack reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_attack.experiment import figure_command
from llm_attack.vision.settings import (
    CURVES,
    FEATURES,
    GALLERY,
    CurveSettings,
    FeatureSettings,
    GallerySettings,
)


def fig1(settings: GallerySettings, folder: Path) -> dict[str, Any]:
    """Gallery: images, perturbations, attacked images, labels and confidence before and after."""
    from llm_attack.vision.experiments import gallery

    return gallery(settings, folder)


def fig2(settings: CurveSettings, folder: Path) -> dict[str, Any]:
    """Pixels attacked: clean and robust accuracies and their envelope after every epoch.

    --dataset and --network may be several, separated by commas.
    """
    from llm_attack.vision.experiments import curves

    return curves(settings, folder)


def fig5(settings: FeatureSettings, folder: Path) -> dict[str, Any]:
    """Features attacked: as fig2, with the output of a block of the network perturbed.

    --dataset and --network may be several, separated by commas.
    """
    from llm_attack.vision.experiments import curves

    return curves(settings, folder)


COMMANDS = [
    figure_command("fig1", GALLERY, fig1),
    figure_command("fig2", CURVES, fig2),
    figure_command("fig5", FEATURES, fig5),
]
