"""What a condition is: one value that holds all that its numbers depend on.

Names are for people: `bim@0.003` does not say how many steps there were. Whatever pairs, merges or
ranks conditions of different runs compares `Condition`s. This module alone reads names, for the
runs of earlier versions that recorded nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pandas as pd

from llm_attack.attacks import Attack
from llm_attack.attacks.settings import condition_name, kind_of
from llm_attack.base.declare import declared, names
from llm_attack.base.errors import UsageError
from llm_attack.lm.losses import LOSSES
from llm_attack.lm.settings import EMBED, AttackSettings, EngineSettings, places
from llm_attack.lm.units import ABSOLUTE, NEFTUNE, UNITS, Amplitude, Epsilon
from llm_attack.suite.plan import WORST, Plan

CONDITIONS = "conditions"  # where run.json and samples.parquet have them
STANDARD = "standard"  # the version in the settings of a condition that a standard decides
_SIZE = "amplitude"  # where the record of a condition has it

# Settings of a plan that are no part of a condition: they choose the model, the questions (which
# are paired by the hash of their prompts) and the conditions, or say how a run is carried out.
OF_THE_RUN = (
    *("model", "model_args", "tasks", "limit", "include_path"),
    *("attacks", "epsilons", "critical", "epsilon_max", "hookpoints"),
    *("batch_size", "device", "equivalence", "shard", "ray", "ray_workers"),
    *("save_perturbations", "path_points", "trace"),
    *names(EngineSettings),
)
_DEFAULTS: dict[str, Any] = {
    entry.name: entry.default
    for kind in (Plan, AttackSettings)
    for entry, _ in declared(kind)
    if entry.name not in OF_THE_RUN
}
# The settings of prompts. The answers without an attack depend on these alone.
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
    """An attack and the settings that its numbers depend on; two that are equal may be paired.

    Attributes:
        name: for people, such as `bim@0.003`; not compared.
        attack: a key of `ATTACKS` or `BATTERIES`, or `worst`.
        values: (setting, value) of each setting that the attack uses, by name.
        amplitude: of what is perturbed; None of `none`. Not compared: `values` have it.
    """

    name: str = field(compare=False)
    attack: str
    values: tuple[tuple[str, Any], ...]
    amplitude: Amplitude | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls, name: str, values: Mapping[str, Any], amplitude: Amplitude | None = None
    ) -> Condition:
        """The condition with these settings; those that its attack does not use are left out.

        Args:
            name: of the condition.
            values: settings by name, `attack` among them; one that is not there has its default.
            amplitude: of what is perturbed.
        """
        attack = str(values["attack"])
        known = values if kind_of(attack) is None else {**_DEFAULTS, **values}
        used = _used(attack, {k: v for k, v in known.items() if k != "attack"})
        return cls(name, attack, tuple(sorted(used.items())), amplitude)

    def get(self, setting: str) -> Any:
        """The value of a setting; None where the attack does not use it."""
        return dict(self.values).get(setting)

    @property
    def ball(self) -> tuple[Any, ...]:
        """What amplitudes of one run have in common if they can be compared with each other.

        Amplitudes in any unit but that of NEFTune can, as the samples have them in the units of the
        point; one of NEFTune is divided by the root of each question's tokens.
        """
        unit = self.get("epsilon_unit") == NEFTUNE
        return (*(self.get(name) for name in ("norm", "hookpoint", "positions", "context")), unit)

    def elsewhere(self) -> Condition:
        """The same at the input embedding: what a sweep over hookpoints repeats at each."""
        if self.amplitude is None:
            return self
        amplitude = replace(self.amplitude, hookpoint=None)
        values = tuple(pair for pair in self.values if pair[0] != "hookpoint")
        _, steps, count = self.name.rpartition("-steps")
        label = f"{amplitude}{steps}{count}" if steps else str(amplitude)
        return Condition(condition_name(self.attack, label), self.attack, values, amplitude)

    def settings(self) -> dict[str, Any]:
        """All that its numbers depend on, by the names of settings."""
        return {"attack": self.attack, **dict(self.values)}

    def record(self) -> dict[str, Any]:
        """The condition as `run.json` and the samples have it."""
        return self.settings() | ({} if self.amplitude is None else {_SIZE: asdict(self.amplitude)})

    def differences(self, other: Condition) -> list[tuple[str, Any, Any]]:
        """(setting, value here, value there) of each setting in which two conditions differ.

        Settings that one of the two does not use follow from others that differ, and are left out.
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
    """The steps of each condition that these tell from others of its attack and amplitude."""
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
    """Of all settings, those that the numbers of an attack depend on, as they are resolved."""
    kind = kind_of(attack)
    if kind is None:  # of another version, or of the user's own: as it was recorded
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
        resolved = Attack(attack, used["epsilon"], **steps)
    except UsageError:  # of a damaged record
        return used
    if kind.iterative and (kind.adaptive or not kind.minimal):  # `fmn` has none unless given
        used["step_size"] = resolved.step
    if used.get("first_epsilon", 0) is None:
        used["first_epsilon"] = resolved.epsilon / 16
    unused = {
        # the targeted ones and `fmn` follow scores of choices, whatever the loss makes of them
        "loss": not kind.search and (not kind.gradient or kind.targeted or attack == "fmn"),
        "seed": not resolved.draws,
        "gradient_dtype": not kind.gradient,
    }
    unused["loss_source"] = unused["loss"]
    return {name: value for name, value in used.items() if not unused.get(name)}


