"""The scale of what is perturbed: of the hookpoint's output."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_attack.attacks import widest
from llm_attack.lm.network.hook import edit_output, resolve, try_out, vocabulary_of
from llm_attack.lm.network.rotary import Rotary
from llm_attack.lm.units import UNITS, OwnUnit, Signal

# Any fixed text would do; that it is fixed makes epsilon independent of the data evaluated.
CALIBRATION_TEXT = (
    "A small boat left the harbour before sunrise, while the town on the hill was still asleep."
    " Its owner, who had mended the sails herself, wanted to know whether the wind would hold until"
    " noon. In the market the first stalls were opening: bread, fish, apples and second-hand books."
    " Two children asked what makes the sea salty, and an old man explained that rivers carry a"
    " little salt from the rocks, and that the sun takes away the water but not the salt."
)


def signals_at(
    model: PreTrainedModel,
    hookpoints: Sequence[str | None],
    input_ids: Tensor,
    units: Collection[str | None] = (),
) -> dict[str | None, Signal]:
    """Of what is perturbed at each hookpoint; None: the input embedding.

    Args:
        model: whose hookpoints they are.
        hookpoints: dotted paths.
        input_ids: (1, L), the calibration text.
        units: names of units; those of the user's own are measured at each hookpoint.

    Raises:
        UsageError: as of `resolve` and `try_out`, or of a unit of the user's own.
    """
    paths = [name for name in hookpoints if name is not None]
    if paths:
        try_out(model, paths, input_ids)
    places = {name: resolve(model, name) for name in hookpoints}
    embedding: Any = model.get_input_embeddings()
    own = [unit for name in units if isinstance(unit := UNITS.get(str(name)), OwnUnit)]
    others = [name for name, module in places.items() if own or module is not embedding]
    signals: dict[str | None, Signal] = {}
    if others:
        measured = of_activations(model, [places[name] for name in others], input_ids, own)
        signals = dict(zip(others, measured, strict=True))
    if embedding in places.values():
        of_matrix = of_embedding(embedding, vocabulary_of(model), input_ids.device)
        for name in (name for name, module in places.items() if module is embedding):
            sizes = signals[name].own if own else of_matrix.own
            signals[name] = of_matrix._replace(own=sizes)
    return signals


def of_embedding(embedding: nn.Module, vocabulary: int, device: torch.device) -> Signal:
    """Of the embedding layer's output over the vocabulary: of its matrix, scaled as it is."""
    ids = torch.arange(vocabulary, device=device)
    squares = []
    with torch.no_grad():
        for chunk in ids.split(8192):
            output = embedding(chunk)
            squares.append(_squares(output))
    return _signal(torch.cat(squares), output.shape[-1])


def of_activations(
    model: nn.Module,
    modules: Sequence[nn.Module],
    input_ids: Tensor,
    own: Sequence[OwnUnit] = (),
) -> list[Signal]:
    """Of the outputs of `modules` in one forward over `input_ids`, (1, L).

    The first position is left out: many models park an attention sink there, whose norm is
    hundreds of times that of the others.
    """
    signals: dict[nn.Module, Signal] = {}

    def measure(module: nn.Module, output: Tensor) -> Tensor:
        tokens = output[:, 1:]
        sizes = {unit.name: unit.measured(_exact(tokens[0])) for unit in own}
        signals[module] = _signal(_squares(tokens), output.shape[-1])._replace(own=sizes)
        return output

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(Rotary(model).fresh())
        for module in modules:
            stack.enter_context(edit_output(module, partial(measure, module)))
        model(input_ids=input_ids)
    return [signals[module] for module in modules]


def _exact(activations: Tensor) -> Tensor:
    """A copy, for code that is not ours, in which amplitudes are no coarser than the attacks'."""
    return activations.detach().to(widest(activations.device), copy=True)


def _squares(output: Tensor) -> Tensor:
    """Mean squares of tokens. Amplitudes come of them, which are no coarser than the attacks'."""
    return output.to(widest(output.device)).square().mean(-1)


def _signal(squares: Tensor, width: int) -> Signal:
    """From the mean squares of tokens."""
    norm = (squares * width).sqrt().mean()
    return Signal(float(squares.mean().sqrt()), width, float(norm))
