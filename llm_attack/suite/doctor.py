"""The command `llm-attack doctor`: a small run that looks for hidden gradients."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from llm_attack.base.errors import UsageError, invalid
from llm_attack.base.failures import one_line
from llm_attack.harness.patches import without_bars
from llm_attack.lm.engine.attacked import AttackedBatch
from llm_attack.lm.engine.clean import Needs, clean_pass
from llm_attack.lm.engine.diagnostics import LEAST_REACHED
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.packing.batches import Batch
from llm_attack.lm.units import Epsilon
from llm_attack.suite.analysis.worst import knows_gold
from llm_attack.suite.evaluate import silence
from llm_attack.suite.plan import Plan
from llm_attack.suite.results import Result
from llm_attack.suite.run.execute import Prepared, Processes, execute, prepare
from llm_attack.suite.run.progress import MODES
from llm_attack.suite.studies import sanity
from llm_attack.suite.studies.sanity import FAILS, PASSES, Check

# Amplitudes in units of the RMS: a small one, a larger one, and one as large as the signal.
LITTLE, MORE, ALL = (Epsilon(number, "rms") for number in (0.02, 0.1, 1.0))
# Every attack at every amplitude would take minutes, most of them for `blocks`.
CONDITIONS = [
    *[("none", LITTLE), ("random", MORE), ("fgsm", MORE), ("blocks", MORE)],
    *[("bim", epsilon) for epsilon in (LITTLE, MORE, ALL)],
]
ATTACKS, EPSILONS = (tuple(dict.fromkeys(column)) for column in zip(*CONDITIONS, strict=True))
_RISING = 0.2  # the check fails if twice the steps reach more than this share beyond the first ones
_STEP = 1e-5  # step of the finite differences, in units of the RMS of the point
_ROUNDING = 1e-3  # relative to the log-likelihoods; bfloat16 rounds less
_WRONG = 0.01  # relative error of a derivative; the smallest weights of the loss choice are cut off
_QUESTIONS = 4  # number of questions whose gradients are compared


def doctor(plan: Plan, progress: str) -> list[Check]:
    """All checks of `sanity.checks`, and checks that need more than samples.

    Args:
        plan: model, tasks, limit and loss; its attacks and epsilons are replaced.
        progress: one of `progress.MODES`.

    Raises:
        UsageError: an argument is not allowed, or the clean model gives no finite numbers.
    """
    if progress not in MODES:
        raise invalid("progress", progress, MODES)
    for name in ("shard", "ray"):
        if getattr(plan, name) is not None:
            raise UsageError(f"{name}={getattr(plan, name)}: must not be given for doctor")
    if isinstance(plan.steps, tuple):
        given = ",".join(map(str, plan.steps))
        raise UsageError(f"steps={given}: must be one number for doctor")
    world = Processes.of(plan).world
    if world > 1:
        raise UsageError(f"WORLD_SIZE={world}: must be 1 or unset for doctor")
    console = Console(stderr=True)
    attacks, epsilons = (tuple(dict.fromkeys(column)) for column in zip(*CONDITIONS, strict=True))
    plan = replace(plan, attacks=attacks, epsilons=epsilons)
    prepared = prepare(plan, progress, console, doctor=True)
    lm, known = prepared.lm, {(c.attack, c.epsilon): c for c in plan.conditions}
    some = [known[pair] for pair in CONDITIONS]
    lm.use(*some)
    own = own_gradient(prepared)
    try:
        result = _carried_out(prepared, progress, console)
    except RuntimeError as error:
        if own.verdict != FAILS:
            raise
        what = sanity.not_applicable(
            "attacks find what they should", f"they fail ({one_line(error)})"
        )
        return [nothing_changes(prepared), what, own]
    listed = sanity.checks(result.samples, result.run)
    lm.use(*(replace(c, steps=2 * c.steps) for c in some if c.attack in ("none", "bim")))
    longer = _carried_out(prepared, progress, console)
    listed.append(still_rising(result.samples, longer.samples, knows_gold(result.run)))
    moved = perturbed(result.run["attacks"])
    return [nothing_changes(prepared), moved, *listed, own, finite_differences(prepared)]


def _carried_out(prepared: Prepared, progress: str, console: Console) -> Result:
    with tempfile.TemporaryDirectory() as nowhere:
        result = execute(prepared, Path(nowhere), progress, console)
    assert result is not None  # None is for other processes, and there is only one
    return result


def still_rising(samples: pd.DataFrame, longer: pd.DataFrame, knows: bool) -> Check:
    """Whether twice as many steps of BIM find much more than the steps of the run.

    If the loss knows the gold, margins below 0 count as 0, because a wrong answer need not get
    worse.

    Args:
        samples: the samples of the run.
        longer: the samples of a run with twice as many steps.
        knows: whether the loss knows the gold.
    """
    name, clean = "the loss no longer rises at the last step", samples["condition"] == "none"
    least = _ROUNDING * samples.loc[clean, "log_likelihoods"].map(np.mean).abs().mean()
    rising: list[tuple[float, str, float]] = []
    for condition in longer.loc[longer["attack"] == "bim", "condition"].unique():
        outcomes = (
            sanity.outcome(rows[rows["condition"] == which], knows)
            for rows, which in ((samples, "none"), (samples, condition), (longer, condition))
        )
        start, short, long = (
            (values.clip(lower=0) if knows else values).mean() for values in outcomes
        )
        reached, more = start - short, short - long
        if max(reached, reached + more) > least:
            share = more / reached if reached > least else np.inf
            rising.append((share, str(condition), more))
    if not rising:
        return sanity.not_applicable(
            name, f"no attack lowers the outcome by more than {least:.2g} nats"
        )
    share, condition, more = max(rising)
    figure = f"twice the steps add {share:.1%} of what {condition} reached"
    if np.isinf(share):
        figure = f"{condition} had no effect; with twice the steps it reached {more:.2g} nats"
    return Check(name, PASSES if share <= _RISING else FAILS, figure)


def nothing_changes(prepared: Prepared) -> Check:
    """Whether the clean point, put in place as attacks do, gives the clean answers."""
    engine, name = prepared.lm.engine, "epsilon 0 equals clean"
    with frozen(prepared.lm.model):
        batch = prepared.work[0].batch
        assert isinstance(batch, Batch)
        pack = engine.pack(batch).to(engine.device)
        point = clean_pass(engine.scorer, pack, engine.threat, Needs())
        attacked = AttackedBatch(engine.scorer, pack, engine.threat, point)
        clean, at_0 = (attacked.answers(x).log_prob.double() for x in (None, attacked.x))
    share = float((at_0 - clean).abs().mean() / clean.abs().mean())
    verdict = PASSES if share <= _ROUNDING else FAILS
    return Check(name, verdict, f"log-probabilities change by {share:.2g} of their size")


def perturbed(attacks: Mapping[str, Any]) -> Check:
    """Whether attacks moved the points as far as their amplitude says.

    Args:
        attacks: the entry `attacks` of `run.json`.
    """
    name = "attacks perturb as much as they are asked to"
    asked = {
        k: info for k, info in attacks.items() if info["attack"] != "none" and info["epsilon"] > 0
    }
    shares = {
        condition: min(1 - (info["not_perturbed"] or 0), info["amplitude_reached"] or 1)
        if info["epsilon_absolute"] > 0
        else 0.0
        for condition, info in asked.items()
    }
    condition = min(shares, key=lambda name: shares[name])
    verdict = PASSES if shares[condition] >= LEAST_REACHED else FAILS
    return Check(name, verdict, f"{shares[condition]:.0%} of the amplitude under {condition}")


def own_gradient(prepared: Prepared) -> Check:
    """Repeats the gradient check of a run (`lm.engine.gradient`) with its own kernels."""
    name, finding = "the gradient is that of the model as it runs", prepared.lm.gradient()
    if finding is None:
        return sanity.not_applicable(name, "no condition follows a gradient")
    wrong = finding.fault or finding.warning
    return Check(name, FAILS if wrong else PASSES, wrong or finding.figure)


def finite_differences(prepared: Prepared) -> Check:
    """Compares the gradient's slope along its own sign with central differences, in float64."""
    name, lm = "the gradient is that of the loss", prepared.lm
    if lm.device.type == "mps":
        return sanity.not_applicable(name, "the device has no float64")
    if getattr(lm.model.config, "quantization_config", None) is not None:
        return sanity.not_applicable(name, "quantised weights do not compute in float64")
    before = lm.model.dtype
    try:
        lm.model.double()
        lm.use(*lm.conditions)
        claimed, measured, step = _slopes(prepared)
    except Exception as error:  # kernels may not support float64, or memory may be short
        return sanity.not_applicable(name, f"float64 fails here ({one_line(error)})")
    finally:
        lm.model.to(before)
    if step == 0:
        return sanity.not_applicable(name, "nothing is perturbed, or the point is all zero")
    share = abs(measured - claimed) / max(abs(measured), abs(claimed), sys.float_info.min)
    figure = f"slope {measured:.6g} by finite differences, {claimed:.6g} by the gradient"
    return Check(name, PASSES if share <= _WRONG else FAILS, figure)


