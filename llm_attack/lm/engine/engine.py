"""The engine: batches of questions through the clean model and through every condition."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from llm_attack.attacks import Attack
from llm_attack.base.errors import UsageError
from llm_attack.lm.engine.attacked import AttackedBatch
from llm_attack.lm.engine.diagnostics import Diagnostics
from llm_attack.lm.engine.hookpoints import share
from llm_attack.lm.engine.probe import fault, longest_flat, takes_twins, trees_fault
from llm_attack.lm.engine.scoring import Scorer, Scores
from llm_attack.lm.losses import LOSSES, ThreatModel
from llm_attack.lm.network.lean import Lean
from llm_attack.lm.network.reproducible import reproducible
from llm_attack.lm.packing.batches import Batch, Family, batched, layouts, of_rows, of_tree
from llm_attack.lm.packing.pack import Pack, pack_rows, pack_trees
from llm_attack.lm.packing.positions import ALL, QUESTION
from llm_attack.lm.packing.prefix import groups, start
from llm_attack.lm.packing.questions import Question

Answer = tuple[float, bool]

# Tokens of a batch: enough to keep the device busy, more only costs memory. benchmarks/engine.py
BUDGET = {"cpu": 768, "mps": 8192, "cuda": 32768}

log = logging.getLogger(__name__)


class Answered(NamedTuple):
    """The answers to a question.

    Attributes:
        question: the question.
        answers: for each attack, one answer per request.
        alignment: of its clean point and the gradient there (`AttackedBatch.alignment`); None where
            no attack needs that gradient.
        critical_epsilons: for each attack that looks for it, the amplitude that makes the answer
            wrong (`AttackedBatch.critical_epsilon`); None for the others.
    """

    question: Question
    answers: list[list[Answer]]
    alignment: tuple[float, ...] | None
    critical_epsilons: list[float | None]


@dataclass
class Found:
    """The answers to a batch, and each attack's diagnostics."""

    answered: list[Answered]
    diagnostics: list[Diagnostics]


class Computed(NamedTuple):
    """The results of a device for a pack.

    Attributes:
        scores: for each attack, of the pack's scored predictions.
        sums: for each attack, what it adds to its `Diagnostics`, by name.
        alignment: (questions, 4), see `Answered`; or None.
        critical_epsilons: for each attack (questions,), or None.
    """

    scores: list[Scores]
    sums: list[dict[str, Tensor]]
    alignment: Tensor | None
    critical_epsilons: list[Tensor | None]


