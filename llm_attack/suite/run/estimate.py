"""`llm-attack run --dry-run`: estimates a run from its batches and a short calibration."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from llm_attack.attacks import Attack
from llm_attack.base.errors import UsageError, invalid
from llm_attack.harness.generation import Prompts
from llm_attack.harness.requests import by_question
from llm_attack.harness.texts import NatsPerByte
from llm_attack.lm.engine.attacked import AttackedBatch
from llm_attack.lm.engine.clean import Needs, clean_pass, usable_twins
from llm_attack.lm.engine.engine import Engine
from llm_attack.lm.engine.scoring import Scorer
from llm_attack.lm.engine.tokens import sizes_of
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.packing.batches import Batch
from llm_attack.lm.packing.pack import Pack
from llm_attack.lm.packing.questions import Request
from llm_attack.stats import ALPHA, POWER, planned
from llm_attack.suite.plan import Plan
from llm_attack.suite.run.cost import Passes, Sizes, Tokens, fits, passes
from llm_attack.suite.run.cost_of_texts import as_read, seconds_of_step
from llm_attack.suite.run.execute import Prepared, Processes, prepare
from llm_attack.suite.run.perturbations import Saved, amount
from llm_attack.suite.run.progress import MODES

_LIVE = 4  # number of activations of a block's largest width that exist at once, besides kept ones
SECONDS = 2.0  # duration of the calibration
DISCORDANCE = (0.1, 0.3)  # assumed shares of the questions that change their answer under an attack


@dataclass
class Counts:
    """Counts over all batches, made before any batch is computed.

    Attributes:
        questions, requests: their numbers.
        tokens_asked: tokens of all requests, each counted by itself.
        tokens_packed: tokens of the batches, padding included.
        gradients, forwards: FLOP of passes with and without a backward pass.
        largest: tokens of the largest batch.
        positions: the most positions that are read in one batch.
        steps: largest number of generation steps. Each is a forward pass of one token.
        prefix: prefix of the last batch.
    """

    questions: int = 0
    requests: int = 0
    tokens_asked: int = 0
    tokens_packed: int = 0
    gradients: int = 0
    forwards: int = 0
    largest: int = 0
    positions: int = 0
    steps: int = 0
    prefix: tuple[int, ...] = ()

    @property
    def flop(self) -> int:
        """The FLOP of all passes."""
        return self.gradients + self.forwards

    def add(self, pack: Pack, sizes: Sizes, todo: Passes, once: bool = False) -> None:
        """Counts a batch. For `once`, see `Sizes.gradient`; it concerns the first gradient."""
        scored, watched = len(pack.scored.positions), len(pack.watched.positions)
        if pack.prefix != self.prefix:
            self.prefix = pack.prefix
            self.tokens_packed += len(pack.prefix)
            self.forwards += sizes.prefix(pack)
        self.tokens_packed += pack.inputs.tokens.numel()
        self.tokens_asked += sum(len(r.inputs) * len(a) for r, a in _answered(pack))
        others = todo.gradients - todo.first
        self.gradients += others * sizes.gradient(pack, watched)
        self.gradients += todo.first * sizes.gradient(pack, watched, once)
        self.forwards += todo.losses * sizes.forward(pack, watched)
        self.forwards += (todo.answers + todo.clean) * sizes.forward(pack, scored)
        self.largest = max(self.largest, pack.space)
        self.positions = max(self.positions, watched if todo.gradients else scored)


@dataclass
class Rates:
    """The speed of the device, measured on some of the batches.

    Attributes:
        gradient, forward: seconds per FLOP of passes with and without a backward pass; 0 if there
            are none.
        step: seconds per step of generation.
        kept: bytes per token that are kept for the backward pass, logits included.
        seconds: duration of the measurement.
    """

    gradient: float = 0.0
    forward: float = 0.0
    kept: float = 0.0
    seconds: float = 0.0
    step: float = 0.0


@dataclass
class Estimate:
    """The estimate of a run.

    Attributes:
        counts: counts over the batches.
        rates: speed of the device.
        seconds: computing time, without loading the model and without tables and figures.
        weights: bytes of parameters and buffers.
        activations: bytes of activations of the largest batch.
        battery: whether the run has a battery, or attacks that choose tokens. Then `seconds` is an
            upper bound.
        copied: (dtype, bytes) of the copy of the weights that computes gradients; None if there is
            none.
        sizes: number of questions of each task.
        saved: a sentence about saved perturbations; empty if none are saved.
        passes: the passes of each batch through the model.
        dequantised: format of the quantised weights that full-precision weights replace, or empty.
    """

    counts: Counts
    rates: Rates
    weights: int
    activations: int
    copied: tuple[str, int] | None = None
    sizes: tuple[int, ...] = ()
    saved: str = ""
    seconds: float = field(init=False)
    battery: bool = False
    passes: Passes = field(default_factory=Passes)
    dequantised: str = ""

    def __post_init__(self) -> None:
        counts, rates = self.counts, self.rates
        self.seconds = counts.gradients * rates.gradient + counts.forwards * rates.forward
        self.seconds += counts.steps * rates.step

    def lines(self) -> dict[str, str]:
        """The estimate as labels and texts."""
        n, rates = self.counts, self.rates
        share = n.tokens_packed / max(1, n.tokens_asked)
        passes = self.seconds - n.steps * rates.step
        rate = n.flop / passes if passes else 0.0
        steps = f" and {rates.step:.2g} s for a step of generation" if n.steps else ""
        name, copied = self.copied or ("", 0)
        copy = f", dequantised from {self.dequantised}" if self.dequantised else ""
        copy += f" and {amount(copied)} for a copy of them in {name}" if copied else ""
        return {
            "questions": f"{n.questions:,}",
            "requests": f"{n.requests:,}",
            "tokens": f"{n.tokens_asked:,}",
            "tokens packed, with padding": f"{n.tokens_packed:,} ({share:.0%})",
            "FLOP": f"{n.flop:.3g} ({n.gradients / max(1, n.flop):.0%} of them with gradients)",
            "passes": f"{self.passes.forwards} forward, {self.passes.gradients} backward for each"
            " question" + ", at most" * self.battery,
            **({"steps of generation": f"{n.steps:,} at most"} if n.steps else {}),
            "time": f"{timedelta(seconds=round(self.seconds))} ({self.seconds:.3g} s) at"
            f" {rate:.3g} FLOP/s{steps}, measured for {rates.seconds:.1f} s"
            + ", at most: attacks leave out questions that are wrong already"
            * self.battery,
            "memory": f"{amount(self.weights + copied + self.activations)}: weights"
            f" {amount(self.weights)}{copy}, activations of the largest batch about"
            f" {amount(self.activations)}",
            **({"disk": self.saved} if self.saved else {}),
            **({"smallest drop it shows": _shows(self.sizes)} if self.sizes else {}),
        }


def dry_run(plan: Plan, progress: str) -> Estimate:
    """Estimates a run and writes nothing.

    Raises:
        UsageError: an argument is not allowed, or there are several processes.
    """
    if progress not in MODES:
        raise invalid("progress", progress, MODES)
    if Processes.of(plan).world > 1 or "tp_plan" in plan.model_args:
        raise UsageError("dry_run=True: needs one process, without shard and tp_plan")
    return estimate(prepare(plan, progress, Console(stderr=True)))


def estimate(prepared: Prepared, seconds: float = SECONDS) -> Estimate:
    """Estimates a prepared run from a calibration of about this number of seconds."""
    lm = prepared.lm
    engine, model = lm.engine, lm.model
    sizes = Sizes.of(model, lm.engine_settings.gradient_checkpointing)
    generated = [work.batch for work in prepared.work if isinstance(work.batch, Prompts)]
    answered = [work.batch for work in prepared.work if isinstance(work.batch, Batch)]
    fit, apart = fits(engine.attacks), prepared.fit_to.apart
    more = Passes() if apart else fit
    saved = Saved.of(prepared.plan, lm, prepared.work)
    if saved is not None:
        moved, points = len(saved.of_conditions), prepared.plan.path_points
        more = more.plus(Passes(gradients=moved * points, losses=2 * moved))
    if prepared.plan.smoothing is not None:
        noise = prepared.plan.smoothing
        more = more.plus(Passes(answers=noise.total * len(noise.sigmas)))
    todo = _todo(engine, answered, answered).plus(more)
    counts = Counts(len(by_question(prepared.requests)), len(prepared.requests))
    for batch in answered:
        of_batch = _todo(engine, answered, [batch]).plus(more)
        counts.add(engine.pack(batch), sizes, of_batch, engine.scorer.takes_twins)
    for batch in prepared.fit_to.batches[: None if apart else 0]:
        counts.add(engine.pack(batch), sizes, fit)
    conditions = len(engine.attacks)
    for prompts in generated:  # every condition reads the prompts again
        counts.add(engine.pack(as_read(prompts)), sizes, todo._replace(answers=conditions, clean=0))
        counts.steps += prompts.most * conditions
    batches = [*answered, *map(as_read, generated)]
    order = random.Random(0).sample(range(len(batches)), len(batches))
    calibration = Calibration(engine, sizes, bool(todo.gradients + fit.gradients))
    with frozen(model):
        calibration.measure(engine.pack(batches[order[0]]))
        calibration = Calibration(
            engine, sizes, bool(todo.gradients + fit.gradients)
        )  # the first warmed up
        for i in order:
            calibration.measure(engine.pack(batches[i]))
            if calibration.seconds > seconds:
                break
    rates = calibration.rates()
    if generated:
        rates.step = seconds_of_step(lm, generated[len(generated) // 2])
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    itemsize = model.dtype.itemsize
    logits = counts.positions * sizes.vocabulary * itemsize
    passing = _LIVE * counts.largest * sizes.widest * itemsize
    kept = round(rates.kept * counts.largest)
    copied = (str(lm.engine_settings.gradient_dtype), lm.copy_bytes) if lm.copy_bytes else None
    weights = sum(tensors.values())
    asked = Counter(prepared.requests[n[0]].task_name for n in by_question(prepared.requests))
    counted = not any(isinstance(score, NatsPerByte) for score in prepared.scores.values())
    compares = counted and {"none"} < {attack.name for attack in engine.attacks}
    n = tuple(asked.values()) if compares else ()
    activations = kept + passing + logits
    said = "" if saved is None else saved.words()
    battery = any(a.kind.members or a.kind.of_tokens for a in engine.attacks)
    found = counts, rates, weights, activations, copied, n, said
    todo = todo.plus(fit) if apart else todo
    return Estimate(*found, battery=battery, passes=todo, dequantised=lm.dequantised)


def _todo(engine: Engine, every: Sequence[Batch], some: Sequence[Batch]) -> Passes:
    """The passes of some batches of a run. They depend on lengths if attacks choose tokens.

    Args:
        engine: the engine with the conditions.
        every: all batches of the run with requests to score.
        some: the batches to count for.
    """
    others = max((len(q.gold) - 1 for b in every for q in b.questions), default=0)
    places = list(dict.fromkeys(engine.scorers))
    pairs = zip(engine.attacks, engine.scorers, strict=True)
    first, tokens = [attack for attack, scorer in pairs if scorer is places[0]], Tokens()
    if some and any(attack.kind.of_tokens for attack in first):
        questions, known = [q for batch in some for q in batch.questions], places[0].vocabulary
        n = 0 if known is None else len(known.allowed)
        tokens = Tokens(*sizes_of(questions, engine.threat.positions), n)
    apart, n_places = bool(engine.slopes), len(places)
    return passes(first, others, apart=apart, hookpoints=n_places, tokens=tokens)


class Calibration:
    """Times batches, each once with a gradient and once with noise.

    Args:
        engine: the engine with the conditions.
        sizes: the sizes of its model.
        gradients: whether to time gradients.
    """

    def __init__(self, engine: Engine, sizes: Sizes, gradients: bool) -> None:
        self.engine, self.sizes, self.gradients = engine, sizes, gradients
        self.flop, self.spent = [0, 0], [0.0, 0.0]
        self.bytes = self.tokens = 0

    @property
    def seconds(self) -> float:
        """Seconds spent so far."""
        return sum(self.spent)

    def measure(self, pack: Pack) -> None:
        """Runs and times a batch."""
        attack = self.engine.attacks[-1]
        noise = Attack("random", attack.epsilon, norm=attack.norm)
        engine, scorer = self.engine, self.engine.scorers[-1]
        pack = pack.to(engine.device)
        watched, scored = len(pack.watched.positions), len(pack.scored.positions)
        if self.gradients:
            follows = engine.slopes.get(scorer, scorer)
            once = usable_twins(follows, pack, engine.threat) is not None
            both = self.sizes.gradient(pack, watched, once)
            needs = Needs(gradient=True)
            self.leaves: set[int] = set()
            with saved_tensors_hooks(self._keep, lambda tensor: tensor):
                self._timed(0, lambda: _slope(follows, pack, engine.threat, needs).sum(), both)
            self.tokens += pack.space

        def forward() -> Tensor:
            clean = clean_pass(scorer, pack, engine.threat, Needs(point=not attack.identity))
            attacked = AttackedBatch(scorer, pack, engine.threat, clean)
            x = None if attack.identity else attacked.attack(noise).x
            return attacked.answers(x).log_prob.sum()

        self._timed(1, forward, self.sizes.forward(pack, scored))

    def _timed(self, kind: int, run: Callable[[], Tensor], flop: int) -> None:
        start = time.perf_counter()
        run().item()  # waits for the device
        self.spent[kind] += time.perf_counter() - start
        self.flop[kind] += flop

    def _keep(self, tensor: Tensor) -> Tensor:
        whole = tensor if tensor._base is None else tensor._base
        place = tensor.data_ptr()
        if isinstance(whole, nn.Parameter) or place in self.leaves:
            return tensor
        if tensor.is_leaf:
            self.leaves.add(place)  # blocks share the angles of rotary embeddings
        self.bytes += tensor.nbytes
        return tensor

    def rates(self) -> Rates:
        """The measured speed."""
        gradient, forward = (
            s / f if f else 0.0 for s, f in zip(self.spent, self.flop, strict=True)
        )
        return Rates(gradient, forward, self.bytes / max(1, self.tokens), self.seconds)


def _slope(scorer: Scorer, pack: Pack, threat: ThreatModel, needs: Needs) -> Tensor:
    gradient = clean_pass(scorer, pack, threat, needs).gradient
    assert gradient is not None
    return gradient


def show(estimated: Estimate, name: str) -> Table:
    """The estimate as a table."""
    table = Table(title=f"{name}: time and memory that the run would need", show_header=False)
    for label, value in estimated.lines().items():
        table.add_row(label, value)
    return table


def _answered(pack: Pack) -> Iterator[tuple[Request, list[int]]]:
    """The requests of a pack, each with the numbers of the run's requests that it answers."""
    for question in pack.questions:
        yield from zip(question.requests, question.answers, strict=True)


def _shows(sizes: Sequence[int]) -> str:
    """The smallest drop of the mean that these numbers of questions show, per `DISCORDANCE`."""
    said = {}
    for share in DISCORDANCE:
        drop = planned(sizes, share)
        if drop >= 1:
            return "none: so few questions show no drop"
        assumed = f"{share:.0%} of the questions change their answer"
        said[assumed if drop <= share else "no question changes for the better"] = drop
    cases = [f"{100 * drop:.1f} points if {assumed}" for assumed, drop in said.items()]
    mean = f"mean over {len(sizes)} tasks, " if len(sizes) > 1 else ""
    return f"{', '.join(cases)} (assumed; {mean}power {POWER:g} at level {ALPHA:g})"