def _slopes(prepared: Prepared) -> tuple[float, float, float]:
    """Slopes by the gradient and by central differences, and the step; zeros if nothing moves."""
    lm, batch = prepared.lm, prepared.work[0].batch
    engine = lm.engine
    assert isinstance(batch, Batch)
    pack = engine.pack(replace(batch, questions=batch.questions[:_QUESTIONS])).to(lm.device)
    with frozen(lm.model):
        clean = clean_pass(engine.scorer, pack, engine.threat, Needs(gradient=True))
        attacked = AttackedBatch(engine.scorer, pack, engine.threat, clean)
        gradient = clean.gradient
        assert gradient is not None
        if attacked.mask is not None:
            gradient = gradient * attacked.mask[..., None]
            if not attacked.mask.any():
                return 0.0, 0.0, 0.0
        step = _STEP * attacked.x.square().mean().sqrt()
        with torch.no_grad():
            ends = [attacked.loss(attacked.x + s * gradient.sign()) for s in (step, -step)]
    measured = (ends[0] - ends[1]).sum() / (2 * step)
    return float(gradient.abs().sum()), float(measured), float(step)


def command(plan: Plan, progress: str, verbose: int = 0) -> int:
    """Prints the checks and returns the exit code, which is 1 if a check fails."""
    silence(verbose)
    with without_bars():
        checks = doctor(plan, progress)
    console = Console()
    plain: dict[str, Any] = {"markup": False, "soft_wrap": True, "highlight": False}
    console.print(f"{plan.model_name}: {sanity.TITLE}", **plain)
    for check in checks:
        console.print(f"  {check.verdict}: {check.name}; {check.figure}", **plain)
    failed = sum(check.verdict == FAILS for check in checks)
    console.print(f"{failed} of {len(checks)} checks fail")
    return int(failed > 0)
