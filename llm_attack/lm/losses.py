"""Threat models: what an attack on a language model ascends (docs/attacks.md, "Threat models").

A loss is a row of `LOSSES`: which predictions it reads, whose they are, and the value that it makes
of their summed log-probabilities. Nothing else asks for a loss by its name. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

from llm_attack.base.errors import UsageError
from llm_attack.base.plugins import check_name, is_known, name_of, source_hash

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LossKind:
    """The traits that tell one loss from another.

    Attributes:
        value: (sums, choices) -> one value per example; `sums` (requests,) are log-probabilities
            summed over the tokens that the loss reads, `choices` the `ChoiceScores` if it knows the
            gold, else None.
        whole: it reads all tokens of a request but the first, not only the continuation's.
        gold: the attacker knows which choices are right: one value per question, which has one
            perturbation, instead of one value per request.
        additive: its value is the sum of what it makes of each token's log-probability.
        function: of the user's own, that `value` is made of; see `register_loss`.
        source: hash of its source (`source_hash`); empty for the losses of this package.
    """

    value: Callable[[Tensor, Any], Tensor]
    whole: bool = False
    gold: bool = False
    additive: bool = False
    function: Callable[..., Any] | None = None
    source: str = ""


_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)

LOSSES = {
    "sequence": LossKind(lambda sums, choices: -sums, whole=True, additive=True),
    "continuation": LossKind(lambda sums, choices: -sums, additive=True),
    "choice": LossKind(lambda sums, choices: choices.margin(sums, choices.gold), gold=True),
    "margin": LossKind(lambda sums, choices: choices.gap(sums), gold=True),
}


def register_loss(
    function: Callable[..., Any], name: str | None = None, *, whole: bool = False
) -> str:
    """Makes a loss of the user's own known by a name, as `package.module:function` makes it.

    Args:
        function: `(sums) -> values` of the requests, each attacked alone; or `(sums, choices) ->
            values` of the questions, for an attacker who knows the gold. `sums` (requests,) are
            summed log-probabilities in float64, `choices` the `ChoiceScores`. Values are raised.
        name: of the loss; `package.module:function` unless given.
        whole: whether it reads all tokens of a request but the first, not only the continuation's;
            an attribute `whole` of the function says the same.

    Returns:
        The name.

    Raises:
        ValueError: another loss has that name, or the function has other parameters.
    """
    name = name_of(function) if name is None else name
    check_name("name", name)
    try:
        required = [
            parameter
            for parameter in signature(function).parameters.values()
            if parameter.default is parameter.empty
        ]
    except ValueError:  # of what is compiled to C
        required = []
    if len(required) not in (1, 2) or any(
        parameter.kind not in _POSITIONAL for parameter in required
    ):
        raise UsageError(f"loss={name}: must take the arguments sums, or sums and choices")
    gold = len(required) == 2
    whole = whole or bool(getattr(function, "whole", False))
    value = _checked(name, function, gold)
    known = LOSSES.get(name)
    if known is not None and known.function is not function:
        raise ValueError(f"name={name}: must be a name that no loss has")
    source = source_hash(function) if known is None else known.source
    LOSSES[name] = LossKind(value, whole=whole, gold=gold, function=function, source=source)
    return name


def _checked(
    name: str, function: Callable[..., Any], gold: bool
) -> Callable[[Tensor, Any], Tensor]:
    """The function as a `value`, which refuses what is not one value per example."""

    def value(sums: Tensor, choices: Any) -> Tensor:
        loss: Tensor = function(sums, choices) if gold else function(sums)
        shape = choices.gold.shape[:1] if gold else sums.shape
        if getattr(loss, "shape", None) != shape:
            what = list(getattr(loss, "shape", ())) or type(loss).__name__
            raise UsageError(
                f"loss={name}: must return a value for each {'question' if gold else 'request'},"
                f" shape {list(shape)}, not {what}"
            )
        return loss

    return value


def known_loss(name: Any) -> bool:
    """Whether a loss has this name; one of the user's own is imported.

    Raises:
        UsageError: it has the form of the user's own, and there is none.
    """
    return is_known("loss", name, LOSSES, register_loss)


@dataclass(frozen=True)
class ThreatModel:
    """The loss that the attacker ascends, and what it may touch; see docs/attacks.md.

    Attributes:
        loss: a key of `LOSSES`.
        shared: one perturbation for the tokens that a question's requests share, instead of one
            perturbation per request.
        seed: of the random draws.
        positions: the tokens that may move; see `lm.packing.positions`.
    """

    loss: str = "sequence"
    shared: bool = False
    seed: int = 0
    positions: str = "all"
