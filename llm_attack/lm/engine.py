"""The engine: batches of questions through the clean model and through every condition."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from math import log10
from typing import NamedTuple

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from llm_attack.attacks import Attack
from llm_attack.lm.losses import widest
from llm_attack.lm.pack import Pack, pack_rows, pack_trees
from llm_attack.lm.probe import trees_equal_rows
from llm_attack.lm.questions import Question, Request, Shape, batches, of_rows, of_tree
from llm_attack.lm.scoring import Scorer
from llm_attack.lm.surface import Surface, ThreatModel

Answer = tuple[float, bool]

# Tokens of a batch: enough to keep the device busy, more only costs memory. benchmarks/engine.py
BUDGET = {"cpu": 768, "mps": 8192, "cuda": 32768}

log = logging.getLogger(__name__)


@dataclass
class Diagnostics:
    """What a condition did, summed over all tokens that it could perturb.

    Attributes:
        signal, noise: sums of squares of the clean point and of the perturbation.
        elements: coordinates of the points.
        zero_gradients: coordinates where a gradient was exactly zero (or NaN): no step was made.
        gradients: coordinates of all gradients taken.
        tokens: that were looked up in the vocabulary (`Nearest`), where the points are embeddings.
        nearest_l2, nearest_linf: those of them that no other token's embedding is nearer to.
    """

    signal: float = 0.0
    noise: float = 0.0
    elements: float = 0.0
    zero_gradients: float = 0.0
    gradients: float = 0.0
    tokens: float = 0.0
    nearest_l2: float = 0.0
    nearest_linf: float = 0.0

    def add(self, sums: Iterable[float]) -> None:
        for name, value in zip(vars(self).copy(), sums, strict=True):
            setattr(self, name, getattr(self, name) + value)

    def report(self) -> dict[str, float | None]:
        """Signal-to-noise ratio (power, and in dB), RMS of both, share of zero gradients, and of
        tokens still nearest to their own embedding.
        """
        some = self.elements > 0
        noisy = self.noise > 0
        return {
            "signal_rms": (self.signal / self.elements) ** 0.5 if some else None,
            "noise_rms": (self.noise / self.elements) ** 0.5 if some else None,
            "snr": self.signal / self.noise if noisy else None,
            "snr_db": 10 * log10(self.signal / self.noise) if noisy else None,
            "zero_gradient_fraction": (
                self.zero_gradients / self.gradients if self.gradients else None
            ),
            "nearest_token_unchanged": self.nearest_l2 / self.tokens if self.tokens else None,
            "nearest_token_unchanged_linf": (
                self.nearest_linf / self.tokens if self.tokens else None
            ),
        }


class Answered(NamedTuple):
    """What the engine found for a question.

    Attributes:
        question: the question.
        answers: for each attack, one answer per request.
        alignment: x·g, x·x and g·g of its clean point x and the gradient g there
            (`Surface.alignment`); None where no attack needs that gradient.
    """

    question: Question
    answers: list[list[Answer]]
    alignment: tuple[float, ...] | None


@dataclass
class Found:
    """What the engine found for a batch: answers, and each attack's diagnostics."""

    answered: list[Answered]
    diagnostics: list[Diagnostics]


@dataclass(frozen=True)
class Batch:
    """Questions that go through the model together, as trees or with a row per request."""

    questions: list[Question]
    trees: bool

    @property
    def tokens(self) -> int:
        """Of the model's input, padding included."""
        shapes = map(of_tree if self.trees else of_rows, self.questions)
        return sum(shapes, Shape(0, 0)).tokens

    def halves(self) -> list[Batch]:
        """Two batches, the last first."""
        middle = len(self.questions) // 2
        parts = self.questions[middle:], self.questions[:middle]
        return [Batch(part, self.trees) for part in parts]


