"""The table of attacks, and their settings: names, defaults, validation. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from inspect import signature
from typing import Any

from llm_attack.base.declare import SettingSpec, check, setting
from llm_attack.base.errors import UsageError, invalid
from llm_attack.base.plugins import check_name, is_known, name_of, source_hash


@dataclass(frozen=True)
class Kind:
    """The traits of an attack. The loop in `perturb` reads nothing else.

    Attributes:
        gradient: follows the gradient of a loss.
        iterative: makes several steps.
        targeted: lowers the loss of a target; an adaptive attack does so for each target in turn.
        start: name of the draw of `Norm` that it starts from; for noise, the draw is the result.
            None: starts at the clean point.
        projected: the draw is kept in the ball.
        reverse: steps in the opposite direction.
        momentum: steps remember the steps before.
        adaptive: finds its step sizes (Auto-PGD).
        search: tries points, and uses no gradient.
        minimal: looks for the nearest point with a loss above 0, at most epsilon away.
        function: a user's own function that does everything; see `register_attack`.
        source: hash of its source (`source_hash`); empty for the attacks of this package.
        members: the attacks of a battery in order, each with the settings that it reads.
        fixed: the signs of a perturbation that the caller has (`FIXED`); empty for other attacks.
        inside: the attack that does the same in a ball, if this one stays in the rounding cells of
            a format (`attacks.cells`); `none` for the format's own rounding.
        tied: perturbs a table of embeddings, which is the same for all questions of a run. With a
            gradient it is fitted to questions, and without one it is drawn.
        sparse: perturbs as few tokens as it can.
        swaps: how it chooses the tokens that it puts in place of others: `every`, `first_order`, or
            `sampled`; empty: it swaps no tokens.
    """

    gradient: bool = False
    iterative: bool = False
    targeted: bool = False
    start: str | None = None
    projected: bool = True
    reverse: bool = False
    momentum: bool = False
    adaptive: bool = False
    search: bool = False
    minimal: bool = False
    function: Callable[..., Any] | None = None
    source: str = ""
    members: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    fixed: str = ""
    inside: str | None = None
    tied: bool = False
    sparse: bool = False
    swaps: str = ""

    @property
    def settings(self) -> tuple[str, ...]:
        """The names of the `StepSettings` that it reads."""
        every = tuple(entry.name for entry in fields(StepSettings))
        if self.members or self.fixed:  # they have their own, or none
            return ()
        if self.function is not None:
            named = signature(self.function).parameters.values()
            if any(parameter.kind is parameter.VAR_KEYWORD for parameter in named):
                return every
            return tuple(name for name in every if name in {p.name for p in named})
        reads = {
            "steps": self.iterative,
            "step_size": self.iterative and not self.swaps,
            "decay": self.momentum,
            "restarts": self.adaptive and not self.sparse,
            "rounds": self.adaptive and self.minimal,
            "first_epsilon": self.adaptive and self.minimal,
            "queries": self.search,
            "exact_tokens": self.sparse,
            "candidates": self.swaps in (FIRST_ORDER, SAMPLED),
        }
        return tuple(name for name in every if reads.get(name, True))

    @property
    def noise(self) -> bool:
        """Whether the attack is only a random draw."""
        return self.start is not None and not self.gradient

    @property
    def control(self) -> bool:
        """Whether it is a control that attacks are compared with, and not an attack."""
        harms = self.gradient or self.search or self.fixed == KEPT or self.of_tokens
        return self.reverse or not harms

    @property
    def of_tokens(self) -> bool:
        """Whether it chooses tokens, so its results are about tokens of each question."""
        return self.sparse or bool(self.swaps)

    @property
    def bounded(self) -> bool:
        """Whether it counts for the worst case: it tries to do harm in a ball of one amplitude.

        Clean answers, `reversed`, noise that may leave the ball, and searches for the smallest
        amplitude do not count. A battery does not count either, because it is a worst case itself.
        Attacks that choose tokens do not count: they stop at the first wrong answer, or leave the
        ball.
        """
        moves = self.gradient or self.search or self.start is not None
        others = self.reverse or self.minimal or self.members or self.of_tokens
        return moves and self.projected and not others

    @property
    def stepwise(self) -> bool:
        """Whether it raises the loss in several steps, so it should not be weaker than one step."""
        follows = self.gradient and self.iterative and not self.minimal and self.function is None
        follows = follows and not self.of_tokens
        return follows and (self.adaptive or not self.targeted)

    @property
    def reads_values(self) -> bool:
        """Whether it reads the loss of each example, and not only the gradient of their sum."""
        return self.adaptive or self.search or self.function is not None

    @property
    def closures(self) -> tuple[str, ...]:
        """The names of the losses that `perturb` needs (fields of `Losses`)."""
        if self.targeted:
            return ("target_losses", "loss") if self.adaptive else ("target_loss",)
        return ("loss",) if self.gradient or self.search else ()

    def uses(self, setting: str) -> bool:
        """Whether the attack depends on a setting, if that is one of `StepSettings`."""
        every = (entry.name for entry in fields(StepSettings))
        return setting in self.settings or setting not in every


ATTACKS: dict[str, Kind] = {
    "none": Kind(),
    "random": Kind(start="on_sphere"),
    "uniform": Kind(start="in_ball"),
    "gaussian": Kind(start="gaussian", projected=False),
    "fgsm": Kind(gradient=True),
    "ost": Kind(gradient=True, targeted=True),
    "bim": Kind(gradient=True, iterative=True),
    "illc": Kind(gradient=True, iterative=True, targeted=True),
    "pgd": Kind(gradient=True, iterative=True, start="in_ball"),
    "mifgsm": Kind(gradient=True, iterative=True, momentum=True),
    "apgd": Kind(gradient=True, iterative=True, adaptive=True),
    "apgdt": Kind(gradient=True, iterative=True, adaptive=True, targeted=True),
    "blocks": Kind(search=True),
    "fmn": Kind(gradient=True, iterative=True, minimal=True),
    "critical": Kind(gradient=True, iterative=True, adaptive=True, minimal=True),
    "reversed": Kind(gradient=True, reverse=True),
}

BATTERIES: dict[str, Kind] = {
    "standard-1": Kind(
        gradient=True,
        targeted=True,
        adaptive=True,
        search=True,
        members=(
            ("apgdt", {"steps": 16, "step_size": None, "restarts": 1}),
            ("fmn", {"steps": 50, "step_size": None}),
            ("blocks", {"queries": 100}),
        ),
    ),
}
"""Attacks in a fixed order. Each tries only the examples that earlier ones left right.

