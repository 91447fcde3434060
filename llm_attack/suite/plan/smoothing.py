"""The settings of certificates by randomised smoothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_attack.base.declare import setting
from llm_attack.base.errors import UsageError, invalid
from llm_attack.lm.smoothing import Smoothing
from llm_attack.lm.units import NEFTUNE
from llm_attack.suite.plan import values


@dataclass(frozen=True, kw_only=True)
class SmoothingSettings:
    """The settings of certificates. Without `sigmas`, a run certifies nothing.

    Raises:
        UsageError: a value is not allowed.
    """

    sigmas: Sequence[Any] = setting(
        (),
        "Certify each question by randomised smoothing: standard deviations of Gaussian noise in"
        " each coordinate, separated by commas, such as 0.4rms. The answer is what the model"
        " prefers most often under the noise. The certificate is a radius in L2 within which that"
        " answer cannot change. Needs a loss that knows the label, with which a question has one"
        " perturbation",
        also_type=tuple,
        allowed=values.NUMBERS,
        parse=values.sigmas,
        group="certificate",
    )
    draws: int = setting(
        1000,
        "Number of draws of noise that certify a question; each costs a forward pass",
        minimum=1,
        group="certificate",
    )
    selection_draws: int = setting(
        100,
        "Number of other draws before these, which select the choice to certify",
        minimum=1,
        group="certificate",
    )
    failure_probability: float = setting(
        0.001,
        "Largest probability with which the certificate of a question may be wrong",
        minimum=0.0,
        exclusive_minimum=True,
        allowed="a number above 0 and below 0.5",
        group="certificate",
    )


OF_SMOOTHING = ("sigmas", "draws", "selection_draws", "failure_probability")


def smoothing_of(settings: Any) -> Smoothing | None:
    """The noise of a plan, in the units that its user gave; None if nothing is certified."""
    if not settings.sigmas:
        return None
    sigmas = tuple(sigma.in_unit(settings.epsilon_unit) for sigma in settings.sigmas)
    return Smoothing(sigmas, settings.selection_draws, settings.draws)


def check_smoothing(settings: Any) -> None:
    """Checks the settings of certificates in a plan.

    Raises:
        UsageError: a value is not allowed, or not together with other settings.
    """
    smoothing = smoothing_of(settings)
    if smoothing is None:
        return _check_unused(settings)
    sigmas = smoothing.sigmas
    given = f"sigmas={','.join(str(sigma) for sigma in settings.sigmas)}"
    for sigma, typed in zip(sigmas, settings.sigmas, strict=True):
        if not 0 < sigma.number < math.inf:
            raise invalid("sigmas", typed, "finite numbers above 0, such as 0.4rms")
        if sigma.unit == NEFTUNE:
            raise UsageError(
                f"{given}: must be in another unit than {NEFTUNE}, because certificates compare"
                " radii between questions"
            )
        if sigmas.count(sigma) > 1:
            raise UsageError(f"{given}: must name {typed} only once")
    _check_together(settings, given)
    _check_draws(settings)


def _check_unused(settings: Any) -> None:
    for name in OF_SMOOTHING[1:]:
        value = getattr(settings, name)
        if value != getattr(SmoothingSettings, name):
            raise UsageError(f"{name}={value}: must be given together with sigmas")


def _check_together(settings: Any, given: str) -> None:
    if settings.standard is not None:
        raise UsageError(
            f"{given}: must be left out with attacks={settings.standard.version}, which fixes what"
            " is measured"
        )
    if settings.hookpoints:
        raise UsageError(
            f"{given}: must not be given with hookpoints; certify one hookpoint with hookpoint"
        )
    if not settings.needs_gold:
        raise UsageError(
            f"{given}: needs loss=choice or loss=margin, with which a question has one"
            f" perturbation, not loss={settings.loss}"
        )


def _check_draws(settings: Any) -> None:
    """Refuses numbers of draws with which even equal votes certify nothing."""
    level, n = settings.failure_probability, settings.draws
    if not 0 < level < 0.5:
        raise invalid("failure_probability", level, "a number above 0 and below 0.5")
    least = math.floor(math.log(level) / math.log(0.5)) + 1  # level ** (1 / n) must exceed 0.5
    if n < least:
        raise invalid(
            "draws", n, f"at least {least} with failure_probability={level:g}, or none is certified"
        )
