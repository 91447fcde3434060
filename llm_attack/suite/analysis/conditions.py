"""Conditions as values: a condition holds everything that its numbers depend on.

Names are for people. For example, `bim@0.003` does not show the number of steps. Code that pairs,
merges or ranks conditions of different runs compares `Condition`s. Only this module reads names,
because older runs recorded nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pandas as pd

from llm_attack.attacks import Attack
from llm_attack.attacks.formats import Format
from llm_attack.attacks.settings import FIXED, condition_name, kind_of
from llm_attack.base.declare import declared, names
from llm_attack.base.errors import UsageError
from llm_attack.lm.losses import LOSSES
from llm_attack.lm.settings import EMBED, AttackSettings, EngineSettings, places
from llm_attack.lm.units import ABSOLUTE, NEFTUNE, UNITS, Amplitude, Epsilon
from llm_attack.suite.plan import WORST, Plan
from llm_attack.suite.plan.fixed import FixedSettings
from llm_attack.suite.plan.smoothing import SmoothingSettings

CONDITIONS = "conditions"  # the key in run.json and in the attributes of samples.parquet
STANDARD = "standard"  # the key of the standard's version in the settings of a condition
PERTURBATION = "perturbation_source"  # the key of the hash of a perturbation found before
FITTED_TO = "fitted_to"  # the key of the hash of the questions to which a table was fitted
_SIZE = "amplitude"  # the key in the record of a condition

# Settings of a plan that are no part of a condition. They choose the model, the questions (which
# are paired by the hash of their prompts) and the conditions, or say how a run is carried out.
OF_THE_RUN = (
    *("model", "model_args", "tasks", "limit", "include_path"),
    *("attacks", "epsilons", "cells", "swaps", "critical", "epsilon_max", "hookpoints"),
    *("batch_size", "device", "equivalence", "shard", "ray", "ray_workers"),
    *("save_perturbations", "path_points", "trace"),
    *names(SmoothingSettings),
    *names(FixedSettings),
    *names(EngineSettings),
)
_DEFAULTS: dict[str, Any] = {
    entry.name: entry.default
    for kind in (Plan, AttackSettings)
    for entry, _ in declared(kind)
    if entry.name not in OF_THE_RUN
}
# The settings of prompts. The answers without an attack depend only on these.
PROMPT = tuple(
    name
    for name in names(Plan)
    if name in _DEFAULTS.keys() - {*names(AttackSettings)} or name == "score"
)

_LABEL = re.compile(
    rf"(?P<epsilon>[\d.]+(?:e[+-]?\d+)?)(?P<epsilon_unit>{'|'.join(UNITS)})?"
    r"(?:-(?P<norm>l2_token|l2))?(?:@(?P<hookpoint>.+?))?(?:-steps(?P<steps>\d+))?"
)


@dataclass(frozen=True)
class Condition:
    """An attack and the settings that its numbers depend on. Equal conditions may be paired.

    Attributes:
        name: name for people, such as `bim@0.003`. It takes no part in comparisons.
        attack: a key of `ATTACKS` or `BATTERIES`, or `worst`.
        values: (setting, value) of each setting that the attack uses, sorted by name.
        amplitude: the amplitude of the perturbation; None for `none`. It takes no part in
            comparisons, because `values` contain it.
    """

    name: str = field(compare=False)
    attack: str
    values: tuple[tuple[str, Any], ...]
    amplitude: Amplitude | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls, name: str, values: Mapping[str, Any], amplitude: Amplitude | None = None
    ) -> Condition:
        """The condition with these settings, without those that its attack does not use.

        Args:
            name: name of the condition.
            values: settings by name, including `attack`. Missing ones have their defaults.
            amplitude: the amplitude of the perturbation.
        """
        attack = str(values["attack"])
        known = values if kind_of(attack) is None else {**_DEFAULTS, **values}
        used = _used(attack, {k: v for k, v in known.items() if k != "attack"})
        return cls(name, attack, tuple(sorted(used.items())), amplitude)

    def get(self, setting: str) -> Any:
        """The value of a setting; None if the attack does not use it."""
        return dict(self.values).get(setting)

    @property
    def ball(self) -> tuple[Any, ...]:
        """The properties that two conditions of one run share if their amplitudes are comparable.

        Samples have amplitudes in the units of the point, so any two units can be compared. NEFTune
        is the exception: it divides the amplitude by the root of each question's number of tokens.
        The rounding cells of a format are another.
        """
        given = self.get("epsilon_unit")
        unit = given if Format.known(given) else given == NEFTUNE
        return (*(self.get(name) for name in ("norm", "hookpoint", "positions", "context")), unit)

    def elsewhere(self) -> Condition:
        """The same condition at the input embedding. A sweep over hookpoints repeats it at each."""
        if self.amplitude is None:
            return self
        amplitude = replace(self.amplitude, hookpoint=None)
        values = tuple(pair for pair in self.values if pair[0] != "hookpoint")
        _, steps, count = self.name.rpartition("-steps")
        label = f"{amplitude}{steps}{count}" if steps else str(amplitude)
        return Condition(condition_name(self.attack, label), self.attack, values, amplitude)

    def settings(self) -> dict[str, Any]:
        """All settings that its numbers depend on, by name."""
        return {"attack": self.attack, **dict(self.values)}

    def record(self) -> dict[str, Any]:
        """The condition in the form of `run.json` and the samples."""
        return self.settings() | ({} if self.amplitude is None else {_SIZE: asdict(self.amplitude)})

    def differences(self, other: Condition) -> list[tuple[str, Any, Any]]:
        """(setting, value here, value there) of each setting in which two conditions differ.

        A setting that only one of the two uses is left out, because it follows from another
        difference. If there is no other, such settings are returned.
        """
        here, there = self.settings(), other.settings()
        differing = [
            (name, here.get(name), there.get(name))
            for name in {**here, **there}
            if name not in here or name not in there or here[name] != there[name]
        ]
        return [entry for entry in differing if entry[0] in here and entry[0] in there] or differing


Conditions = Mapping[str, Condition]


def steps_told(known: Conditions) -> dict[str, int]:
    """`steps` by name, for conditions that differ from another one only in their steps."""
    counts: dict[Any, set[Any]] = {}
    for condition in known.values():
        key = condition.attack, condition.amplitude
        counts.setdefault(key, set()).add(condition.get("steps"))
    return {
        name: condition.get("steps")
        for name, condition in known.items()
        if condition.attack != WORST
        and len(counts[condition.attack, condition.amplitude] - {None}) > 1
    }


def _used(attack: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved settings that the numbers of an attack depend on."""
    kind = kind_of(attack)
    if kind is None:  # of another version, or of the user: as it was recorded
        return dict(values)
    used = {name: value for name, value in values.items() if kind.uses(name)}
    if attack == "none" or not used["epsilon"]:
        still = PROMPT if attack == "none" else (*PROMPT, "epsilon")
        return {name: value for name, value in used.items() if name in still}
    loss = LOSSES.get(str(used["loss"]))
    gold = kind.targeted or kind.minimal or (loss is not None and loss.gold)
    if used["context"] is None:
        used["context"] = "shared" if gold else "own"
    if used["hookpoint"] is None:
        used["hookpoint"] = EMBED
    try:
        steps = {name: used[name] for name in ("step_size", "restarts") if name in used}
        resolved = Attack(kind.inside or attack, used["epsilon"], **steps)
    except UsageError:  # a damaged record
        return used
    if kind.iterative and (kind.adaptive or not kind.minimal):  # `fmn` has none by default
        used["step_size"] = resolved.step
    if used.get("first_epsilon", 0) is None:
        used["first_epsilon"] = resolved.epsilon / 16
    unused = {
        # targeted attacks and `fmn` follow the scores of choices, whatever the loss is
        "loss": not kind.search and (not kind.gradient or kind.targeted or attack == "fmn"),
        "seed": not resolved.draws,
        "gradient_dtype": not kind.gradient,
        "cells": True,  # the unit of epsilon
        "swaps": True,  # epsilon itself
    }
    unused["loss_source"] = unused["loss"]
    return {name: value for name, value in used.items() if not unused.get(name)}