A version is never changed. Other numbers make another version.
"""

ROUNDINGS: dict[str, Kind] = {
    f"{name}_rounding".removeprefix("actual_"): replace(
        ATTACKS[inside], inside=inside, tied=name.startswith("tied")
    )
    for name, inside in (
        ("actual", "none"),
        ("random", "random"),
        ("fgsm", "fgsm"),
        ("worst", "apgd"),
        ("tied", "bim"),
        ("tied_random", "random"),
    )
}
"""Attacks that stay in the rounding cells of a format instead of a ball."""


SPARSE: dict[str, Kind] = {
    "token_sparse": Kind(gradient=True, iterative=True, adaptive=True, sparse=True),
}
"""Attacks on as few tokens as possible, each within epsilon."""

EVERY, FIRST_ORDER, SAMPLED = "every", "first_order", "sampled"

SWAPS: dict[str, Kind] = {
    "swap": Kind(swaps=EVERY),
    "hotflip": Kind(gradient=True, swaps=FIRST_ORDER),
    "gcg": Kind(gradient=True, iterative=True, swaps=SAMPLED),
}
"""Attacks that put other tokens in place of tokens of the prompt. They have no epsilon."""

OF_TOKENS = {**SPARSE, **SWAPS}
"""Attacks that choose tokens."""

KEPT, SHUFFLED, RANDOM = "kept", "shuffled", "random"

FIXED: dict[str, Kind] = {
    "fixed": Kind(fixed=KEPT),
    "fixed-shuffled": Kind(fixed=SHUFFLED),
    "fixed-random": Kind(fixed=RANDOM),
}
"""A perturbation that was found before, such as a universal one, and two controls.

