"""The scale of what is perturbed: root mean square of the hookpoint's output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm_attack.lm.hook import capture

# Any fixed text would do; that it is fixed makes epsilon independent of the data evaluated.
CALIBRATION_TEXT = (
    "A small boat left the harbour before sunrise, while the town on the hill was still asleep."
    " Its owner, who had mended the sails herself, wanted to know whether the wind would hold until"
    " noon. In the market the first stalls were opening: bread, fish, apples and second-hand books."
    " Two children asked what makes the sea salty, and an old man explained that rivers carry a"
    " little salt from the rocks, and that the sun takes away the water but not the salt."
)


def embedding_rms(embedding: nn.Module, vocabulary: int, device: torch.device) -> float:
    """RMS of the embedding layer's output over the vocabulary: of its matrix, scaled as it is."""
    ids = torch.arange(vocabulary, device=device)
    with torch.no_grad():
        squares = [embedding(chunk).float().square().mean(-1) for chunk in ids.split(8192)]
    return float(torch.cat(squares).mean().sqrt())


def activation_rms(model: nn.Module, module: nn.Module, input_ids: Tensor) -> float:
    """RMS of `module`'s output on `input_ids`, (1, L).

    The first position is left out: many models park an attention sink there, whose norm is
    hundreds of times that of the others.
    """
    output = capture(module, lambda: model(input_ids=input_ids))
    return float(output[:, 1:].float().square().mean().sqrt())
