"""The commands of the theory experiments, for `llm-attack reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_attack.experiment import figure_command
from llm_attack.theory.settings import BINARY, SENTIMENT, BinarySettings, SentimentSettings


def fig4(settings: BinarySettings, folder: Path) -> dict[str, Any]:
    """Binary toy: loss landscapes, accuracies, and the uncertainty relation at every epoch."""
    from llm_attack.theory.binary import reproduce

    return reproduce(settings, folder)


def fig6(settings: SentimentSettings, folder: Path) -> dict[str, Any]:
    """Word sentiment: cosine of embedding and gradient, for words classified rightly or wrongly."""
    from llm_attack.theory.sentiment import reproduce

    return reproduce(settings, folder)


COMMANDS = [figure_command("fig4", BINARY, fig4), figure_command("fig6", SENTIMENT, fig6)]
