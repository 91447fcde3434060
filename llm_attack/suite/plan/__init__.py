"""The plan of a run: one model, its tasks, and the conditions to compare."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from llm_attack.attacks.formats import ALLOWED, Format
from llm_attack.attacks.settings import (
    ATTACKS,
    BATTERIES,
    FIXED,
    ITERATIVE,
    OF_TOKENS,
    ROUNDINGS,
    SAMPLED,
    SPARSE,
    SWAPS,
    kind_of,
    known_attack,
)
from llm_attack.base.declare import (
    listed,
    names,
    remembers,
    setting,
    underscored,
)
from llm_attack.base.errors import UsageError, invalid
from llm_attack.base.loaded import LoadedModel, is_loaded
from llm_attack.base.options import Numbers
from llm_attack.lm.settings import (
    AttackSettings,
    EngineSettings,
    ThreatSettings,
    condition_names,
    unread,
)
from llm_attack.lm.smoothing import Smoothing
from llm_attack.lm.standard import NEWEST, STANDARDS, Standard, version_of
from llm_attack.lm.units import EPSILON, Epsilon
from llm_attack.suite.plan import values
from llm_attack.suite.plan.fixed import (
    OF_FIXED,
    FixedSettings,
    Perturbation,
    check_fixed,
    read,
)
from llm_attack.suite.plan.smoothing import (
    OF_SMOOTHING,
    SmoothingSettings,
    check_smoothing,
    smoothing_of,
)

# How a plan is carried out or reported. The answers do not depend on these settings.
_HOW = ("device", "equivalence", "shard", "ray", "ray_workers")
# Only saved perturbations depend on these settings.
_SAVED = ("save_perturbations", "path_points")
_TRACED = ("trace",)  # only the curves over steps depend on this

# The attack that asks for the worst case over all attacks (`suite.analysis.worst`). A loss that
# does not know the label needs this request.
WORST = "worst"
# The worst case leaves these out, because they have no fixed amplitude: the clean answers, the
# control, noise without a bound, and searches for the smallest amplitude. It also leaves out
# attacks that choose tokens.
_NAMED = {**ATTACKS, **ROUNDINGS, **OF_TOKENS}
NO_PART = tuple(name for name, kind in _NAMED.items() if not kind.bounded)

# `critical=True` adds these attacks.
_CRITICAL = ("critical", "fmn")

# Most attacks read these settings, so a settings file may contain them for any run.
_OF_MANY = ("steps", "step_size")


@dataclass(frozen=True, kw_only=True)
class _SeveralSteps(ThreatSettings):
    """The settings of all conditions. Iterative attacks may have several values of `steps`."""

    steps: Any = setting(
        10,
        f"Number of steps of the iterative attacks ({ITERATIVE}). Several, separated by commas,"
        " make a condition of each. Except for apgd, apgdt, fmn and critical, they cost no more"
        " than the largest",
        kind=int,
        also_type=(list, tuple),
        option=Numbers(int),
        minimum=1,
        allowed=f"{values.COUNT.words()}, or several, separated by commas",
        parse=values.steps,
        group="attack",
    )


@remembers
@dataclass(frozen=True)
class Plan(_SeveralSteps, EngineSettings, SmoothingSettings, FixedSettings):
    """Conditions over tasks: every attack at every epsilon and, if it is iterative, every `steps`.

    From Python, `model` may be a loaded model of transformers. Then `tokenizer` is its tokenizer,
    and `name` is its name in results (`LoadedModel`).

    Raises:
        UsageError: a value is not allowed.
    """

    model: Any = setting(
        "TinyLlama/TinyLlama_v1.1",
        "Model to attack: a hub id, a local folder, a GGUF file, or demo, the bundled model",
        kind=str,
        group="model",
    )
    tasks: Sequence[str] = setting(
        ("paper_six",),
        "Tasks, groups, tags or patterns of lm-eval, separated by commas",
        allowed=values.NAMES,
        parse=lambda given: values.texts(values.several("tasks", given)),
        group="task",
    )
    attacks: Sequence[Any] = setting(
        ("none", "random", "fgsm", "bim"),
        f"Attacks to compare, separated by commas: {', '.join(ATTACKS)}, or"
        f" package.module:function of your own. Attacks in rounding cells: {', '.join(ROUNDINGS)}."
        f" Attacks that choose tokens: {', '.join(OF_TOKENS)}. The name worst stands for the"
        " accuracy against all of them at each amplitude. If the loss knows the label, it is"
        " always reported. Otherwise it is below guessing by construction, and is reported only if"
        f" you name it. The names {' and '.join(NEWEST)} stand for fixed conditions, which"
        " everybody can compare; they set epsilons, norms and loss",
        allowed=values.NAMES,
        parse=values.attacks,
        group="attack",
    )
    epsilons: Sequence[Any] = setting(
        (Epsilon(0.01),),
        "Amplitudes, separated by commas. A suffix such as in 0.7rms takes precedence over"
        " epsilon_unit",
        also_type=tuple,
        allowed=values.NUMBERS,
        parse=values.epsilons,
        group="attack",
    )
    cells: Sequence[Any] = setting(
        (),
        f"Formats of the rounding cells, separated by commas: {ALLOWED}. The attacks"
        f" {', '.join(ROUNDINGS)} need them. Epsilons do not apply to these attacks, and step_size"
        " is in widths of a cell",
        kind=tuple,
        allowed=ALLOWED,
        parse=lambda given: values.texts(listed(given)),
        group="attack",
    )
    swaps: Sequence[Any] = setting(
        (1,),
        "Largest numbers of tokens that gcg puts in place of others, separated by commas. Each"
        " makes a condition",
        also_type=tuple,
        option=str,
        allowed=values.COUNTS,
        parse=values.counts,
        group="attack",
    )
    critical: bool = setting(
        False,
        "Find the smallest amplitude that changes the answer, for every question, up to"
        " epsilon_max. Adds critical and fmn to the attacks. Needs a loss that knows the label",
        group="attack",
    )
    epsilon_max: float | str | Epsilon | None = setting(
        None,
        "Largest amplitude of critical and fmn. The default is the largest of epsilons",
        also_type=(str, Epsilon),
        option=str,
        allowed=EPSILON,
        parse=values.epsilon_max,
        group="attack",
    )
    hookpoints: Sequence[str] = setting(
        (),
        "Modules whose outputs are perturbed, one at a time, separated by commas; replaces"
        " hookpoint. The name embed is the input embedding, layers is the output of every block,"
        " and * stands for any name, as in model.layers.*.mlp",
        kind=tuple,
        allowed=values.NAMES,
        parse=lambda given: values.texts(listed(given)),
        group="threat model",
    )
    limit: float | None = setting(
        None,
        "Largest number of questions of each task; below 1 it is a share of them",
        minimum=0.0,
        exclusive_minimum=True,
        parse=values.limit,
        group="task",
    )
    num_fewshot: int | None = setting(
        None,
        "Number of few-shot examples before each question. The default is the task's own",
        minimum=0,
        group="task",
    )
    apply_chat_template: bool | str = setting(
        False, "Put every prompt into the model's chat template", also_type=str, group="task"
    )
    fewshot_as_multiturn: bool = setting(
        False, "Give the few-shot examples as turns of a conversation", group="task"
    )
    system_instruction: str | None = setting(
        None, "System prompt, a text before every prompt", group="task"
    )
    include_path: str | None = setting(None, "Folder with more tasks of lm-eval", group="task")
    batch_size: int | str = setting(
        "auto",
        "Largest number of rows of a batch. With auto, the device decides",
        kind=tuple,
        allowed=values.ROWS,
        parse=values.batch_size,
        group="engine",
    )
    equivalence: float | None = setting(
        None,
        "Also test whether accuracies equal the accuracy under none within this many percentage"
        " points",
        parse=lambda given: float(given) if type(given) is int and given <= 100 else given,
        group="output",
    )
    save_perturbations: bool = setting(
        False,
        "Save the perturbations, a safetensors file for each task, and write a page that shows for"
        " each token what happened to it. Needs an output folder; the size is said at the start",
        group="output",
    )
    path_points: int = setting(
        50,
        "Points between the clean and the perturbed embeddings at which save_perturbations takes a"
        " gradient, for the share of the loss that each token carries. With 0, there are no shares",
        minimum=0,
        group="output",
    )
    trace: bool = setting(
        False,
        "Keep the loss and the margin at every step of every attack, as trace.parquet, and draw the"
        " loss over steps. It takes no further pass through the model. Needs a task with choices",
        group="output",
    )
    shard: str | None = setting(
        None,
        "Share of the work to do in this process, such as 2/8 for the second of eight. All shares"
        " use the same folder. The first one waits for the others and writes the results",
        allowed=values.SHARD,
        group="cluster",
    )
    ray: str | None = setting(
        None,
        "Ray cluster whose workers answer the batches: its address, auto for the cluster of this"
        " machine, or local to start one here. This process writes the results",
        allowed=values.RAY,
        group="cluster",
    )
    ray_workers: int | None = setting(
        None,
        "Number of Ray workers, each with a copy of the model. The default is one for each GPU of"
        " the cluster, or one for each core if the run uses CPUs",
        minimum=1,
        group="cluster",
    )
    device: str | None = setting(
        None,
        "Device to compute on, such as cpu or cuda:1. The default is cuda if there is a GPU, and"
        " else cpu",
        parse=values.device,
        group="engine",
    )
    model_args: dict[str, Any] = setting(
        "",
        "More arguments of attacked-hf, written key=value and separated by commas",
        also_type=dict,
        allowed=values.PAIRS,
        parse=values.model_args,
        group="model",
    )
    tokenizer: InitVar[Any] = None
    name: InitVar[str | None] = None
    given: ClassVar[frozenset[str]]

    def __post_init__(self, tokenizer: Any, name: str | None) -> None:
        self._check_loaded(tokenizer, name)
        super().__post_init__()
        EngineSettings.__post_init__(self)
        self._take_standard()
        check_fixed(self)
        self._check_hookpoints()
        self._check_cells()
        self._check_cluster()
        self._check_equivalence()
        self._check_questions()
        self._check_model_args()
        self._check_worst()
        self._check_used()
        self._check_distinct()
        self._check_saved()
        check_smoothing(self)

    def _take_standard(self) -> None:
        """Fills in the settings that a standard fixes, if the attacks name a standard.

        Raises:
            UsageError: a setting that the standard fixes is given as well.
        """
        named = tuple(version_of(name) for name in self.attacks)
        standard = next((STANDARDS[name] for name in named if name in STANDARDS), None)
        if standard is None:
            return
        version = standard.version
        if {*named} - {"none", version} or len(named) > len({*named}):
            raise UsageError(
                f"attacks={','.join(self.attacks)}: must name only {version} and none, because a"
                " standard fixes its attacks"
            )
        object.__setattr__(self, "attacks", ("none", version))
        for name, value in standard.fixed.items():
            given = getattr(self, name)
            if name in self.given and given != value:
                shown = ",".join(map(str, given)) if isinstance(given, tuple) else given
                raise UsageError(
                    f"{name}={shown}: must be left out with attacks={version}, which sets it"
                )
            object.__setattr__(self, name, value)

    @property
    def standard(self) -> Standard | None:
        """The standard that this run follows. None if it follows no standard."""
        return next((STANDARDS[name] for name in self.attacks if name in STANDARDS), None)

    def _check_hookpoints(self) -> None:
        for name, value in (("hookpoint", self.hookpoint), ("compile", self.compile)):
            if self.hookpoints and value:
                raise UsageError(f"{name}={value}: must not be given with hookpoints")

    def _check_cells(self) -> None:
        for name in self.cells:
            Format.of(name)
            if self.cells.count(name) > 1:
                raise UsageError(f"cells={','.join(self.cells)}: must name {name} only once")
        needing = next((name for name in self.attacks if name in ROUNDINGS), None)
        if needing and not self.cells:
            raise UsageError(
                f"attacks={','.join(self.attacks)}: {needing} needs cells, the formats whose"
                " rounding cells it stays in, such as cells=int8"
            )

    def _check_cluster(self) -> None:
        if self.shard is not None and self.share is None:
            raise invalid("shard", self.shard, values.SHARD)
        if self.ray is not None and not re.fullmatch(r"local|auto|[^\s/]+:\d+", self.ray):
            raise invalid("ray", self.ray, values.RAY)
        tied = [name for name in self.attacks if name in ROUNDINGS and ROUNDINGS[name].tied]
        if self.ray is not None and tied:
            raise UsageError(
                f"ray={self.ray}: must not be given with {tied[0]}, which needs all questions in"
                " one process"
            )
        if self.ray is None and self.ray_workers is not None:
            raise UsageError(
                f"ray_workers={self.ray_workers}: must be given together with ray, such as"
                " ray=local"
            )

    def _check_equivalence(self) -> None:
        if self.equivalence is None:
            return
        within(self.equivalence)
        if "none" not in self.attacks or set(self.attacks) == {"none"}:
            raise UsageError(
                f"equivalence={self.equivalence:g}: needs the attack none and another one to"
                f" compare with it; attacks={','.join(self.attacks)}"
            )

    def _check_saved(self) -> None:
        if self.save_perturbations and all(c.attack_in_units.identity for c in self.conditions):
            raise UsageError(
                "save_perturbations=True: needs an attack that perturbs something;"
                f" attacks={','.join(self.attacks)}"
            )
        if self.save_perturbations and self.standard is not None:
            raise UsageError(
                f"save_perturbations=True: must be left out with attacks={self.standard.version},"
                " whose attacks each see other questions"
            )
        if not self.save_perturbations and self.path_points != Plan.path_points:
            raise UsageError(
                f"path_points={self.path_points}: must be given together with"
                " save_perturbations=True"
            )

    def _check_questions(self) -> None:
        if self.limit is not None and self.limit > 1 and not isinstance(self.limit, int):
            allowed = "a whole number of questions, or a share below 1"
            raise invalid("limit", self.limit, allowed)
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise UsageError(
                "fewshot_as_multiturn=True: needs apply_chat_template=True, which makes the turns"
            )

    def _check_model_args(self) -> None:
        own = {*names(Plan), *names(AttackSettings), "pretrained"}
        taken = sorted(own & set(map(underscored, self.model_args)))
        if taken:
            proper = "model" if taken[0] == "pretrained" else taken[0]
            raise UsageError(
                f"model_args={taken[0]}=...: must be given as the separate argument {proper}"
            )

    def _check_worst(self) -> None:
        counted = [c for c in self.conditions if c.attack not in NO_PART]
        if WORST in self.attacks and len(counted) < 2:
            raise UsageError(
                f"attacks={','.join(self.attacks)}: {WORST} needs two attacks, or one attack at"
                f" two epsilons; {', '.join(NO_PART)} do not count"
            )

    def _check_distinct(self) -> None:
        given = condition_names(self.conditions)
        twice = next((name for name in given if given.count(name) > 1), None)
        if twice:
            raise UsageError(f"attacks, epsilons: must give the condition {twice} only once")

    def _check_loaded(self, tokenizer: Any, name: str | None) -> None:
        """Takes a loaded model, which only one process can evaluate.

        Raises:
            UsageError: another setting needs a model that is not loaded, or a setting needs a
                loaded model and there is none.
        """
        if is_loaded(self.model):
            object.__setattr__(self, "model", LoadedModel(self.model, tokenizer, name))
        elif tokenizer is not None or name is not None:
            given = "tokenizer" if tokenizer is not None else "name"
            hint = "; must be given as model_args={'tokenizer': ...}" * (given == "tokenizer")
            raise UsageError(f"{given}: must be given together with a loaded model{hint}")
        if isinstance(self.model, LoadedModel):
            for argument in ("shard", "ray"):
                if getattr(self, argument) is not None:
                    raise UsageError(
                        f"{argument}={getattr(self, argument)}: must not be given with a loaded"
                        " model, which belongs to one process"
                    )

    def _check_used(self) -> None:
        """Refuses settings that no attack of the plan reads, because they would have no effect.

        Most attacks read `steps` and `step_size`. If no attack of the plan does, the results have a
        warning instead.

        Raises:
            UsageError: a setting is not read. The message names the first one, and the attacks that
                read it.
        """
        run = {condition.attack for condition in self.conditions}
        others = {
            "cells": [*ROUNDINGS],
            "swaps": [name for name, kind in SWAPS.items() if kind.swaps == SAMPLED],
            "epsilon_max": [attack for attack, kind in ATTACKS.items() if kind.minimal],
            "epsilons": [attack for attack in (*ATTACKS, *BATTERIES, *SPARSE) if attack != "none"],
        }
        for name, value, readers in unread(self, run, others):
            if name in _OF_MANY:
                continue
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise UsageError(
                f"{name}={shown}: no attack of this run uses it; must be left out, or given with"
                f" one of {', '.join(readers)}"
            )

    @property
    def smoothing(self) -> Smoothing | None:
        """The noise of the certificates; None if nothing is certified."""
        return smoothing_of(self)

    @cached_property
    def fixed(self) -> Perturbation | None:
        """The perturbation that was found before; None if there is none."""
        if self.perturbation is None:
            return None
        return read(self.perturbation, self.perturbation_of)

    @property
    def share(self) -> tuple[int, int] | None:
        """`shard` as (its number from 0, number of shards); None if not given or malformed."""
        parts = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", str(self.shard))
        if parts is None:
            return None
        part, whole = parts.groups()
        return (int(part) - 1, int(whole)) if 1 <= int(part) <= int(whole) else None

    @property
    def model_name(self) -> str:
        """The model's name in tables: its id on the hub, or the name of its folder or file."""
        path = Path(str(self.model_args.get("gguf_file") or self.model))
        known = path.suffix == ".gguf" or path.exists()
        return path.resolve().name if known else str(self.model)

    @property
    def largest_epsilon(self) -> Epsilon:
        """The largest amplitude that `critical` and `fmn` try.

        Raises:
            UsageError: the epsilons have different units, so none is known to be the largest.
        """
        if isinstance(self.epsilon_max, Epsilon):
            return self.epsilon_max
        if len({epsilon.unit for epsilon in self.epsilons}) > 1:
            given = ", ".join(map(str, self.epsilons))
            raise UsageError(
                f"epsilon_max=: must be given, because the epsilons have different units ({given})"
            )
        largest: Epsilon = max(self.epsilons, key=lambda epsilon: epsilon.number)
        return largest

    def _sizes_of(self, attack: str) -> Sequence[dict[str, Any]]:
        """The sizes of an attack's perturbations, as arguments of its condition."""
        if attack in ROUNDINGS:
            return [{"cells": name} for name in self.cells]
        if attack in SWAPS:
            several = SWAPS[attack].swaps == SAMPLED
            return [{"swaps": n} for n in (self.swaps if several else (1,))]
        return [{"epsilon": epsilon} for epsilon in self._epsilons_of(attack)]

    def _epsilons_of(self, attack: str) -> Sequence[Epsilon]:
        if attack in ATTACKS and ATTACKS[attack].minimal:
            return [self.largest_epsilon]
        if self.fixed is not None and attack in FIXED:
            return [self.fixed.epsilon]
        return self.epsilons[:1] if attack == "none" else self.epsilons

    def _steps_of(self, attack: str) -> Sequence[int]:
        several = self.steps if isinstance(self.steps, tuple) else (self.steps,)
        named = known_attack(attack) or attack in _NAMED
        kind = kind_of(attack) if named else None
        reads = len(several) > 1 and kind is not None and kind.uses("steps")
        return several if reads else several[-1:]

    def _norm_of(self, attack: str, norm: str) -> str:
        return self.fixed.norm if self.fixed is not None and attack in FIXED else norm

    @cached_property
    def conditions(self) -> tuple[AttackSettings, ...]:
        """All conditions: `none` first, then every other attack at every epsilon and every `steps`.

        Searches for the smallest amplitude appear once, with the largest epsilon.
        """
        common = {name: getattr(self, name) for name in names(ThreatSettings)}
        more = [name for name in _CRITICAL if self.critical and name not in self.attacks]
        asked = [name for name in self.attacks if name != WORST]
        asked += [*FIXED] if self.fixed is not None else []
        norms = [self.norm]
        if self.standard is not None:
            asked, norms = ["none", *self.standard.attacks], [*self.standard.norms]
        attacks = sorted([*asked, *more], key=lambda name: name != "none")
        return tuple(
            AttackSettings(
                attack=attack,
                **size,
                **{**common, "norm": self._norm_of(attack, norm), "steps": steps},
            )
            for norm in norms
            for attack in attacks
            for size in self._sizes_of(attack)
            for steps in self._steps_of(attack)
            if attack != "none" or norm == norms[0]
        )

    def conditions_at(self, hookpoints: Sequence[str | None]) -> tuple[AttackSettings, ...]:
        """The conditions at each of these modules; `none` appears once."""
        return tuple(
            condition if condition.hookpoint == name else replace(condition, hookpoint=name)
            for i, name in enumerate(hookpoints)
            for condition in self.conditions
            if i == 0 or condition.attack != "none"
        )

    @property
    def evaluation(self) -> dict[str, Any]:
        """The arguments for lm-eval's `simple_evaluate`."""
        passed = (
            "limit",
            "num_fewshot",
            "apply_chat_template",
            "fewshot_as_multiturn",
            "system_instruction",
        )
        given = {name: getattr(self, name) for name in passed}
        return {k: v for k, v in given.items() if v is not None and v is not False}

    def plain(self) -> dict[str, Any]:
        """Every setting in the form in which users type it and files store it."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        epsilon_max, epsilons = values["epsilon_max"], values["epsilons"]
        values["model"] = str(self.model)  # without the model itself if it is loaded
        values["epsilons"] = tuple(epsilon.plain for epsilon in epsilons)
        values["epsilon_max"] = None if epsilon_max is None else epsilon_max.plain
        values["sigmas"] = tuple(sigma.plain for sigma in self.sigmas)
        return values

    def settings(self) -> dict[str, Any]:
        """All settings that the answers, and what else is saved, depend on."""
        saved = () if self.save_perturbations else _SAVED
        left_out = (*_HOW, *saved, *(() if self.trace else _TRACED))
        left_out = left_out if self.sigmas else (*left_out, *OF_SMOOTHING)
        left_out = (*left_out, *(name for name in OF_FIXED if getattr(self, name) is None))
        left_out = left_out if self.cells else (*left_out, "cells")
        # of runs without attacks that read them, as they were before there were such attacks
        chosen = {name for attack in OF_TOKENS for name in OF_TOKENS[attack].settings}
        if not {*self.attacks} & {*OF_TOKENS}:
            left_out = (*left_out, "swaps", *(chosen & {"exact_tokens", "candidates"}))
        return {name: value for name, value in self.plain().items() if name not in left_out}


def within(value: float) -> float:
    """The equivalence margin: smaller differences count as no difference.

    Raises:
        UsageError: it is not above 0 and at most 100.
    """
    if not 0 < value <= 100:
        raise invalid("equivalence", value, "percentage points, above 0 and at most 100")
    return float(value)
