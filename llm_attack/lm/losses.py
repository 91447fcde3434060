"""Threat models: the losses that attacks on language models raise (docs/attacks.md).

A loss is an entry of `LOSSES`. It says which predictions the loss reads, and how it computes its
value from their summed log-probabilities. No other code knows a loss by its name. Needs no torch.
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
    """The traits of a loss.

    Attributes:
        value: (sums, choices) -> one value per example. `sums` (requests,) are log-probabilities
            summed over the tokens that the loss reads. `choices` is the `ChoiceScores` if the loss
            knows the gold, else None.
        whole: the loss reads all tokens of a request except the first, not only the continuation.
        gold: the attacker knows which choices are right. Then a question has one perturbation and
            one value. Otherwise each request has its own.
        additive: the value is a sum over tokens of a function of their log-probability.
        function: a user's own function that `value` calls; see `register_loss`.
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
    """Registers a user's own loss under a name.

    The name `package.module:function` needs no registration.

    Args:
        function: `(sums) -> values` of the requests, each attacked by itself; or `(sums, choices)
            -> values` of the questions, for an attacker who knows the gold. `sums` (requests,) are
            summed log-probabilities in float64, and `choices` is the `ChoiceScores`. The attack
            raises the values.
        name: name of the loss; `package.module:function` by default.
        whole: whether it reads all tokens of a request except the first, not only the continuation.
            An attribute `whole` of the function has the same effect.

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
    except ValueError:  # functions that are compiled to C
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
    """Makes a `value` of the function. It refuses results that are not one value per example."""

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
    """Whether a loss has this name. A user's own loss is imported.

    Raises:
        UsageError: the name has the form `package.module:function`, and it cannot be imported.
    """
    return is_known("loss", name, LOSSES, register_loss)


@dataclass(frozen=True)
class ThreatModel:
    """The loss that the attacker raises, and the tokens that may move; see docs/attacks.md.

    Attributes:
        loss: a key of `LOSSES`.
        shared: the tokens that a question's requests share have one perturbation. Otherwise every
            request has its own.
        seed: seed of the random draws.
        positions: the tokens that may move; see `lm.packing.positions`.
    """

    loss: str = "sequence"
    shared: bool = False
    seed: int = 0
    positions: str = "all"
