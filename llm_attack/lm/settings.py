"""The arguments of `attacked-hf` that `hf` does not have."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeVar

from llm_attack.attacks import ATTACKS, Attack
from llm_attack.attacks.formats import ALLOWED, Format
from llm_attack.attacks.settings import (
    BATTERIES,
    OF_TOKENS,
    ROUNDINGS,
    SAMPLED,
    SPARSE,
    SWAPS,
    Kind,
    StepSettings,
    condition_name,
    register_attack,
    step_settings,
)
from llm_attack.base.declare import check, names, parse, setting, underscored
from llm_attack.base.errors import UsageError, invalid
from llm_attack.lm.losses import LOSSES, ThreatModel, known_loss, register_loss
from llm_attack.lm.packing.positions import ALL, NAMED, check_positions
from llm_attack.lm.units import (
    ABSOLUTE,
    EPSILON,
    NEFTUNE,
    SWAP,
    UNITS,
    Amplitude,
    Epsilon,
    Signal,
    known_unit,
    register_unit,
    size_of,
    unit_source,
)

NAMES = {**ATTACKS, **BATTERIES, **ROUNDINGS, **OF_TOKENS}
"""The attacks that can be named."""

EMBED, LAYERS = "embed", "layers"
"""Hookpoints with names of their own: the input embedding, and the output of every block."""

CONTEXTS = ("own", "shared")
PER_TOKEN = "_token"
NORMS = ("linf", "l2", f"l2{PER_TOKEN}")
PACKINGS = ("auto", "tree", "off")
GRADIENT_DTYPES = ("bfloat16",)


def _named(table: dict[str, Any]) -> str:
    return f"one of {', '.join(table)}, or package.module:function of your own"


def _loss_name(given: Any) -> Any:
    return register_loss(given) if callable(given) else given


def _unit_name(given: Any) -> Any:
    return register_unit(given) if callable(given) else given


def _attack_name(given: Any) -> Any:
    if given is None:  # lm-eval reads `attack=none` in a string of arguments as None
        return "none"
    return register_attack(given) if callable(given) else given


@dataclass(frozen=True, kw_only=True)
class ThreatSettings(StepSettings):
    """The settings that all conditions of a run share.

    Raises:
        UsageError: a value is not allowed, or two values exclude each other.
    """

    epsilon_unit: str = setting(
        "absolute",
        f"Unit of epsilon and step_size: one of {', '.join((ABSOLUTE, *UNITS))}, or"
        " package.module:function of your own. Relative units make models of different scale"
        " comparable. With rms, one unit is the root mean square of the embedding matrix, or of"
        " the activations at another hookpoint. With token_norm, one unit gives each token's"
        " perturbation the mean length of the embeddings. With neftune, it is one over the square"
        " root of the number of perturbed coordinates of the question (or request), so epsilon is"
        " the alpha of NEFTune. In L2, each unit is multiplied by the square root of the width. A"
        " function of your own gets the activations of the hookpoint and returns the size of a"
        " unit in each coordinate",
        allowed=_named({ABSOLUTE: None, **UNITS}),
        parse=_unit_name,
        group="threat model",
    )
    norm: str = setting(
        "linf",
        "Norm of the perturbation that epsilon bounds. With l2_token it bounds each token's"
        " perturbation, with l2 the perturbation of all tokens together",
        choices=NORMS,
        group="threat model",
    )
    loss: str = setting(
        "sequence",
        f"Loss that the attack raises: one of {', '.join(LOSSES)}, or package.module:function of"
        " your own. With sequence, it is the negative log-likelihood of all tokens of a request;"
        " with continuation, of the continuation only. With choice and margin, the adversary knows"
        " the label. The loss choice is the log odds of the wrong choices against the right one."
        " The loss margin is the best score of the wrong choices minus the score of the right one",
        allowed=_named(LOSSES),
        parse=_loss_name,
        group="threat model",
    )
    score: str = setting(
        "acc",
        "Score to report: a metric of lm-eval, such as acc, acc_norm or brier_score. A task"
        " without it reports acc, or else another of its scores. A loss that knows the label"
        " attacks the same score. It compares log-likelihoods; for acc_norm per character, for"
        " acc_bytes per byte",
        allowed="the name of a metric",
        group="task",
    )
    context: str | None = setting(
        None,
        "How to perturb the tokens that the requests of a question share: separately for each"
        " request (own), or once for all of them (shared). The default is shared if the loss knows"
        " the label, and else own",
        choices=CONTEXTS,
        group="threat model",
    )
    encode_separately: bool = setting(
        False,
        "Tokenise each answer separately from its prompt, as lm-eval does for encoder-decoder"
        " models. The default is to tokenise both together, as lm-eval does for causal models."
        " Then one token may contain the end of the prompt and the start of the answer",
        group="task",
    )
    positions: str = setting(
        ALL,
        f"Tokens to perturb: {', '.join(NAMED)}, or a slice such as 2:-1 of the tokens that the"
        " model reads for a request. With question, few-shot examples and the system prompt are"
        " not perturbed; with not_first, the first token is not",
        group="threat model",
    )
    hookpoint: str | None = setting(
        None,
        "Module whose output is perturbed, such as model.layers.12. The default is the input"
        " embedding",
        allowed="the dotted path of a module",
        group="threat model",
    )
    seed: int = setting(0, "Seed of the random draws", group="attack")

    def __post_init__(self) -> None:
        parse(self)
        check(self)
        if not known_unit(self.epsilon_unit):
            raise invalid("epsilon_unit", self.epsilon_unit, (ABSOLUTE, *UNITS))
        if not known_loss(self.loss):
            raise invalid("loss", self.loss, LOSSES)
        check_positions(self.positions)
        if self.needs_gold and self.context == "own":
            raise UsageError(
                f"context=own: must be shared with loss={self.loss}, which has one perturbation"
                " for each question"
            )

    @property
    def needs_gold(self) -> bool:
        """Whether the attacker knows which choices are right."""
        return LOSSES[self.loss].gold

    @property
    def shared(self) -> bool:
        """Whether the tokens that a question's requests share have one perturbation."""
        return self.needs_gold if self.context is None else self.context == "shared"

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel(self.loss, self.shared, self.seed, self.positions)