With the controls, each coordinate keeps its size. It gets the sign of another coordinate of the
token, or a random one. `perturb` does not know these: the caller adds the perturbation.
"""


def kind_of(name: str) -> Kind | None:
    """The traits of an attack of any of the tables; None: unknown."""
    tables = (ATTACKS, BATTERIES, FIXED, ROUNDINGS, SPARSE, SWAPS)
    return next((table[name] for table in tables if name in table), None)


def register_attack(function: Callable[..., Any], name: str | None = None) -> str:
    """Registers a user's own attack under a name.

    The name `package.module:function` needs no registration.

    Args:
        function: `(x, loss, ball, keys, **settings) -> point`. `x` is the clean point. `loss` is
            the `Objective` to raise. `ball` is the `Ball` to stay in. `keys` are the seeds of
            random draws (`attacks.uniform`, `attacks.signs`). The function gets the settings of
            `StepSettings` that its signature names, with `step_size` in the units of the point.
            The point that it returns is projected on the ball.
        name: name of the attack; `package.module:function` by default.

    Returns:
        The name.

    Raises:
        ValueError: another attack has that name, or the function has other parameters.
    """
    name = name_of(function) if name is None else name
    check_name("name", name)
    known = ATTACKS.get(name)
    if known is not None and known.function is not function:
        raise ValueError(f"name={name}: must be a name that no attack has")
    if known is None:  # the source at the time of registration
        source = source_hash(function)
        kind = Kind(gradient=True, iterative=True, function=function, source=source)
        try:
            signature(function).bind(*[None] * 4, **dict.fromkeys(kind.settings))
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"attack={name}: must take x, loss, ball, keys and settings of attacks, such as"
                f" steps ({error})"
            ) from error
        ATTACKS[name] = kind
    return name


def known_attack(name: Any) -> bool:
    """Whether an attack has this name. A user's own attack is imported.

    Raises:
        UsageError: the name has the form `package.module:function`, and it cannot be imported.
    """
    return is_known("attack", name, ATTACKS, register_attack)


ITERATIVE = ", ".join(name for name, kind in ATTACKS.items() if kind.iterative)
NOISE = tuple(name for name, kind in ATTACKS.items() if kind.noise)
BOUNDED_NOISE = tuple(name for name in NOISE if ATTACKS[name].bounded)
"""Noise of one amplitude that attacks of this amplitude are compared with; the best first."""

LENGTH_OF_ONES: dict[str, Callable[[int], float]] = {
    "linf": lambda n: 1.0,
    "l2": lambda n: n**0.5,
}
"""The length of a vector of n ones in each norm. It has the same keys as `norms.NORMS`."""

FIRST_STEP = 2.0
"""Length of the first step of Auto-PGD, in units of epsilon (Croce and Hein 2020)."""

_EPSILON = SettingSpec("radius of the ball", float, minimum=0.0)


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The settings of an attack's steps. Every command and every model accepts them."""

    steps: int = setting(
        10, f"Number of steps of the iterative attacks ({ITERATIVE})", minimum=1, group="attack"
    )
    step_size: float | None = setting(
        None,
        "Length of a step of the iterative attacks, in the unit of epsilon. The default is a"
        " quarter of epsilon. For apgd, apgdt and critical it is the first step; the default is"
        " twice epsilon. For fmn it is the L2 length of the first step; by default the step"
        " reaches a corner of the ball",
        minimum=0.0,
        exclusive_minimum=True,
        group="attack",
    )
    decay: float = setting(1.0, "Decay of the momentum of mifgsm", minimum=0.0, group="attack")
    restarts: int = setting(
        1,
        "Number of times that apgd, apgdt and critical start. The first start is the clean point,"
        " and the others are random points of the ball. The best result counts",
        minimum=1,
        group="attack",
    )
    rounds: int = setting(
        12,
        "Number of amplitudes at which critical tries apgd to find the smallest",
        minimum=1,
        group="attack",
    )
    first_epsilon: float | None = setting(
        None,
        "Second amplitude that critical tries, after epsilon, in the unit of epsilon. The default"
        " is a sixteenth of epsilon",
        minimum=0.0,
        exclusive_minimum=True,
        group="attack",
    )
    queries: int = setting(
        100,
        "Number of points that blocks tries; each costs a forward pass",
        minimum=1,
        group="attack",
    )
    exact_tokens: int = setting(
        0,
        "token_sparse also tries all sets of up to this many tokens. For short prompts",
        minimum=0,
        group="attack",
    )
    candidates: int = setting(
        64,
        "Number of swaps of a token that hotflip tries, and that gcg draws at each step; each costs"
        " a forward pass",
        minimum=1,
        group="attack",
    )