@dataclass
class Engine:
    """Answers questions under a list of attacks.

    Args:
        scorer: the model.
        attacks: with epsilons in the units of the point.
        scorers: for each attack, that of its hookpoint; none: `scorer` for all.
        threat: loss and context of the attacks.
        device: where packs are put.
        pad: token id for padding; its value has no influence.
        longest_tree: a question that is a longer tree gets a row per request; 0: all do.
        divides: whether batches are halved when memory runs out. Not where other processes hold
            parts of the model, and may have memory left.
        deterministic: every question is a batch of its own, computed to the same bits each time.
        prefixes: whether tokens that questions begin with, and that do not move, are computed once.
        once: whether the clean forward of requests that are attacked alone may compute once what
            they have in common; a trial decides.
    """

    scorer: Scorer
    attacks: Sequence[Attack]
    threat: ThreatModel
    device: torch.device
    pad: int = 0
    longest_tree: int = 0
    scorers: Sequence[Scorer] = ()
    divides: bool = True
    deterministic: bool = False
    prefixes: bool = False
    once: bool = False
    diagnostics: list[Diagnostics] = field(init=False)
    _tried: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.scorers = self.scorers or [self.scorer] * len(self.attacks)
        self.diagnostics = [Diagnostics() for _ in self.attacks]
        self.clean = all(a.identity for a in self.attacks)
        if not (self.threat.shared or self.clean):
            self.longest_tree = 0  # every request is perturbed differently
        if self.once:
            for scorer in (self.scorer, *self.scorers):
                scorer.lean = scorer.lean or Lean(scorer.model)
        if self.once and not (self.threat.shared or self.clean):
            if {*self.scorers} == {self.scorer}:  # a sweep's forwards start at blocks
                self.scorer.longest_flat = longest_flat(self.scorer, self.device, self.pad)
            if any(a.uses_clean_gradient for a in self.attacks):
                for scorer in dict.fromkeys(self.scorers):
                    scorer.takes_twins = takes_twins(scorer, self.device, self.pad)

    def probe(self, questions: Iterable[Question]) -> None:
        """Tries the longest tree of `questions`, and packs none from now on if it fails.

        The model takes short ones, or `longest_tree` would be 0, but those cannot show everything.
        """
        trees, _ = layouts(questions, self._takes_tree, self.threat.shared)
        longest = max((q for (q,) in trees), key=lambda q: len(q.trie), default=None)
        if longest is None or len(longest.trie) <= self._tried:
            return
        self._tried = len(longest.trie)
        wrong = trees_fault(self.scorer, [longest], self.device, self.pad)
        if wrong:
            log.warning("packing: off, as a tree of %d tokens %s", self._tried, wrong)
            self.longest_tree = 0

    def _takes_tree(self, question: Question) -> bool:
        """Whether it is no longer than trees may be, and its requests may share a forward."""
        scales = {self.scorer.rotary.scale(len(r.inputs)) for r in question.requests}
        most = min(self.longest_tree, max(self.scorer.limit, 2 * question.longest))
        return len(scales) == 1 and len(question.trie) <= most

    def batches(
        self, questions: Iterable[Question], rows: int, tokens: int | None = None
    ) -> list[Batch]:
        """The questions in batches, which depend on nothing but the questions and the settings.

        Args:
            questions: what is asked.
            rows: of a batch at most (but always a whole question).
            tokens: of a batch at most, padding included, unless a question has more; None: what is
                good for the device.
        """
        rows = 1 if self.deterministic else rows
        tokens = tokens or self._budget
        for scorer in (self.scorer, *self.scorers):
            scorer.limit = tokens
        layout = layouts(questions, self._takes_tree, self.threat.shared)
        return [
            Batch(batch, shape is of_tree, prefix)
            for waiting, shape in zip(layout, (of_tree, of_rows), strict=True)
            for prefix, members in self._groups(waiting, shape is of_tree)
            for batch in batched(members, partial(shape, prefix=prefix), rows, tokens)
        ]

    @property
    def _budget(self) -> int:
        return BUDGET.get(self.device.type, BUDGET["cpu"])

    def _groups(self, families: Sequence[Family], trees: bool) -> list[tuple[int, list[Family]]]:
        """The families by the prefix that is computed once, and how long it is."""
        everything = [(0, [*families])]
        positions = None if self.clean else self.threat.positions
        if not self.prefixes or positions == ALL:
            return everything
        questions = [q for family in families for q in family]
        scale = self.scorer.rotary.scale
        # short and long requests may have other frequencies, hence other keys
        starts = [start(q, positions) if scale(q.longest) == scale(0) else () for q in questions]
        found = groups(starts, self._budget)
        by_prefix = [(n, [[questions[i]] for i in numbers]) for n, numbers in found if numbers]
        longest, members = max(by_prefix, key=lambda group: group[0], default=(0, []))
        if not longest:
            if positions == QUESTION and any(starts):
                log.warning(
                    "prefix: computed for each question, as few of them share what they begin with"
                )
            return everything
        trial = Batch(members[0], trees, longest)
        packs = [self.pack(b).to(self.device) for b in (trial, replace(trial, prefix=0))]
        wrong = fault(self.scorer, *packs)
        if wrong:
            log.warning("prefix: computed for each question, as its cache %s", wrong)
            self.prefixes = False
            return everything
        return by_prefix

    def answers(self, todo: Iterable[Batch]) -> Iterator[tuple[Batch, Found]]:
        """Yields each batch with what was found: to each request alone where it is attacked alone.

        Batches that run out of memory are halved, and so are those after them that are as large.
        """
        waiting = [(batch, [batch]) for batch in todo][::-1]
        limit: int | None = None  # tokens, once memory has run out
        ready: Pack | None = None
        while waiting:
            batch, parts = waiting.pop()
            found = Found([], [Diagnostics() for _ in self.attacks])
            while parts:
                part = parts.pop()
                if limit is not None and part.tokens > limit and len(part.questions) > 1:
                    parts.extend(part.halves())
                    continue
                pack = self.pack(part) if ready is None or part is not batch else ready
                ready = None
                try:
                    with reproducible(self.deterministic):
                        computed = self.compute(pack)
                except Exception as error:
                    alone = len(part.questions) == 1 or not self.divides
                    if alone or not should_reduce_batch_size(error):
                        raise
                    computed = None  # what the traceback keeps alive is free only after the handler
                if computed is None:
                    clear_device_cache(garbage_collection=True)
                    limit = part.tokens // 2
                    parts.append(part)
                    continue
                if not parts and waiting and limit is None:  # while the device is still at work
                    ready = self.pack(waiting[-1][0])
                self._collect(pack, computed, found)
            for totals, of_batch in zip(self.diagnostics, found.diagnostics, strict=True):
                totals.add(asdict(of_batch))
            yield batch, found

    def pack(self, batch: Batch) -> Pack:
        """One batch as tensors, on the host."""
        whole = LOSSES[self.threat.loss].whole and not self.clean
        how: dict[str, Any] = {"whole": whole, "positions": self.threat.positions}
        how["prefix"] = batch.prefix
        if batch.trees:
            return pack_trees(batch.questions, self.pad, **how)
        return pack_rows(batch.questions, self.pad, shared=self.threat.shared, **how)

    def compute(self, pack: Pack) -> Computed:
        """Runs one batch under all attacks; nothing waits for the device."""
        pack = pack.to(self.device)
        attacked_batches = {
            s: AttackedBatch(s, pack, self.threat) for s in dict.fromkeys(self.scorers)
        }
        aligned = any(a.uses_clean_gradient or a.kind.minimal for a in self.attacks)
        first = attacked_batches[self.scorers[0]]
        if len(attacked_batches) > 1:
            share(list(attacked_batches.values()), aligned)
        # before all else, because its forward gives the clean answers too
        alignment = first.alignment(self.attacks[0].norm) if aligned else None
        found = Computed([], [], alignment, [])
        for attack, scorer in zip(self.attacks, self.scorers, strict=True):
            attacked, x, scores = attacked_batches[scorer], None, first.clean
            sums: dict[str, Tensor] = {}
            if not attack.identity:
                x, sums = attacked.attack(attack)
                scores = attacked.answers(x)
            critical = None
            if attack.kind.minimal:
                critical = attacked.critical_epsilon(attack, attacked.x if x is None else x, scores)
            found.scores.append(scores)
            found.sums.append(sums)
            found.critical_epsilons.append(critical)
        return found

    def _collect(self, pack: Pack, computed: Computed, found: Found) -> None:
        """Adds the batch's answers to `found`; waits for the device.

        Raises:
            UsageError: an answer without a perturbation is not finite.
        """
        sizes = [r.n_continuation for r in pack.requests]
        answers: list[list[Answer]] = []
        for attack, scores, sums, totals in zip(
            self.attacks, computed.scores, computed.sums, found.diagnostics, strict=True
        ):
            totals.add({name: float(value) for name, value in sums.items()})
            # summed as lm-eval sums them: at -1000 the last place of float32 is 1e-4
            parts = scores.log_prob.cpu().split(sizes)
            sums_of_parts = torch.stack([part.sum() for part in parts])
            bad = int((~sums_of_parts.isfinite()).sum())
            if bad and attack.identity:
                raise UsageError(
                    f"attack={attack.name}: {bad} of {len(parts)} log-likelihoods are not finite,"
                    " without a perturbation; must be a model, and a dtype, that gives numbers"
                )
            totals.add({"not_finite": bad})
            log_likelihoods = sums_of_parts.tolist()
            greedy = [bool(part.all()) for part in scores.greedy.cpu().split(sizes)]
            answers.append(list(zip(log_likelihoods, greedy, strict=True)))
        alignments: list[Any] = [None] * len(pack.questions)
        if computed.alignment is not None:
            alignments = [tuple(row) for row in computed.alignment.tolist()]
        nothing = [None] * len(pack.questions)
        critical = [nothing if of is None else of.tolist() for of in computed.critical_epsilons]
        at = 0
        for i, (question, alignment) in enumerate(zip(pack.questions, alignments, strict=True)):
            end = at + len(question.requests)
            of_question = [of_attack[at:end] for of_attack in answers]
            amplitudes = [of_attack[i] for of_attack in critical]
            found.answered.append(Answered(question, of_question, alignment, amplitudes))
            at = end