def of_plan(
    plan: Plan,
    conditions: Iterable[AttackSettings],
    attacks: Iterable[Attack],
    fitted_to: str = "",
) -> dict[str, Condition]:
    """The conditions of a run, by name.

    Args:
        plan: the plan of the run.
        conditions: the settings of each condition.
        attacks: the resolved attack of each condition, which has the name.
        fitted_to: hash of the questions to which tables of embeddings were fitted; empty: unknown.
    """
    prompt, conditions = {name: getattr(plan, name) for name in PROMPT}, [*conditions]
    if plan.gradient_dtype is not None:
        prompt["gradient_dtype"] = plan.gradient_dtype
    if plan.standard is not None:
        prompt[STANDARD] = plan.standard.version
    by_condition = {}
    for settings, attack, place in zip(conditions, attacks, places(conditions), strict=True):
        values = {**prompt, **settings.arguments(), **settings.sources}
        if plan.fixed is not None and settings.attack in FIXED:
            values[PERTURBATION] = plan.fixed.source
        if attack.kind.tied and fitted_to:
            values[FITTED_TO] = fitted_to
        amplitude = replace(settings.amplitude, hookpoint=place) if attack.name != "none" else None
        by_condition[attack.condition] = Condition.of(attack.condition, values, amplitude)
    return by_condition


