"""The engine: batches of questions through the clean model and through every condition."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from llm_attack.attacks import Attack
from llm_attack.base.errors import UsageError
from llm_attack.lm.engine.attacked import Attacked, AttackedBatch, Curve, Slopes
from llm_attack.lm.engine.battery import survive
from llm_attack.lm.engine.clean import CleanPass, Needs
from llm_attack.lm.engine.diagnostics import Diagnostics
from llm_attack.lm.engine.fixed import Fixed
from llm_attack.lm.engine.hookpoints import clean_passes
from llm_attack.lm.engine.probe import (
    beside_fault,
    fault,
    longest_flat,
    takes_twins,
    trees_fault,
    usable_stack,
)
from llm_attack.lm.engine.scoring import Scorer, Scores
from llm_attack.lm.engine.smoothing import votes
from llm_attack.lm.engine.tied import Fitted, fit
from llm_attack.lm.engine.tokens import Changes
from llm_attack.lm.engine.traces import Trace, traced
from llm_attack.lm.losses import LOSSES, ThreatModel
from llm_attack.lm.network.lean import Lean
from llm_attack.lm.network.reproducible import reproducible
from llm_attack.lm.network.rotary import own_code
from llm_attack.lm.packing.batches import Batch, Family, batched, layouts, of_rows, of_tree
from llm_attack.lm.packing.pack import Pack, pack_rows, pack_trees
from llm_attack.lm.packing.positions import ALL, QUESTION
from llm_attack.lm.packing.prefix import groups, start
from llm_attack.lm.packing.questions import Question
from llm_attack.lm.smoothing import Smoothing

Answer = tuple[float, bool]
Curves = list[tuple[Curve, Sequence[int]]]
"""The curves of one condition, each with the numbers of its questions."""

# Tokens of a batch. These keep the device busy, and more only cost memory. benchmarks/engine.py
BUDGET = {"cpu": 768, "mps": 8192, "cuda": 32768}

log = logging.getLogger(__name__)


class Answered(NamedTuple):
    """The answers to a question.

    Attributes:
        question: the question.
        answers: for each attack, one answer per request.
        alignment: alignment of the clean point and its gradient (`AttackedBatch.alignment`); None
            if no attack needs that gradient.
        critical_epsilons: for each attack that searches for it, the amplitude that makes the answer
            wrong (`AttackedBatch.critical_epsilon`); None for the others.
        broken_by: for each battery, see `Survived`; None for the others.
        curves: for each attack, the curves of this question's requests; empty without `trace`.
        votes: for each sigma of the smoothing, the two parts of `smoothing.votes`; None without
            smoothing.
        changes: for each attack that chooses tokens, what it changed; None for the others.
    """

    question: Question
    answers: list[list[Answer]]
    alignment: tuple[float, ...] | None
    critical_epsilons: list[float | None]
    broken_by: list[str | None]
    curves: list[list[Curve]]
    votes: list[list[list[int]]] | None = None
    changes: Sequence[Changes | None] = ()


@dataclass
class BatchResult:
    """The answers to a batch, each attack's diagnostics, and its traces if they are asked for.

    The traces of an attack are in the order of the batch's questions; `none` has no traces.
    """

    answered: list[Answered]
    diagnostics: list[Diagnostics]
    traces: list[list[Trace]] = field(default_factory=list)


class Computed(NamedTuple):
    """The results of a device for a pack.

    Attributes:
        scores: for each attack, the scores of the pack's scored predictions.
        sums: for each attack, the values to add to its `Diagnostics`, by name.
        alignment: (questions, 4), see `Answered`; or None.
        critical_epsilons: for each attack (questions,), or None.
        broken_by: for each attack, a name or None of each question.
        traces: for each attack, or None.
        curves: for each attack.
        votes: the result of `smoothing.votes`, or None.
        changes: for each attack, the changes of each question, or None.
    """

    scores: list[Scores]
    sums: list[dict[str, Tensor]]
    alignment: Tensor | None
    critical_epsilons: list[Tensor | None]
    broken_by: list[list[str | None]]
    traces: list[Trace | None]
    curves: list[Curves]
    votes: Tensor | None
    changes: list[list[Changes] | None]


@dataclass(frozen=True)
class Layout:
    """The settings that say how questions become batches.

    Attributes:
        pad: token id for padding; its value has no influence.
        longest_tree: a question that is a longer tree gets a row per request; with 0 all do.
        prefixes: whether tokens that questions begin with, and that do not move, are computed once.
        once: whether shared tokens of requests that are attacked by themselves may be computed once
            in the clean forward. A trial decides.
        divides: whether batches are halved if memory runs out. It is False if other processes hold
            parts of the model, because they may have memory left.
        deterministic: every question is its own batch, and is computed to the same bits each time.
    """

    pad: int = 0
    longest_tree: int = 0
    prefixes: bool = False
    once: bool = False
    divides: bool = True
    deterministic: bool = False


@dataclass
class Engine:
    """Answers questions under a list of attacks.

    Args:
        scorer: the model.
        attacks: the attacks, with epsilons in the units of the point.
        threat: loss and context of the attacks.
        device: the device of packs.
        layout: says how questions become batches.
        scorers: for each attack, the scorer of its hookpoint; empty: `scorer` for all.
        slopes: for each scorer, the scorer that computes the gradients; empty: the same scorer.
        path_points: the argument `points` of `traced`, for traces in the results; None: no traces.
        trace: whether the results contain the curves of the attacks.
        smoothing: the noise under which the model votes at the first hookpoint, with sigmas in the
            units of the point; None: no votes. It needs a loss that knows the label.
        fixed: the perturbation of the attacks in `FIXED`; None: there are no such attacks.
    """

    scorer: Scorer
    attacks: Sequence[Attack]
    threat: ThreatModel
    device: torch.device
    layout: Layout = Layout()  # frozen
    scorers: Sequence[Scorer] = ()
    slopes: Mapping[Scorer, Scorer] = field(default_factory=dict)
    path_points: int | None = None
    trace: bool = False
    smoothing: Smoothing | None = None
    fixed: Fixed | None = None
    tables: dict[Attack, Fitted] = field(default_factory=dict, init=False)
    _tried: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.scorers = self.scorers or [self.scorer] * len(self.attacks)
        self.clean = all(a.identity for a in self.attacks) and self.smoothing is None
        alone = not (self.threat.shared or self.clean)
        if alone:  # every request has its own perturbation
            self.layout = replace(self.layout, longest_tree=0)
        if self.layout.once:
            self._try_shortcuts(alone)

    def _try_shortcuts(self, alone: bool) -> None:
        """Turns on the faster computations for which a trial gives the same numbers.

        Args:
            alone: whether every request is attacked by itself.
        """
        first, pad = (self.scorer, *self.slopes.values()), self.layout.pad
        scorers = dict.fromkeys([*first, *self.scorers])
        for scorer in scorers:
            scorer.lean = scorer.lean or Lean(scorer.model)
            scorer.stack = scorer.stack or usable_stack(scorer, self.device, pad)
        if alone and {*self.scorers} == {self.scorer}:  # a sweep's forwards start at blocks
            for scorer in dict.fromkeys(first):
                scorer.longest_flat = longest_flat(scorer, self.device, pad)
        if alone and any(a.uses_clean_gradient for a in self.attacks):
            for scorer in scorers:
                scorer.takes_twins = takes_twins(scorer, self.device, pad)

    def probe(self, questions: Iterable[Question], tokens: int | None = None) -> None:
        """Tries the longest tree of `questions`. If it fails, no trees are packed from now on.

        The model supports short trees, or else `longest_tree` is 0. Long trees can still fail.
        """
        questions = [*questions]
        self._try_rows(questions)
        takes_tree = partial(self._takes_tree, tokens or self.budget)
        trees, _ = layouts(questions, takes_tree, self.threat.shared)
        longest = max((q for (q,) in trees), key=lambda q: len(q.trie), default=None)
        if longest is None or len(longest.trie) <= self._tried:
            return
        self._tried = len(longest.trie)
        wrong = trees_fault(self.scorer, [longest], self.device, self.layout.pad)
        if wrong:
            log.warning("packing: off, because a tree of %d tokens %s", self._tried, wrong)
            self.layout = replace(self.layout, longest_tree=0)

    def _try_rows(self, questions: Sequence[Question]) -> None:
        """Tries whether rows of different lengths may share a forward, if the code is unknown.

        Raises:
            UsageError: rows change one another even if all rows of a forward have one length, or a
                forward changes the next one.
        """
        if not own_code(self.scorer.model) or self.scorer.rotary.unknown:
            return
        trial = partial(beside_fault, self.scorer, questions, self.device, self.layout.pad)
        beside, after = trial()
        if beside:
            log.warning("rows: only of equal length share a forward, because %s", beside)
            self.layout = replace(self.layout, longest_tree=0)
            for scorer in (self.scorer, *self.scorers, *self.slopes.values()):
                scorer.rotary.unknown = True
                scorer.takes_twins, scorer.longest_flat = False, 0
            beside, _ = trial()
        if after or beside:
            raise UsageError(
                f"model: its own code mixes requests, because {after or beside}; must be a model"
                " whose answers do not depend on other requests"
            )

    def _takes_tree(self, tokens: int, question: Question) -> bool:
        """Whether a question is short enough for a tree, and its requests may share a forward."""
        scales = {self.scorer.rotary.scale(len(r.inputs)) for r in question.requests}
        most = min(self.layout.longest_tree, max(tokens, 2 * question.longest))
        return len(scales) == 1 and len(question.trie) <= most

    def batches(
        self, questions: Iterable[Question], rows: int, tokens: int | None = None
    ) -> list[Batch]:
        """Puts questions into batches, which depend only on the questions and the settings.

        Args:
            questions: the questions.
            rows: largest number of rows of a batch, which always holds a whole question.
            tokens: largest number of tokens of a batch, padding included, unless a question has
                more; None: a number that suits the device.
        """
        rows = 1 if self.layout.deterministic else rows
        tokens = tokens or self.budget
        layout = layouts(questions, partial(self._takes_tree, tokens), self.threat.shared)
        return [
            Batch(batch, shape is of_tree, prefix, tokens)
            for waiting, shape in zip(layout, (of_tree, of_rows), strict=True)
            for prefix, members in self._groups(waiting, shape is of_tree, tokens)
            for batch in batched(members, partial(shape, prefix=prefix), rows, tokens)
        ]

    @property
    def budget(self) -> int:
        return BUDGET.get(self.device.type, BUDGET["cpu"])

    def _groups(
        self, families: Sequence[Family], trees: bool, tokens: int
    ) -> list[tuple[int, list[Family]]]:
        """Groups the families by the prefix that is computed once, and gives its length."""
        everything = [(0, [*families])]
        positions = None if self.clean else self.threat.positions
        if not self.layout.prefixes or positions == ALL:
            return everything
        questions = [q for family in families for q in family]
        scale = self.scorer.rotary.scale
        # short and long requests may have different frequencies, and so different keys
        starts = [start(q, positions) if scale(q.longest) == scale(0) else () for q in questions]
        by_prefix = [
            (n, [[questions[i]] for i in numbers])
            for n, numbers in groups(starts, self.budget)
            if numbers
        ]
        longest, members = max(by_prefix, key=lambda group: group[0], default=(0, []))
        if not longest:
            if positions == QUESTION and any(starts):
                log.warning(
                    "prefix: computed for each question, because few questions share a prefix"
                )
            return everything
        trial = Batch(members[0], trees, longest, tokens)
        packs = [self.pack(b).to(self.device) for b in (trial, replace(trial, prefix=0))]
        wrong = fault(self.scorer, *packs)
        if wrong:
            log.warning("prefix: computed for each question, because its cache %s", wrong)
            self.layout = replace(self.layout, prefixes=False)
            return everything
        return by_prefix

    def answers(self, todo: Iterable[Batch]) -> Iterator[tuple[Batch, BatchResult]]:
        """Yields each batch with its answers, for each request if it is attacked by itself.

        A batch that runs out of memory is halved, and so are later batches of this size.
        """
        waiting = [*todo][::-1]
        limit: int | None = None  # tokens, once memory has run out
        ready: Pack | None = None
        while waiting:
            batch, n = waiting.pop(), len(self.attacks)
            result = BatchResult([], [Diagnostics() for _ in range(n)], [[] for _ in range(n)])
            parts = [batch]
            while parts:
                part = parts.pop()
                if limit is not None and part.tokens > limit and len(part.questions) > 1:
                    parts.extend(part.halves())
                    continue
                pack = ready or self.pack(part)
                ready = None
                computed = self._computed(pack)
                if computed is None:
                    clear_device_cache(garbage_collection=True)
                    limit = part.tokens // 2
                    parts.append(part)
                    continue
                if not parts and waiting and limit is None:  # while the device is still at work
                    ready = self.pack(waiting[-1])
                self._collect(pack, computed, result)
            yield batch, result

    def _computed(self, pack: Pack) -> Computed | None:
        """The results for a pack. None if memory has run out and the pack can be halved."""
        try:
            with reproducible(self.layout.deterministic):
                return self.compute(pack)
        except Exception as error:
            alone = len(pack.questions) == 1 or not self.layout.divides
            if alone or not should_reduce_batch_size(error):
                raise
        return None  # the traceback keeps tensors alive until the handler ends

    def pack(self, batch: Batch) -> Pack:
        """Makes tensors of a batch, on the host."""
        whole = LOSSES[self.threat.loss].whole and not self.clean
        how: dict[str, Any] = {"whole": whole, "positions": self.threat.positions}
        how["prefix"] = batch.prefix
        if batch.trees:
            pack = pack_trees(batch.questions, self.layout.pad, **how)
        else:
            shared = self.threat.shared
            pack = pack_rows(batch.questions, self.layout.pad, shared=shared, **how)
        return replace(pack, limit=batch.limit)

    def compute(self, pack: Pack) -> Computed:
        """Runs one batch under all attacks.

        Only batteries and attacks that choose tokens wait for the device.
        """
        pack = pack.to(self.device)
        needs = Needs.of(self.attacks)
        if self.smoothing is not None:
            needs = replace(needs, point=True)
        batches = self.prepared(pack, needs)
        first = batches[self.scorers[0]]
        alignment = first.alignment(self.attacks[0]) if needs.gradient else None
        counts = None if self.smoothing is None else votes(first, self.smoothing)
        computed = Computed([], [], alignment, [], [], [], [], counts, [])
        for attack, scorer, end in zip(self.attacks, self.scorers, self.ends(batches), strict=True):
            at = batches[scorer]
            broken_by: list[str | None] = [None] * len(pack.questions)
            curves: Curves = []
            if attack.kind.members and not attack.identity:
                assert first.clean.scores is not None
                prepare, x = partial(self._alone, scorer), None
                scores, sums, broken_by, curves = survive(
                    attack, pack, self.threat, first.clean.scores, prepare
                )
            elif end is None:  # the clean point
                assert first.clean.scores is not None
                n = torch.as_tensor(len(pack.requests))
                sums = {"points": n, "forwards": n, "backwards": 0 * n}
                scores, x = first.clean.scores, at.clean.x
            else:
                end = at.ending(end)
                assert end.scores is not None
                sums, scores, x = end.sums, end.scores, end.x
                every = range(len(pack.questions))
                curves = [] if end.curve is None else [(end.curve, every)]
            critical = None
            if attack.kind.minimal:
                assert x is not None
                critical = at.critical_epsilon(attack, x, scores)
            changes = None
            if attack.kind.of_tokens and not attack.identity:
                assert x is not None
                changes = at.changes(attack, x, scores)
            computed.scores.append(scores)
            computed.sums.append(sums)
            computed.critical_epsilons.append(critical)
            computed.broken_by.append(broken_by)
            computed.traces.append(self._trace(at, end))
            computed.curves.append(curves)
            computed.changes.append(changes)
        return computed

    def _trace(self, batch: AttackedBatch, end: Attacked | None) -> Trace | None:
        """The trace of an attack, if it moved and traces are asked for."""
        if end is None or self.path_points is None:
            return None
        return traced(batch, end.x, self.path_points)

    def _alone(self, scorer: Scorer, batch: Batch, attack: Attack) -> AttackedBatch:
        """A batch made ready for one attack."""
        pack = self.pack(batch).to(self.device)
        return self.prepared(pack, Needs.of([attack]), [scorer])[scorer]

    def prepared(
        self, pack: Pack, needs: Needs, at: Sequence[Scorer] = ()
    ) -> dict[Scorer, AttackedBatch]:
        """The pack at each hookpoint, or at those of some scorers, with its clean pass."""
        batches = self._prepared(pack, needs, list(dict.fromkeys(at or self.scorers)))
        for batch in batches.values():
            batch.tables = {attack: table.point for attack, table in self.tables.items()}
        return batches

    def _prepared(
        self, pack: Pack, needs: Needs, scorers: list[Scorer]
    ) -> dict[Scorer, AttackedBatch]:
        if not self.slopes:
            passes = clean_passes(scorers, pack, self.threat, needs)
            return {
                scorer: AttackedBatch(
                    scorer, pack, self.threat, clean, trace=self.trace, fixed=self.fixed
                )
                for scorer, clean in zip(scorers, passes, strict=True)
            }
        passes = clean_passes(scorers, pack, self.threat, replace(needs, gradient=False))
        others = [self.slopes[scorer] for scorer in scorers]
        halves = clean_passes(others, pack, self.threat, replace(needs, answers=False))
        prepared = {}
        for scorer, other, clean, half in zip(scorers, others, passes, halves, strict=True):
            slopes, both = Slopes(other, half.below), _with_slopes(clean, half)
            prepared[scorer] = AttackedBatch(
                scorer, pack, self.threat, both, slopes, self.trace, self.fixed
            )
        return prepared

    def ends(self, batches: Mapping[Scorer, AttackedBatch]) -> list[Attacked | None]:
        """The result of every attack; None for `none`. Attacks with the same steps run once."""
        ends: list[Attacked | None] = [None] * len(self.attacks)
        ways: dict[tuple[Scorer, Attack], list[int]] = {}
        for i, (attack, scorer) in enumerate(zip(self.attacks, self.scorers, strict=True)):
            if not (attack.identity or attack.kind.members):
                ways.setdefault((scorer, attack.path), []).append(i)
        for (scorer, _), numbers in ways.items():
            attacked = batches[scorer].attacks([self.attacks[i] for i in numbers])
            for i, end in zip(numbers, attacked, strict=True):
                ends[i] = end
        return ends

    def fit(self, batches: Iterable[Batch]) -> None:
        """Fits the tables of the tied attacks to all these batches together."""
        every = list(batches)

        def at(scorer: Scorer) -> Iterator[AttackedBatch]:
            for batch in every:
                pack = self.pack(batch).to(self.device)
                yield self.prepared(pack, Needs(point=True), [scorer])[scorer]

        for attack, scorer in zip(self.attacks, self.scorers, strict=True):
            if attack.kind.tied and every:
                with reproducible(self.layout.deterministic):
                    self.tables[attack] = fit(attack, partial(at, scorer), self.threat.seed)

    def _collect(self, pack: Pack, computed: Computed, result: BatchResult) -> None:
        """Adds the batch's answers to `result`. Waits for the device.

        Raises:
            UsageError: an answer without a perturbation is not finite.
        """
        sizes = [r.n_continuation for r in pack.requests]
        answers: list[list[Answer]] = []
        for attack, scores, sums, totals in zip(
            self.attacks, computed.scores, computed.sums, result.diagnostics, strict=True
        ):
            totals.add({name: float(value) for name, value in sums.items()})
            of_attack, bad = _summed(scores, sizes)
            if bad and attack.identity:
                raise UsageError(
                    f"attack={attack.name}: {bad} of {len(sizes)} log-likelihoods are NaN or"
                    " infinite without a perturbation; must be a model and a dtype with finite"
                    " answers"
                )
            totals.add({"not_finite": bad})
            answers.append(of_attack)
        for traces, trace in zip(result.traces, computed.traces, strict=True):
            traces += [] if trace is None else [trace.on_cpu()]
        n = len(pack.questions)
        alignments: list[Any] = [None] * n
        if computed.alignment is not None:
            alignments = [tuple(row) for row in computed.alignment.tolist()]
        critical = [[None] * n if c is None else c.tolist() for c in computed.critical_epsilons]
        of_questions = [_by_question(pack, curves) for curves in computed.curves]
        at = 0
        for i, question in enumerate(pack.questions):
            end = at + len(question.requests)
            of_question = [of_attack[at:end] for of_attack in answers]
            amplitudes = [of_attack[i] for of_attack in critical]
            names = [of_attack[i] for of_attack in computed.broken_by]
            counts = None
            if computed.votes is not None:
                counts = computed.votes[i, ..., : len(question.gold)].tolist()
            result.answered.append(
                Answered(
                    *(question, of_question, alignments[i], amplitudes, names),
                    [of_attack[i] for of_attack in of_questions],
                    counts,
                    [None if c is None else c[i] for c in computed.changes],
                )
            )
            at = end


def _by_question(pack: Pack, curves: Curves) -> list[list[Curve]]:
    """The curves of each question of a pack. Waits for the device."""
    found: list[list[Curve]] = [[] for _ in pack.questions]
    for curve, numbers in curves:
        sizes = [len(pack.questions[i].requests) for i in numbers]
        parts = curve.values.cpu().double().split(sizes, 1)
        for i, part in zip(numbers, parts, strict=True):
            found[i].append(curve._replace(values=part))
    return found


def _summed(scores: Scores, sizes: list[int]) -> tuple[list[Answer], int]:
    """Sums scores to one answer per request, and counts the answers that are not finite.

    The sums are in the precision of lm-eval. At -1000 the last place of float32 is 1e-4.
    """
    sums = torch.stack([part.sum() for part in scores.log_prob.cpu().split(sizes)])
    greedy = [bool(part.all()) for part in scores.greedy.cpu().split(sizes)]
    return list(zip(sums.tolist(), greedy, strict=True)), int((~sums.isfinite()).sum())


def _with_slopes(clean: CleanPass, half: CleanPass) -> CleanPass:
    """A clean pass with the loss and the gradient of the copy, in the dtype of the model."""
    if half.gradient is None or clean.x is None:
        return clean
    return replace(clean, loss=half.loss, gradient=half.gradient.to(clean.x.dtype))