@dataclass(frozen=True)
class AttackSettings(ThreatSettings):
    """The settings of the attack of `attacked-hf`.

    Raises:
        UsageError: a value is not allowed, or two values exclude each other.
    """

    attack: str = setting(
        "fgsm",
        f"Name of the attack: one of {', '.join((*ATTACKS, *BATTERIES))}, or"
        f" package.module:function of your own. Attacks in rounding cells: {', '.join(ROUNDINGS)}."
        f" Attacks that choose tokens: {', '.join(OF_TOKENS)}",
        allowed=_named(NAMES),
        parse=_attack_name,
        group="attack",
    )
    epsilon: float | str | Epsilon = setting(
        0.01,
        "Amplitude (perturbation budget): the radius of the ball around the clean point. A suffix"
        " names the unit: 0.7rms, 0.1token_norm, 5neftune",
        also_type=Epsilon,
        allowed=EPSILON,
        parse=Epsilon.parse,
        group="attack",
    )
    cells: str | None = setting(
        None,
        f"Format of the rounding cells, such as int8. The attacks {', '.join(ROUNDINGS)} need it."
        " Epsilon does not apply to them, and step_size is in widths of a cell",
        allowed=ALLOWED,
        group="attack",
    )

    swaps: int = setting(
        1,
        "Largest number of tokens that gcg puts in place of others",
        minimum=1,
        group="attack",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_cells()
        self._check_tokens()
        self._check(self.attack_in_units.kind)

    def _check_cells(self) -> None:
        """Refuses attacks in cells without a format, and in another norm."""
        rounds = self.attack in ROUNDINGS
        if rounds and self.cells is None:
            raise UsageError(
                f"attack={self.attack}: needs cells, the format whose rounding cells it stays in,"
                " such as cells=int8"
            )
        if self.cells is None:
            return
        Format.of(self.cells)
        if not rounds:
            raise UsageError(
                f"cells={self.cells}: must be given with one of {', '.join(ROUNDINGS)}, not with"
                f" attack={self.attack}"
            )
        if Epsilon.parse(self.epsilon) != Epsilon.parse(AttackSettings.epsilon):
            raise UsageError(
                f"epsilon={self.epsilon}: must be left out with attack={self.attack}, which may use"
                " the whole cell"
            )
        if self.norm != "linf":
            raise UsageError(
                f"norm={self.norm}: must be linf with attack={self.attack}, because a cell is an"
                " interval in each coordinate"
            )

    def _check_tokens(self) -> None:
        """Refuses settings that have no meaning for attacks that choose tokens."""
        if self.attack in OF_TOKENS and not self.needs_gold:
            knowing = " or ".join(f"loss={name}" for name, loss in LOSSES.items() if loss.gold)
            raise UsageError(
                f"attack={self.attack}: looks for tokens that make the answer of a question wrong,"
                f" so it needs {knowing}, not loss={self.loss}"
            )
        if self.attack in SPARSE and self.norm == "l2":
            raise UsageError(
                f"norm=l2: must be linf or l2{PER_TOKEN} with attack={self.attack}, where each"
                " token has its own bound"
            )
        if self.attack not in SWAPS:
            return
        if Epsilon.parse(self.epsilon) != Epsilon.parse(AttackSettings.epsilon):
            raise UsageError(
                f"epsilon={self.epsilon}: must be left out with attack={self.attack}, which puts"
                " other tokens in place of tokens"
            )
        if self.hookpoint is not None:
            raise UsageError(
                f"hookpoint={self.hookpoint}: must be left out with attack={self.attack}, which"
                " changes tokens and so the input embedding"
            )

    @cached_property
    def amplitude(self) -> Amplitude:
        """Epsilon in its unit and norm.

        For attacks in cells it is one cell of the format, and for swaps the number of tokens.
        """
        if self.attack in SWAPS:
            n = self.swaps if SWAPS[self.attack].swaps == SAMPLED else 1
            return Amplitude(Epsilon(float(n), SWAP), self.norm)
        if self.cells is not None:
            return Amplitude(Epsilon(1.0, self.cells), self.norm)
        return Amplitude(Epsilon.parse(self.epsilon).in_unit(self.epsilon_unit), self.norm)

    @cached_property
    def attack_in_units(self) -> Attack:
        """The attack, with lengths in the unit of epsilon."""
        epsilon = self.amplitude.epsilon
        return Attack(
            self.attack,
            epsilon.number,
            norm=self.norm.removesuffix(PER_TOKEN),
            by_size=epsilon.unit == NEFTUNE,
            per_token=self.norm.endswith(PER_TOKEN),
            label=str(self.amplitude),
            cells=self.cells,
            **step_settings(self),
        )

    def _check(self, kind: Kind) -> None:
        if (kind.targeted or kind.minimal) and not self.needs_gold:
            knowing = " or ".join(f"loss={name}" for name, loss in LOSSES.items() if loss.gold)
            what = (
                "looks for the nearest wrong answer" if kind.minimal else "steps towards a choice"
            )
            raise UsageError(
                f"attack={self.attack}: {what}, so it needs {knowing}, not loss={self.loss}"
            )
        members = self.attack_in_units.members
        minimal = any(attack.kind.minimal or attack.kind.sparse for attack in members)
        if minimal and self.amplitude.epsilon.unit == NEFTUNE:
            raise UsageError(
                f"epsilon_unit={NEFTUNE}: must be another unit with attack={self.attack}, which"
                " compares amplitudes between questions"
            )

    def resolved(self, signal: Signal, label: str | None = None) -> Attack:
        """The attack in the units of the point. `label` is one of `labels`; None: by default."""
        attack = self.attack_in_units
        if label is not None:
            attack = replace(attack, label=label)
        unit = self.amplitude.epsilon.unit or ABSOLUTE
        return attack.scaled(size_of(unit, signal, attack.norm))

    def arguments(self) -> dict[str, Any]:
        """All arguments with their resolved values."""
        epsilon = self.amplitude.epsilon
        return {name: getattr(self, name) for name in names(self)} | {
            "epsilon": epsilon.number,
            "epsilon_unit": epsilon.unit,
            "context": "shared" if self.shared else "own",
        }

    @property
    def sources(self) -> dict[str, str]:
        """Hashes of the source of a user's own attack, loss and unit, if there are any."""
        sources = {
            "attack_source": self.attack_in_units.kind.source,
            "loss_source": LOSSES[self.loss].source,
            "unit_source": unit_source(self.amplitude.epsilon.unit),
        }
        return {name: source for name, source in sources.items() if source}


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The settings that say how `attacked-hf` loads and computes.

    If a process holds the whole model, all except `gradient_dtype` and `dequantize` change numbers
    only by rounding.

    Raises:
        UsageError: a value is not allowed.
    """

    packing: str = setting(
        "auto",
        "Layout of a question's requests. With tree, shared tokens are computed once; with off,"
        " each request has a row. With auto, it is tree if a trial at the start shows that the"
        " model supports it",
        choices=PACKINGS,
        group="engine",
    )
    gradient_checkpointing: bool = setting(
        False,
        "Recompute activations in the backward pass instead of keeping them. This takes less"
        " memory and more time",
        group="engine",
    )
    compile: bool = setting(False, "Compile the model's blocks with torch.compile", group="engine")
    deterministic: bool = setting(
        False,
        "Make answers equal to the last bit for every batch size, order, limit and number of"
        " processes. Every question (with context=own every request) is a batch of its own,"
        " without packing, on one thread",
        group="engine",
    )
    gradient_dtype: str | None = setting(
        None,
        "Take gradients of a copy of the model in this dtype, which is faster on some processors."
        " Answers stay in the model's own dtype. The copy needs memory, and attacked points differ"
        " slightly",
        choices=GRADIENT_DTYPES,
        group="engine",
    )
    allow_missing_weights: bool = setting(
        False,
        "Continue, with a warning in the results, if weights of the model are missing in the"
        " checkpoint, or if the checkpoint contains weights that the model does not use",
        group="model",
    )
    dequantize: bool = setting(
        False,
        "Replace quantised weights by full-precision weights when the model is loaded. Their"
        " rounding errors stay, and their gradient is right in every format",
        group="model",
    )

    def __post_init__(self) -> None:
        check(self)
        if self.deterministic and self.packing == "tree":
            raise UsageError(
                "packing=tree: must be auto or off with deterministic=True, because the longest"
                " tree of a run decides whether the model can use trees"
            )


def places(conditions: Sequence[AttackSettings]) -> list[str | None]:
    """The hookpoint in the name of each condition; none if all conditions have the same."""
    given = [condition.hookpoint for condition in conditions]
    return given if len({*given}) > 1 else [None] * len(given)


def labels(conditions: Sequence[AttackSettings]) -> list[str]:
    """The part of each condition's name after the name of its attack.

    It is the amplitude, and the hookpoint and the steps if other conditions differ in them.
    """
    counts: dict[tuple[str, Amplitude], set[int]] = {}
    for condition in conditions:
        counts.setdefault((condition.attack, condition.amplitude), set()).add(condition.steps)
    return [
        str(replace(condition.amplitude, hookpoint=place))
        + f"-steps{condition.steps}" * (len(counts[condition.attack, condition.amplitude]) > 1)
        for condition, place in zip(conditions, places(conditions), strict=True)
    ]


def condition_names(conditions: Sequence[AttackSettings]) -> list[str]:
    """The names of conditions of one run."""
    pairs = zip(conditions, labels(conditions), strict=True)
    return [condition_name(condition.attack, label) for condition, label in pairs]


def unread(
    settings: StepSettings,
    attacks: Collection[str],
    others: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Iterator[tuple[str, Any, list[str]]]:
    """The settings that were given and that none of `attacks` reads, so they have no effect.

    Args:
        settings: the values. A value that is the default counts as not given.
        attacks: names of the attacks that are run.
        others: settings that are not in `StepSettings`, each with the attacks that read it.

    Returns:
        (name, value, attacks that read it) for each.
    """
    every = {**ATTACKS, **ROUNDINGS, **OF_TOKENS}
    readers = {
        name: [attack for attack, kind in every.items() if name in kind.settings]
        for name in names(StepSettings)
    }
    defaults = {entry.name: entry.default for entry in fields(settings)}
    for name, read_by in {**readers, **others}.items():
        value = getattr(settings, name)
        if read_by and value != defaults[name] and not set(attacks).intersection(read_by):
            yield name, value, list(read_by)


Settings = TypeVar("Settings", AttackSettings, EngineSettings)


def split_arguments(
    arguments: dict[str, Any], kind: type[Settings]
) -> tuple[Settings, dict[str, Any]]:
    """Makes settings of `kind` from its own arguments, and returns the other arguments as well."""
    own = {name for name in arguments if underscored(name) in names(kind)}
    settings = kind(**{underscored(name): arguments[name] for name in own})
    return settings, {name: arguments[name] for name in arguments if name not in own}