@dataclass
class Engine:
    """Answers questions under a list of attacks.

    Args:
        scorer: the model.
        attacks: with epsilons in the units of the point.
        threat: loss and context of the attacks.
        device: where packs are put.
        pad: token id for padding; its value has no influence.
        longest_tree: a question that is a longer tree gets a row per request; 0: all do.
    """

    scorer: Scorer
    attacks: Sequence[Attack]
    threat: ThreatModel
    device: torch.device
    pad: int = 0
    longest_tree: int = 0
    diagnostics: list[Diagnostics] = field(init=False)
    _tried: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.diagnostics = [Diagnostics() for _ in self.attacks]

    def batches(
        self, questions: Iterable[Question], rows: int, tokens: int | None = None
    ) -> list[Batch]:
        """The questions in batches, which depend on nothing but the questions and the arguments.

        Args:
            questions: what is asked.
            rows: of a batch at most (but always a whole question).
            tokens: of a batch at most, padding included, unless a question has more; None: what is
                good for the device.
        """
        tokens = tokens or BUDGET.get(self.device.type, BUDGET["cpu"])
        trees, others = self.layouts(questions)
        return [
            Batch(batch, waiting is trees)
            for waiting, shape in ((trees, of_tree), (others, of_rows))
            for batch in batches(waiting, shape, rows, tokens)
        ]

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
                    values = self.answer(pack)
                except Exception as error:
                    if len(part.questions) == 1 or not should_reduce_batch_size(error):
                        raise
                    values = None  # what the traceback keeps alive is free only after the handler
                if values is None:
                    clear_device_cache(garbage_collection=True)
                    limit = part.tokens // 2
                    parts.append(part)
                    continue
                if not parts and waiting and limit is None:  # while the device is still at work
                    ready = self.pack(waiting[-1][0])
                self._collect(pack, values, found)
            for totals, of_batch in zip(self.diagnostics, found.diagnostics, strict=True):
                totals.add(astuple(of_batch))
            yield batch, found

    def layouts(self, questions: Iterable[Question]) -> tuple[list[Question], list[Question]]:
        """The questions that become trees, and the others, which get a row per request.

        Where the requests are attacked alone, the others are single requests, equal ones once.
        """
        alone: dict[Request, Question] = {}
        trees, others = [], []
        shared = self.threat.shared
        packed = self.longest_tree > 0 and (shared or all(a.identity for a in self.attacks))
        for q in questions:
            if packed and len(q.requests) > 1 and len(q.trie) <= self.longest_tree:
                trees.append(q)
            elif shared:
                others.append(q)
            else:
                for request, answers in zip(q.requests, q.answers, strict=True):
                    alone.setdefault(request, Question([request], [[]])).answers[0].extend(answers)
        longest = max(trees, key=lambda q: len(q.trie), default=None)
        if longest is None or len(longest.trie) <= self._tried:
            return trees, others + list(alone.values())
        self._tried = len(longest.trie)
        if not trees_equal_rows(self.scorer, [longest], self.device, self.pad):
            log.warning("packing: off, as a tree of %d tokens gives other logits", self._tried)
            self.longest_tree = 0
        return self.layouts([*trees, *others, *alone.values()])

    def pack(self, batch: Batch) -> Pack:
        """One batch as tensors, on the host."""
        attacked = not all(a.identity for a in self.attacks)
        whole = attacked and self.threat.loss == "sequence"
        if batch.trees:
            return pack_trees(batch.questions, self.pad, whole=whole)
        return pack_rows(batch.questions, self.pad, shared=self.threat.shared, whole=whole)

    def answer(self, pack: Pack) -> Tensor:
        """What is found for one batch, (N,) on the device, as `_collect` reads it."""
        surface = Surface(self.scorer, pack.to(self.device), self.threat)
        found: list[Tensor] = []
        if self._aligned:
            found.append(surface.alignment())  # its forward gives the clean answers too
        for attack in self.attacks:
            if attack.identity:
                found.extend(surface.clean)
            else:
                adversarial, sums = surface.attack(attack)
                found.extend((sums, *surface.answers(adversarial)))
        wide = widest(self.device)
        return torch.cat([part.flatten().to(wide) for part in found])

    @property
    def _aligned(self) -> bool:
        return any(a.uses_clean_gradient for a in self.attacks)

    def _collect(self, pack: Pack, values: Tensor, found: Found) -> None:
        """Adds the batch's answers to `found`; waits for the device, and copies from it once."""
        values = values.cpu()

        def take(n: int) -> Tensor:
            nonlocal values
            taken, values = values[:n], values[n:]
            return taken

        n, predictions = len(pack.questions), len(pack.scored.target)
        alignments: list = [None] * n
        if self._aligned:
            alignments = [tuple(row) for row in take(3 * n).reshape(n, 3).tolist()]
        sizes = [r.n_continuation for r in pack.requests]
        answers: list[list[Answer]] = []
        for attack, totals in zip(self.attacks, found.diagnostics, strict=True):
            if not attack.identity:
                totals.add(take(len(vars(totals))).tolist())
            # summed as lm-eval sums them: at -1000 the last place of float32 is 1e-4
            log_probs = take(predictions).to(self.scorer.softmax_dtype).split(sizes)
            greedy = take(predictions).bool().split(sizes)
            sums = torch.stack([part.sum() for part in log_probs]).tolist()
            answers.append(list(zip(sums, [bool(part.all()) for part in greedy], strict=True)))
        at = 0
        for question, alignment in zip(pack.questions, alignments, strict=True):
            end = at + len(question.requests)
            of_question = [of_attack[at:end] for of_attack in answers]
            found.answered.append(Answered(question, of_question, alignment))
            at = end
