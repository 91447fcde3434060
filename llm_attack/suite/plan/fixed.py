"""The settings of perturbations that were found before, and what a plan reads of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_attack.attacks.settings import FIXED
from llm_attack.base.declare import setting
from llm_attack.base.errors import UsageError, invalid
from llm_attack.base.failures import one_line
from llm_attack.base.folder import check_readable
from llm_attack.base.tensors import TensorFile
from llm_attack.lm.fixed import DELTA, FORMAT, SHARES
from llm_attack.lm.units import ABSOLUTE, Epsilon

ALL, FITTING, HELD_OUT = "all", "fitting", "held_out"
HALVES = (ALL, FITTING, HELD_OUT)
_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class FixedSettings:
    """The settings of a perturbation that was found before, and of the questions to ask."""

    perturbation: str | None = setting(
        None,
        "Also add a perturbation that was found before: a file of llm-attack universal, or the"
        " folder of a run with save_perturbations, perhaps of another model. Adds the condition"
        " fixed, and fixed-shuffled and fixed-random, which have the same sizes and other signs",
        allowed="a file of llm-attack universal, or the folder of a run",
        group="attack",
    )
    perturbation_of: str | None = setting(
        None,
        "Condition of that run, such as fgsm@0.01. Needed if the run has several",
        allowed="the name of a condition",
        group="attack",
    )
    half: str | None = setting(
        None,
        "Questions to ask. A hash of the question puts it into the half to which llm-attack"
        " universal fits, or into the half that is held out. Questions from one source are in the"
        " same half. The default is held_out with a universal perturbation, for the tasks to which"
        " it was fitted, and else all. With held_out, tied_rounding fits its table to the other"
        " half",
        choices=HALVES,
        group="task",
    )


OF_FIXED = ("perturbation", "perturbation_of", "half")


@dataclass(frozen=True)
class Perturbation:
    """A perturbation that was found before.

    Attributes:
        path: its file, or the folder of its run.
        source: hash of the file, or of the fingerprint of the run and the condition.
        epsilon: its amplitude, in the units of the point.
        norm: the norm of the amplitude; one of `NORMS`.
        hookpoint: the module at which it was found; None: the input embedding.
        positions, context: the settings of the run; None for a universal perturbation.
        condition: the run's condition; None for a universal perturbation.
        share: one of `SHARES` for a universal perturbation; else None.
        tasks: the tasks to which a universal perturbation was fitted.
        key: the key of its halves.
        model: name of the model at which it was found.
    """

    path: Path
    source: str
    epsilon: Epsilon
    norm: str
    hookpoint: str | None
    model: str
    positions: str | None = None
    context: str | None = None
    condition: str | None = None
    share: str | None = None
    tasks: tuple[str, ...] = ()
    key: int = 0
    about: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """The perturbation in the form of `run.json`."""
        return {
            **{"model": self.model, "source": self.source, "norm": self.norm},
            "epsilon_absolute": self.epsilon.number,
            **({"condition": self.condition} if self.condition is not None else {}),
            **({"share": self.share, "tasks": [*self.tasks]} if self.share is not None else {}),
            **self.about,
        }


def read(given: str, condition: str | None) -> Perturbation:
    """Reads all that a plan has to know of a perturbation.

    Args:
        given: its file, or the folder of its run.
        condition: the condition of the run.

    Raises:
        UsageError: there is no such perturbation, or it cannot be read.
    """
    path = Path(given)
    check_readable(path, "perturbation")
    if not path.exists():
        allowed = "a file of llm-attack universal, or the folder of a run with save_perturbations"
        raise invalid("perturbation", given, allowed)
    read_one: Callable[[], Perturbation] = lambda: _of_file(path)  # noqa: E731
    if path.is_dir():
        if not (path / "run.json").exists():
            raise UsageError(f"perturbation={given}: has no run.json; must be a finished run")
        read_one = lambda: _of_run(path, condition)  # noqa: E731
    elif condition is not None:
        raise UsageError(
            f"perturbation_of={condition}: must be given together with the folder of a run, not"
            " with a file"
        )
    try:
        return read_one()
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"perturbation={given}: cannot be read ({one_line(error)})") from error


def _of_file(path: Path) -> Perturbation:
    """A universal perturbation."""
    file = TensorFile(path)
    about = file.metadata
    if about.get("format") != FORMAT or DELTA not in file.tensors:
        raise UsageError(f"perturbation={path}: must be a file of llm-attack universal")
    if about["share"] not in SHARES:
        raise invalid("perturbation", f"{path}, share={about['share']}", SHARES)
    with path.open("rb") as content:
        source = hashlib.file_digest(content, "sha256").hexdigest()[:_DIGITS]
    return Perturbation(
        path,
        source,
        Epsilon(float(about["epsilon_absolute"]), ABSOLUTE),
        about["norm"],
        about["hookpoint"] or None,
        about["model"],
        share=about["share"],
        tasks=tuple(json.loads(about["tasks"])),
        key=int(about["key"]),
        about={
            **{name: about[name] for name in ("attack", "amplitude", "loss", "fitted_to")},
            "weights": json.loads(about["fingerprint"])["weights"],
        },
    )


def _of_run(path: Path, condition: str | None) -> Perturbation:
    """The perturbations that a run saved."""
    run = json.loads((path / "run.json").read_text(encoding="utf-8"))
    known = {
        name: info
        for name, info in run["attacks"].items()
        if info["attack"] != "none" and info["epsilon_absolute"] > 0
    }
    if not known:
        raise UsageError(f"perturbation={path}: the run has no attack that perturbs something")
    if condition is None and len(known) > 1:
        raise UsageError(f"perturbation_of=: must name one condition of {path}: {', '.join(known)}")
    name = next(iter(known)) if condition is None else condition
    if name not in known:
        raise invalid("perturbation_of", name, known)
    info = known[name]
    content = json.dumps([run["fingerprint"], name], sort_keys=True).encode()
    return Perturbation(
        path,
        hashlib.sha256(content).hexdigest()[:_DIGITS],
        Epsilon(float(info["epsilon_absolute"]), ABSOLUTE),
        info["norm"],
        info["hookpoint"],
        run.get("model_name", run["model"]),
        positions=info["positions"],
        context=info["context"],
        condition=name,
        about={"weights": run["fingerprint"]["weights"]},
    )


def check_fixed(plan: Any) -> None:
    """Checks the settings of a fixed perturbation in a plan.

    Raises:
        UsageError: a value is not allowed, or not together with other settings.
    """
    named = next((name for name in plan.attacks if name in FIXED), None)
    if named is not None:
        raise UsageError(
            f"attacks={','.join(plan.attacks)}: must be without {named}, which perturbation adds"
        )
    if plan.perturbation is None:
        if plan.perturbation_of is not None:
            raise UsageError(
                f"perturbation_of={plan.perturbation_of}: must be given together with perturbation"
            )
        return
    given = f"perturbation={plan.perturbation}"
    if plan.standard is not None:
        raise UsageError(
            f"{given}: must be left out with attacks={plan.standard.version}, which fixes what is"
            " measured"
        )
    if plan.hookpoints:
        raise UsageError(f"{given}: must not be given with hookpoints, but with one hookpoint")
    found = plan.fixed
    for name, here in (
        ("hookpoint", plan.hookpoint),
        ("positions", plan.positions),
        ("context", "shared" if plan.shared else "own"),
    ):
        there = getattr(found, name)
        if here != there and (there is not None or name == "hookpoint"):
            raise UsageError(f"{name}={here}: must be {there}, as in {plan.perturbation}")


def chosen_half(plan: Any) -> tuple[str, int, tuple[str, ...] | None]:
    """The half of the questions that a plan asks.

    Returns:
        One of `HALVES`, the key of the halves, and the tasks that have them; None: all tasks. Every
        question of another task is held out.
    """
    universal = plan.fixed is not None and plan.fixed.share is not None
    half = plan.half or (HELD_OUT if universal else ALL)
    return (half, plan.fixed.key, plan.fixed.tasks) if universal else (half, plan.seed, None)
