"""`llm-attack run --dry-run`: what a run would take, from its batches and a short calibration."""

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
from llm_attack.harness.requests import by_question
from llm_attack.lm.engine.attacked import AttackedBatch
from llm_attack.lm.engine.clean import Needs, clean_pass, usable_twins
from llm_attack.lm.engine.engine import Engine
from llm_attack.lm.engine.scoring import Scorer
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.packing.pack import Pack
from llm_attack.lm.packing.questions import Request
from llm_attack.stats import ALPHA, POWER, planned
from llm_attack.suite.plan import Plan
from llm_attack.suite.run.cost import Passes, Sizes, passes
from llm_attack.suite.run.execute import Prepared, Processes, prepare
from llm_attack.suite.run.progress import MODES

_LIVE = 4  # activations of a block's greatest width that exist at once, besides those kept
SECONDS = 2.0  # of calibration
DISCORDANCE = (0.1, 0.3)  # shares of the questions that may change their answer under an attack


@dataclass
class Counts:
    """What is counted of the batches, before any of them is computed.

    Attributes:
        questions, requests: asked.
        tokens_asked: that requests have, each by itself.
        tokens_packed: of the batches, padding included.
        gradients, forwards: FLOP of passes with a backward, and of those without.
        largest: tokens of the largest batch.
        positions: looked at in the batch that has the most.
        prefix: of the last batch.
    """

    questions: int = 0
    requests: int = 0
    tokens_asked: int = 0
    tokens_packed: int = 0
    gradients: int = 0
    forwards: int = 0
    largest: int = 0
    positions: int = 0
    prefix: tuple[int, ...] = ()

    @property
    def flop(self) -> int:
        """Of all passes."""
        return self.gradients + self.forwards

    def add(self, pack: Pack, sizes: Sizes, todo: Passes, once: bool = False) -> None:
        """Counts a batch; `once` as of `Sizes.gradient`, for the first gradient."""
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
    """What the device does, as measured on some of the batches.

    Attributes:
        gradient, forward: seconds per FLOP, of passes with a backward and without; 0: not needed.
        kept: bytes that a token has kept for the backward, logits included.
        seconds: that the measurement took.
    """

    gradient: float = 0.0
    forward: float = 0.0
    kept: float = 0.0
    seconds: float = 0.0


@dataclass
class Estimate:
    """The estimate of a run.

    Attributes:
        counts: of the batches.
        rates: of the device.
        seconds: of computing; neither loading the model nor tables and figures.
        weights: bytes of parameters and buffers.
        activations: bytes of the largest batch.
        battery: whether there is a battery, which takes no longer than this.
        copied: bytes of the weights' copy that gradients are taken of, by the name of its dtype.
        sizes: questions of each task.
    """

    counts: Counts
    rates: Rates
    weights: int
    activations: int
    copied: tuple[str, int] | None = None
    sizes: tuple[int, ...] = ()
    seconds: float = field(init=False)
    battery: bool = False

    def __post_init__(self) -> None:
        counts, rates = self.counts, self.rates
        self.seconds = counts.gradients * rates.gradient + counts.forwards * rates.forward

    def lines(self) -> dict[str, str]:
        """As it is shown."""
        n, rates = self.counts, self.rates
        share = n.tokens_packed / max(1, n.tokens_asked)
        rate = n.flop / self.seconds if self.seconds else 0.0
        name, copied = self.copied or ("", 0)
        copy = f" and {_size(copied)} for a copy of them in {name}" if copied else ""
        return {
            "questions": f"{n.questions:,}",
            "requests": f"{n.requests:,}",
            "tokens": f"{n.tokens_asked:,}",
            "tokens packed, with padding": f"{n.tokens_packed:,} ({share:.0%})",
            "FLOP": f"{n.flop:.3g} ({n.gradients / max(1, n.flop):.0%} of them with gradients)",
            "time": f"{timedelta(seconds=round(self.seconds))} ({self.seconds:.3g} s) at"
            f" {rate:.3g} FLOP/s, measured for {rates.seconds:.1f} s"
            + ", at most: attacks leave out questions that are wrong already"
            * self.battery,
            "memory": f"{_size(self.weights + copied + self.activations)}: weights"
            f" {_size(self.weights)}{copy}, activations of the largest batch about"
            f" {_size(self.activations)}",
            **({"smallest drop it shows": _shows(self.sizes)} if self.sizes else {}),
        }