def of_plan(
    plan: Plan, conditions: Iterable[AttackSettings], attacks: Iterable[Attack]
) -> dict[str, Condition]:
    """The conditions of a run, by name.

    Args:
        plan: of the run.
        conditions: their settings.
        attacks: the same, resolved, which have the names.
    """
    prompt, conditions = {name: getattr(plan, name) for name in PROMPT}, [*conditions]
    if plan.gradient_dtype is not None:
        prompt["gradient_dtype"] = plan.gradient_dtype
    if plan.standard is not None:
        prompt[STANDARD] = plan.standard.version
    by_condition = {}
    for settings, attack, place in zip(conditions, attacks, places(conditions), strict=True):
        values = {**prompt, **settings.arguments(), **settings.sources}
        amplitude = replace(settings.amplitude, hookpoint=place) if attack.name != "none" else None
        by_condition[attack.condition] = Condition.of(attack.condition, values, amplitude)
    return by_condition


def of_run(run: Mapping[str, Any], frame: pd.DataFrame) -> dict[str, Condition]:
    """The conditions in a frame, by name.

    Args:
        run: what `run.json` holds. Runs of earlier versions have no `conditions` there: theirs are
            put together from `settings`, `attacks` and the names.
        frame: with the columns `condition` and `attack`.
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
    """The conditions in a frame as their names tell them, for want of a record."""
    return {name: Condition.of(name, *named) for name, named in _from_names(frame).items()}


def _amplitude(stored: Any) -> Amplitude | None:
    """The amplitude in the record of a condition; None: there is none, or it is damaged."""
    try:
        number, unit = float(stored["epsilon"]["number"]), stored["epsilon"]["unit"]
        return Amplitude(Epsilon(number, unit), stored["norm"], stored["hookpoint"])
    except (LookupError, TypeError, ValueError):
        return None


def _from_names(frame: pd.DataFrame) -> dict[str, tuple[dict[str, Any], Amplitude | None]]:
    """Settings and amplitude of each condition, as far as its name and the frame tell them."""
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
    """Names under which the conditions of two runs may be paired, and what differs in the others.

    Equal conditions get the name that the first run has. Those that differ, but have the same name,
    get one that says in what, such as `bim@0.003 (steps=2 vs steps=20)`.

    Returns:
        The new names of run a, those of run b, by the old ones, and a sentence for each name that
        means two conditions.
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
