"""Measures the scale of the hookpoint's output, which attacks perturb."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_attack.attacks import widest
from llm_attack.lm.network.hook import edit_output, resolve, try_out, vocabulary_of
from llm_attack.lm.network.pairs import PARTS, embedding_of, is_pair, read
from llm_attack.lm.network.rotary import Rotary
from llm_attack.lm.units import UNITS, OwnUnit, Signal

# Any text would do. It is fixed, so epsilon does not depend on the data that are evaluated.
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
    """The scales at several hookpoints.

    Args:
        model: the model.
        hookpoints: dotted paths; None: the input embedding.
        input_ids: (1, L), the calibration text.
        units: names of units. The user's own units are measured at each hookpoint.

    Raises:
        UsageError: as for `resolve` and `try_out`, or the user's own unit fails.
    """
    places = {name: resolve(model, name) for name in hookpoints}
    embeddings = dict.fromkeys(embedding_of(model, part) for part in PARTS)
    paths = [
        name
        for name, module in places.items()
        if name is not None and not (is_pair(model) and module in embeddings)
    ]
    if paths:
        try_out(model, paths, input_ids)
    own = [unit for name in units if isinstance(unit := UNITS.get(str(name)), OwnUnit)]
    others = [name for name, module in places.items() if own or module not in embeddings]
    signals: dict[str | None, Signal] = {}
    if others:
        measured = of_activations(model, [places[name] for name in others], input_ids, own)
        signals = dict(zip(others, measured, strict=True))
    for embedding in embeddings:
        names = [name for name, module in places.items() if module is embedding]
        if names:
            of_matrix = of_embedding(embedding, vocabulary_of(model), input_ids.device)
        for name in names:
            sizes = signals[name].own if own else of_matrix.own
            signals[name] = of_matrix._replace(own=sizes)
    return signals


def of_embedding(embedding: nn.Module, vocabulary: int, device: torch.device) -> Signal:
    """The scale of the embedding layer's output over the vocabulary, with the layer's factor."""
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
    """The scales of the outputs of `modules` in one forward over `input_ids`, (1, L).

    The first position is left out. Many models have an attention sink at it, with a norm hundreds
    of times as large as the others.
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
        read(model, input_ids)
    return [signals[module] for module in modules]


def _exact(activations: Tensor) -> Tensor:
    """A copy for the user's code, in the widest float, as fine as the amplitudes of attacks."""
    return activations.detach().to(widest(activations.device), copy=True)


def _squares(output: Tensor) -> Tensor:
    """Mean squares of tokens in the widest float, as fine as the amplitudes of attacks."""
    return output.to(widest(output.device)).square().mean(-1)


def _signal(squares: Tensor, width: int) -> Signal:
    """Makes a signal from the mean squares of tokens."""
    norm = (squares * width).sqrt().mean()
    return Signal(float(squares.mean().sqrt()), width, float(norm))