def of_run(run: Mapping[str, Any], frame: pd.DataFrame) -> dict[str, Condition]:
    """The conditions in a frame, by name.

    Args:
        run: the content of `run.json`. Older runs have no `conditions` in it. Then `settings`,
            `attacks` and the names replace them.
        frame: a frame with the columns `condition` and `attack`.
    """
    stored, attacks = (_mapping(run.get(part)) for part in (CONDITIONS, "attacks"))
    settings = {k: v for k, v in _mapping(run.get("settings")).items() if k in _DEFAULTS}
    conditions = {}
    for name, (named, amplitude) in _from_names(frame).items():
        values = dict(_mapping(stored.get(name)))
        amplitude = _amplitude(values.pop(_SIZE, None)) or amplitude
        if "attack" not in values:
            described = _mapping(attacks.get(name))
            own = ("epsilon", "epsilon_unit", "norm", "context", "hookpoint")
            values = settings | named | {k: described[k] for k in own if k in described}
        conditions[name] = Condition.of(name, values, amplitude)
    return conditions


def by_name(frame: pd.DataFrame) -> dict[str, Condition]:
    """The conditions in a frame as far as their names show them, if there is no record."""
    return {name: Condition.of(name, *named) for name, named in _from_names(frame).items()}


def _amplitude(stored: Any) -> Amplitude | None:
    """The amplitude in the record of a condition; None if it is missing or damaged."""
    try:
        number, unit = float(stored["epsilon"]["number"]), stored["epsilon"]["unit"]
        return Amplitude(Epsilon(number, unit), stored["norm"], stored["hookpoint"])
    except (LookupError, TypeError, ValueError):
        return None


def _from_names(frame: pd.DataFrame) -> dict[str, tuple[dict[str, Any], Amplitude | None]]:
    """Settings and amplitude of each condition, as far as its name and the frame show them."""
    columns = [name for name in ("condition", "attack", "epsilon", "hookpoint") if name in frame]
    conditions: dict[str, tuple[dict[str, Any], Amplitude | None]] = {}
    for row in frame[columns].drop_duplicates("condition").to_dict("records"):
        name, attack = str(row["condition"]), str(row["attack"])
        values = {"attack": attack, "epsilon": row.get("epsilon", 0.0), "epsilon_unit": ABSOLUTE}
        place = row.get("hookpoint", EMBED)
        values["hookpoint"] = None if place == EMBED else place
        parts = _LABEL.fullmatch(name.removeprefix(condition_name(attack, "")))
        named = {k: v for k, v in parts.groupdict().items() if v} if parts else {}
        values |= named | {"epsilon": float(named.get("epsilon", values["epsilon"]))}
        values |= {"steps": int(named["steps"])} if "steps" in named else {}
        epsilon = Epsilon(values["epsilon"], values["epsilon_unit"])
        amplitude = Amplitude(epsilon, named.get("norm", "linf"), named.get("hookpoint"))
        conditions[name] = values, None if attack == "none" else amplitude
    return conditions


def aligned(a: Conditions, b: Conditions) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Names under which the conditions of two runs may be paired.

    Equal conditions get the name of the first run. Different conditions with the same name get a
    name that shows the difference, such as `bim@0.003 (steps=2 vs steps=20)`.

    Returns:
        New names by old names for run a, the same for run b, and a sentence for each name that
            stands for two conditions.
    """
    of_a, of_b = {name: name for name in a}, {name: name for name in b}
    sentences = []
    for name, there in b.items():
        same = next((known for known, here in a.items() if here == there), None)
        if same is not None:
            of_b[name] = same
        elif name in a:
            differing = a[name].differences(there)
            pairs = "; ".join(f"{k}={x} vs {k}={y}" for k, x, y in differing)
            of_a[name] = of_b[name] = f"{name} ({pairs})"
            words = ", ".join(f"{k}={x} in a and {k}={y} in b" for k, x, y in differing)
            sentences.append(f"{name} is not the same in both runs: {words}")
    return of_a, of_b, sentences


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