def dry_run(plan: Plan, progress: str) -> Estimate:
    """Estimates a run; writes nothing.

    Raises:
        UsageError: an argument is not allowed, or there are several processes.
    """
    if progress not in MODES:
        raise invalid("progress", progress, MODES)
    if Processes.of(plan).world > 1 or "tp_plan" in plan.model_args:
        raise UsageError("dry_run=True: needs one process, without shard and tp_plan")
    return estimate(prepare(plan, progress, Console(stderr=True)))


def estimate(prepared: Prepared, seconds: float = SECONDS) -> Estimate:
    """The estimate of what was prepared, from a calibration of about so many seconds."""
    lm = prepared.lm
    engine, model = lm.engine, lm.model
    sizes = Sizes.of(model, lm.engine_settings.gradient_checkpointing)
    batches = [work.batch for work in prepared.work]
    others = max((len(q.gold) - 1 for b in batches for q in b.questions), default=0)
    places = list(dict.fromkeys(engine.scorers))
    first = [
        attack
        for attack, scorer in zip(engine.attacks, engine.scorers, strict=True)
        if scorer is places[0]
    ]
    todo = passes(first, others, apart=bool(engine.slopes), hookpoints=len(places))
    counts = Counts(len(by_question(prepared.requests)), len(prepared.requests))
    for batch in batches:
        counts.add(engine.pack(batch), sizes, todo, engine.scorer.takes_twins)
    order = random.Random(0).sample(range(len(batches)), len(batches))
    calibration = Calibration(engine, sizes, bool(todo.gradients))
    with frozen(model):
        calibration.measure(engine.pack(batches[order[0]]))
        calibration = Calibration(engine, sizes, bool(todo.gradients))  # that was to warm up
        for i in order:
            calibration.measure(engine.pack(batches[i]))
            if calibration.seconds > seconds:
                break
    rates = calibration.rates()
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    itemsize = model.dtype.itemsize
    logits = counts.positions * sizes.vocabulary * itemsize
    passing = _LIVE * counts.largest * sizes.widest * itemsize
    kept = round(rates.kept * counts.largest)
    copied = (str(lm.engine_settings.gradient_dtype), lm.copy_bytes) if lm.copy_bytes else None
    weights = sum(tensors.values())
    asked = Counter(prepared.requests[n[0]].task_name for n in by_question(prepared.requests))
    compares = {"none"} < {attack.name for attack in engine.attacks}
    n = tuple(asked.values()) if compares else ()
    battery = any(attack.kind.members for attack in engine.attacks)
    return Estimate(counts, rates, weights, kept + passing + logits, copied, n, battery=battery)


class Calibration:
    """Runs batches, each once with a gradient and once with noise, and keeps the time.

    Args:
        engine: with the conditions.
        sizes: of its model.
        gradients: whether a gradient is needed.
    """

    def __init__(self, engine: Engine, sizes: Sizes, gradients: bool) -> None:
        self.engine, self.sizes, self.gradients = engine, sizes, gradients
        self.flop, self.spent = [0, 0], [0.0, 0.0]
        self.bytes = self.tokens = 0

    @property
    def seconds(self) -> float:
        """So far."""
        return sum(self.spent)

    def measure(self, pack: Pack) -> None:
        """Runs a batch."""
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
        if not isinstance(tensor, nn.Parameter) and not tensor.is_leaf:
            self.bytes += tensor.nbytes
        return tensor

    def rates(self) -> Rates:
        """What was measured."""
        gradient, forward = (
            s / f if f else 0.0 for s, f in zip(self.spent, self.flop, strict=True)
        )
        return Rates(gradient, forward, self.bytes / max(1, self.tokens), self.seconds)


def _slope(scorer: Scorer, pack: Pack, threat: ThreatModel, needs: Needs) -> Tensor:
    gradient = clean_pass(scorer, pack, threat, needs).gradient
    assert gradient is not None
    return gradient


def show(estimated: Estimate, name: str) -> Table:
    """The table of an estimate."""
    table = Table(title=f"{name}: time and memory that the run would need", show_header=False)
    for label, value in estimated.lines().items():
        table.add_row(label, value)
    return table


def _answered(pack: Pack) -> Iterator[tuple[Request, list[int]]]:
    """The requests of a pack, and which of the run's they answer."""
    for question in pack.questions:
        yield from zip(question.requests, question.answers, strict=True)


def _shows(sizes: Sequence[int]) -> str:
    """The smallest drop of the mean that so many questions show, for each of `DISCORDANCE`."""
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


def _size(n: int) -> str:
    return f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"
