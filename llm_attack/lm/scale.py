"""The scale of what is perturbed: of the hookpoint's output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm_attack.lm.hook import capture
from llm_attack.lm.rotary import Rotary
from llm_attack.lm.units import Signal

# Any fixed text would do; that it is fixed makes epsilon independent of the data evaluated.
CALIBRATION_TEXT = (
    "A small boat left the harbour before sunrise, while the town on the hill was still asleep."
    " Its owner, who had mended the sails herself, wanted to know whether the wind would hold until"
    " noon. In the market the first stalls were opening: bread, fish, apples and second-hand books."
    " Two children asked what makes the sea salty, and an old man explained that rivers carry a"
    " little salt from the rocks, and that the sun takes away the water but not the salt."
)


def of_embedding(embedding: nn.Module, vocabulary: int, device: torch.device) -> Signal:
    """Of the embedding layer's output over the vocabulary: of its matrix, scaled as it is."""
    ids = torch.arange(vocabulary, device=device)
    squares = []
    with torch.no_grad():
        for chunk in ids.split(8192):
            output = embedding(chunk)
            squares.append(output.float().square().mean(-1))
    return _signal(torch.cat(squares), output.shape[-1])


def of_activation(model: nn.Module, module: nn.Module, input_ids: Tensor) -> Signal:
    """Of `module`'s output on `input_ids`, (1, L).

    The first position is left out: many models park an attention sink there, whose norm is
    hundreds of times that of the others.
    """
    with Rotary(model).fresh():
        output = capture(module, lambda: model(input_ids=input_ids))
    return _signal(output[:, 1:].float().square().mean(-1), output.shape[-1])


def _signal(squares: Tensor, width: int) -> Signal:
    """From the mean squares of tokens."""
    norm = (squares * width).sqrt().mean()
    return Signal(float(squares.mean().sqrt()), width, float(norm))