@dataclass(frozen=True)
class Attack(StepSettings):
    """One attack with its settings.

    Args:
        name: a key of `ATTACKS`, `BATTERIES` or `FIXED`. `random`, `uniform` and `gaussian` are
            noise. `fgsm` is from Goodfellow et al. 2015. `bim`, `illc` and `ost` (one step towards
            the least likely class) are from Kurakin et al. 2017. `pgd` is from Madry et al. 2018.
            `mifgsm` is from Dong et al. 2018. `apgd` and `apgdt` are from Croce and Hein 2020.
            `blocks` follows Andriushchenko et al. 2020. `fmn` is from Pintor et al. 2021.
            `critical` is `apgd` at several epsilons. `reversed` is `fgsm` with the opposite sign, a
            control that has to lower the loss. `standard-1` is the battery of that version. The
            keys of `ROUNDINGS` stay in the cells of a format. `token_sparse` is a key of `SPARSE`.
            `swap`, `hotflip` (Ebrahimi et al. 2018) and `gcg` (Zou et al. 2023) swap tokens; for
            them, epsilon is the number of tokens.
        epsilon: radius of the ball round the clean point, in the units of the point; finite, >= 0.
            For `fmn` and `critical`, the largest radius.
        steps: number of steps of the iterative attacks; >= 1.
        step_size: length of a step of the iterative attacks, in the units of the point; None means
            epsilon / 4. For `apgd`, `apgdt` and `critical` it is the first step, and None means
            2 epsilon. For `fmn` it is the L2 length of the first step, and with None this step
            reaches a corner of the ball.
        decay: decay of the momentum of `mifgsm`; finite, >= 0.
        restarts: number of starts of `apgd`, `apgdt` and `critical`; >= 1.
        rounds: number of epsilons that `critical` tries; >= 1.
        first_epsilon: the second epsilon that `critical` tries, in the units of the point; None
            means epsilon / 16.
        queries: number of points that `blocks` tries; >= 1.
        exact_tokens: `token_sparse` tries all sets of up to this many tokens; >= 0.
        candidates: number of swaps that `hotflip` tries, and that `gcg` draws at a step; >= 1.
        norm: norm of the ball, a key of `LENGTH_OF_ONES`; with `l2` a step follows the gradient
            itself.
        by_size: whether all lengths are divided by the square root of the number of the example's
            elements, such as tokens. The noise of NEFTune is scaled so (Jain et al. 2023).
        per_token: whether each entry of the dimensions but the last, such as a token, has its own
            ball. Otherwise one ball holds all entries of an example.
        label: the amplitude in the condition's name; None means epsilon.
        cells: for the keys of `ROUNDINGS`, the name of the format (`attacks.formats`). All lengths
            are in widths of a cell; epsilon 1 is the whole cell.

    Raises:
        UsageError: a value is out of range; the message names it.
    """

    name: str = "fgsm"
    epsilon: float = 0.01
    norm: str = setting("linf", "Norm of the ball", choices=tuple(LENGTH_OF_ONES))
    by_size: bool = False
    per_token: bool = False
    label: str | None = None
    cells: str | None = None

    def __post_init__(self) -> None:
        if not known_attack(self.name) and (
            not isinstance(self.name, str) or kind_of(self.name) is None
        ):
            raise invalid("attack", self.name, {**ATTACKS, **ROUNDINGS, **OF_TOKENS})
        if (self.kind.inside is None) != (self.cells is None):
            raise UsageError(
                f"cells={self.cells}: must be given with one of {', '.join(ROUNDINGS)}, and with no"
                f" other attack, not with attack={self.name}"
            )
        if not _EPSILON.allows(self.epsilon):
            raise invalid("epsilon", self.epsilon, _EPSILON.words())
        check(self)
        first = self.first_epsilon
        if first is not None and "first_epsilon" in self.kind.settings and first > self.epsilon:
            raise invalid("first_epsilon", first, f"at most the largest epsilon, {self.epsilon:g}")

    @property
    def kind(self) -> Kind:
        kind = kind_of(self.name)
        assert kind is not None  # it was checked
        return kind

    @property
    def in_ball(self) -> Attack:
        """The attack that does the same in a ball; itself if it stays in a ball."""
        if self.kind.inside is None:
            return self
        return replace(self, name=self.kind.inside, cells=None)

    @property
    def members(self) -> tuple[Attack, ...]:
        """The attacks of a battery in order; of another attack, itself."""
        own = (replace(self, name=name, **settings) for name, settings in self.kind.members)
        return tuple(own) or (self,)

    @property
    def identity(self) -> bool:
        """Whether the attack returns the clean point for every loss."""
        return self.name == "none" or self.epsilon == 0

    @property
    def step(self) -> float:
        """The length of a step, or of the first one; epsilon for attacks with one step."""
        if not self.kind.iterative:
            return self.epsilon
        usual = FIRST_STEP if self.kind.adaptive else 1 / 4
        return self.epsilon * usual if self.step_size is None else self.step_size

    @property
    def uses_clean_gradient(self) -> bool:
        """Whether the first step needs only the untargeted loss and its gradient at the start."""
        kind = self.kind
        others = kind.targeted or kind.start is not None or (kind.minimal and not kind.adaptive)
        others = others or kind.function is not None or kind.tied
        return kind.gradient and not (others or self.identity)

    @property
    def by_steps(self) -> bool:
        """Whether it makes steps that do not depend on how many follow."""
        kind = self.kind
        others = kind.adaptive or kind.minimal or kind.tied or kind.function is not None
        return kind.gradient and not (others or kind.swaps)

    @property
    def points(self) -> int:
        """The number of points that `trajectory` returns."""
        return self.steps if self.by_steps and self.kind.iterative else 1

    @property
    def keeps_best(self) -> bool:
        """Whether it returns the best of the points that it evaluated."""
        kind = self.kind
        return (kind.adaptive or kind.search or kind.minimal) and not kind.sparse

    @property
    def path(self) -> Attack:
        """The same attack with one step. Attacks with equal `path` take the same steps."""
        goes = self.by_steps and self.kind.iterative
        return replace(self, steps=1, label=None) if goes else self

    @property
    def draws(self) -> bool:
        """Whether the attack uses random draws."""
        kind = self.kind
        started = kind.start is not None or ("restarts" in kind.settings and self.restarts > 1)
        started = started or kind.swaps == SAMPLED or kind.fixed in (SHUFFLED, RANDOM)
        return started or kind.search or kind.function is not None

    @property
    def condition(self) -> str:
        """The condition's name in tables: `fgsm@0.01`, `fgsm@0.7rms`; the clean run is `none`."""
        label = f"{self.epsilon:g}" if self.label is None else self.label
        return condition_name(self.name, label)

    def scaled(self, factor: float) -> Attack:
        """The same attack in other units: multiplies all lengths by `factor`, keeps the label."""
        given = {name: getattr(self, name) for name in ("epsilon", "step_size", "first_epsilon")}
        return replace(self, **{k: v * factor for k, v in given.items() if v is not None})


def condition_name(attack: str, label: str) -> str:
    """The name of a condition. `label` holds the amplitude, and other parts that distinguish it."""
    return attack if attack == "none" else f"{attack}@{label}"


def step_settings(settings: StepSettings) -> dict[str, Any]:
    """Only the values of `StepSettings`."""
    return {entry.name: getattr(settings, entry.name) for entry in fields(StepSettings)}
