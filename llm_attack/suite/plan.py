"""What a run is: conditions over tasks with one model; from flags, a YAML file or a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from llm_attack.errors import UsageError, closest, invalid
from llm_attack.lm.settings import AttackSettings, amplitude

# Fields of a plan that say how it is carried out; results do not depend on them.
_HOW = ("device",)


@dataclass(frozen=True)
class Plan:
    """Conditions over tasks: every attack at every epsilon.

    Args:
        model: hub id, local folder, or `demo`.
        tasks: of lm-eval: tasks, groups, tags or patterns. These, attacks and epsilons may be one,
            several, or a string with commas.
        attacks: names of `llm_attack.attacks.ATTACKS`.
        epsilons: amplitudes; one with the suffix rms, as 0.7rms, is in units of the embeddings'
            root mean square whatever `epsilon_unit` says.
        epsilon_unit, steps, step_size, loss, score, context, hookpoint, seed: of
            `AttackSettings`, the same for all conditions.
        limit: questions per task; below 1, their share.
        num_fewshot, apply_chat_template, fewshot_as_multiturn, system_instruction: of lm-eval.
        include_path: a folder of more lm-eval tasks.
        batch_size: rows of a batch at most, or `auto`.
        device: cuda, cuda:1, cpu, mps, ...; None: the best there is.
        model_args: more arguments of `attacked-hf`; a mapping, or key=value,...

    Raises:
        UsageError: a value is not allowed.
    """

    model: str = "TinyLlama/TinyLlama_v1.1"
    tasks: Sequence[str] = ("paper_six",)
    attacks: Sequence[str] = ("none", "random", "fgsm", "bim")
    epsilons: Sequence[float | str] = (0.01,)
    epsilon_unit: str = "absolute"
    steps: int = 10
    step_size: float | None = None
    loss: str = "sequence"
    score: str = "acc"
    context: str | None = None
    hookpoint: str | None = None
    seed: int = 0
    limit: float | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None
    include_path: str | None = None
    batch_size: int | str = "auto"
    device: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("tasks", str), ("attacks", str), ("epsilons", _epsilon)):
            object.__setattr__(self, name, _listed(name, getattr(self, name), kind))
        for name in ("batch_size", "limit", "model_args"):
            object.__setattr__(self, name, getattr(self, f"_{name}")())
        own = {f.name for kind in (Plan, AttackSettings) for f in fields(kind)}
        taken = set(self.model_args) & own
        if taken:
            name = sorted(taken)[0]
            raise UsageError(f"model_args={name}=...: must be given as {name} of its own")
        names = [c.attack_in_units.condition for c in self.conditions]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise UsageError(f"attacks, epsilons: the condition {twice} must occur only once")

    def _batch_size(self) -> int | str:
        size = str(self.batch_size)
        if size != "auto" and (not size.isdecimal() or int(size) < 1):
            raise invalid("batch_size", self.batch_size, "auto or an integer, 1 or more")
        return size if size == "auto" else int(size)

    def _limit(self) -> float | None:
        limit = self.limit
        if limit is None:
            return None
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
            raise invalid("limit", limit, "a number greater than 0")
        if limit > 1 and limit % 1:
            raise invalid("limit", limit, "a whole number of questions, or a share below 1")
        return int(limit) if limit >= 1 else limit

    def _model_args(self) -> dict[str, Any]:
        given = self.model_args
        if isinstance(given, str) and all("=" in part for part in given.split(",") if part):
            from llm_attack.harness.names import simple_parse_args_string

            return simple_parse_args_string(given)
        if not isinstance(given, dict):
            raise invalid("model_args", given, "key=value,...")
        return dict(given)

    @property
    def model_name(self) -> str:
        """What tables call the model: its id on the hub, or the name of its folder or file."""
        path = Path(str(self.model_args.get("gguf_file") or self.model))
        return path.resolve().name if path.suffix == ".gguf" or path.exists() else self.model

    @property
    def conditions(self) -> list[AttackSettings]:
        """`none` once and first, every other attack at every epsilon."""
        own = {f.name for f in fields(AttackSettings)} & {f.name for f in fields(self)}
        common = {name: getattr(self, name) for name in own}
        attacks = sorted(self.attacks, key=lambda name: name != "none")
        pairs = [
            (attack, epsilon)
            for attack, epsilon in product(attacks, self.epsilons)
            if attack != "none" or epsilon == self.epsilons[0]
        ]
        return [AttackSettings(attack=a, epsilon=e, **common) for a, e in pairs]

    @property
    def evaluation(self) -> dict[str, Any]:
        """Arguments of lm-eval's `simple_evaluate`."""
        names = (
            "limit",
            "num_fewshot",
            "apply_chat_template",
            "fewshot_as_multiturn",
            "system_instruction",
        )
        given = {name: getattr(self, name) for name in names}
        return {k: v for k, v in given.items() if v is not None and v is not False}

    def settings(self) -> dict[str, Any]:
        """All that results depend on."""
        return {k: v for k, v in asdict(self).items() if k not in _HOW}


def _epsilon(value: Any) -> float | str:
    number, unit = amplitude(value)
    return float(number) if unit is None else f"{number:g}{unit}"


def _listed(name: str, value: Any, kind: Callable[[Any], Any]) -> tuple:
    """One value, several, or several in a string with commas between them."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    try:
        values = tuple(map(kind, value if isinstance(value, Iterable) else [value]))
    except (TypeError, ValueError):
        allowed = "numbers, such as 0.01 or 0.7rms, with commas between them"
        raise invalid(name, value, allowed) from None
    if not values:
        raise UsageError(f"{name}=: must name at least one")
    return values


def check_names(names: Iterable[Any], also: Sequence[str] = ()) -> None:
    """Raises UsageError unless all `names` are settings of a plan, or of `also`."""
    known = [*(f.name for f in fields(Plan)), *also]
    for name in names:
        if name not in known:
            meant = closest(name, known)
            hint = f"; did you mean {meant!r}?" if meant else ""
            raise UsageError(f"{name}: must be one of {', '.join(known)}{hint}")


def from_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, whose keys are those of `Plan`.

    Raises:
        UsageError: the file cannot be read, is no mapping, or has an unknown key.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"config={path}: cannot be read ({reason}); must be a YAML file") from None
    if not isinstance(content, dict):
        raise UsageError(f"config={path}: must be a mapping, such as attacks: [none, fgsm]")
    several = "tasks", "attacks", "epsilons", "model_args"
    for key in content:
        try:
            check_names([key], also=["output"])
        except UsageError as error:
            raise UsageError(f"config={path}: {error}") from None
        if isinstance(content[key], (dict, list)) and key not in several:
            raise UsageError(f"config={path}: {key}: {content[key]}: must be a single value")
    return content
