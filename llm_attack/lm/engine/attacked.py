"""One batch prepared for attack: clean pass, random keys and loss functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_attack.attacks import (
    Attack,
    Ball,
    Elements,
    Groups,
    Known,
    Losses,
    Watch,
    trajectory,
    widest,
)
from llm_attack.attacks.cells import Cells, confined
from llm_attack.attacks.formats import Format
from llm_attack.attacks.swaps import Swapped
from llm_attack.lm.engine import diagnostics
from llm_attack.lm.engine.choices import sum_by
from llm_attack.lm.engine.clean import BatchLoss, CleanPass, Needs, answers_of, expand
from llm_attack.lm.engine.fixed import Fixed
from llm_attack.lm.engine.scoring import Scorer, Scores
from llm_attack.lm.engine.tokens import Changes, changes, ids_of, prompt_of, swap
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.packing.pack import Pack


class Attacked(NamedTuple):
    """The result of an attack on a batch.

    Attributes:
        x: the attacked point.
        sums: the values to add to the sums of `Diagnostics`, by name.
        scores: the scores of the continuations' tokens at `x`; None if the attack did not evaluate
            this point.
        curve: the losses at its steps; None without `trace`. It lacks the last step if `scores` is
            None.
    """

    x: Tensor
    sums: dict[str, Tensor]
    scores: Scores | None
    curve: Curve | None = None


class Curve(NamedTuple):
    """The loss at every point that an attack evaluates, in order.

    Attributes:
        attack: its name.
        first: number of the first step; 0 if the first value is at the start of the attack.
        values: (steps, requests, 2), for each request the loss of its example and the
            log-likelihood of its continuation.
    """

    attack: str
    first: int
    values: Tensor


@dataclass(frozen=True)
class Slopes:
    """The copy of the model, in a dtype of fewer bits, that computes gradients.

    Attributes:
        scorer: a scorer with the copy.
        below: clean activations of the copy; see `CleanPass`.
    """

    scorer: Scorer
    below: Tensor | None = None

    def scores(self, pack: Pack, x: Tensor) -> Scores:
        """The scores of the watched predictions at a point, (B, L, H)."""
        return self.scorer(pack, pack.watched, x.to(self.scorer.model.dtype), self.below)


class AttackedBatch:
    """One pack with its clean pass, and the loss that attacks raise.

    Args:
        scorer: the model and the hookpoint.
        pack: the batch.
        threat: the loss, and the tokens that may move.
        clean: the clean pass, with all that the attacks need.
        slopes: the copy that computes gradients; None if the model of `scorer` does.
        trace: whether attacks return a `Curve`.
        fixed: the perturbation of the attacks in `FIXED`; None: there are no such attacks.

    Attributes:
        x: the clean point: (B, L, H), or (U, H) if the pack has nodes.
        mask: (B, L) or (U,) booleans, False on padding and on other tokens that do not move; None
            if all move.
        tables: for each tied attack, a function that gives its point of this batch.
        swapped: the results of attacks that swapped tokens.
    """

    def __init__(
        self,
        scorer: Scorer,
        pack: Pack,
        threat: ThreatModel,
        clean: CleanPass,
        slopes: Slopes | None = None,
        trace: bool = False,
        fixed: Fixed | None = None,
    ) -> None:
        self.scorer, self.pack, self.threat = scorer, pack, threat
        self.clean, self.slopes, self.trace, self.fixed = clean, slopes, trace, fixed
        self.read = BatchLoss(pack, threat)
        self.tables: Mapping[Attack, Callable[[AttackedBatch], Tensor]] = {}
        self._cells: dict[str, Cells] = {}
        self.swapped: dict[Attack, Swapped] = {}

    @property
    def x(self) -> Tensor:
        assert self.clean.x is not None
        return self.clean.x

    @property
    def _precise(self) -> torch.dtype:
        return torch.promote_types(self.x.dtype, torch.float32)

    @property
    def mask(self) -> Tensor | None:
        if self.pack.moves is not None:
            return self.pack.moves
        return self.pack.mask if self.pack.first is None else None

    @cached_property
    def keys(self) -> Tensor:
        return self.pack.keys(self.threat.seed)

    @cached_property
    def examples(self) -> Groups:
        """The examples: questions, or requests if each is attacked by itself."""
        if self.pack.first is None:
            return Groups.rows(self.x)
        sizes = [len(q.trie) for q in self.pack.questions]
        return Groups(_owners(sizes).to(self.x.device), len(sizes))

    @property
    def elements(self) -> Elements:
        return Elements(self.mask, self.examples)

    def ball(self, attack: Attack) -> Ball:
        """The points that an attack may reach. Swaps have no bound, and are in the prompt."""
        elements = self.elements
        if attack.kind.swaps:
            elements = Elements(prompt_of(self.pack), self.examples)
        return Ball.of(attack, self.x, elements=elements)

    # -- values that attacks ask for at a point ---------------------------------------------------

    def watched(self, x: Tensor, slopes: Slopes | None = None) -> Scores:
        """The scores that the loss reads at a point, computed by `slopes` if given."""
        x = expand(self.pack, x)
        if slopes is not None:
            return slopes.scores(self.pack, x)
        return self.scorer(self.pack, self.pack.watched, x, self.clean.below)

    def loss(self, x: Tensor) -> Tensor:
        """The loss that attacks raise: (requests,), or (questions,) if it knows the gold."""
        return self.read.value(self.watched(x))

    def gap(self, x: Tensor) -> Tensor:
        """(questions,) `BatchLoss.gap`."""
        return self.read.gap(self.watched(x))

    def answers(self, x: Tensor | None) -> Scores:
        """The scores of the continuations' tokens at `x`; None: without a perturbation."""
        with torch.no_grad():
            if x is None:
                return self.scorer(self.pack, self.pack.scored)
            point = expand(self.pack, x)
            return self.scorer(self.pack, self.pack.scored, point, self.clean.below)

    def ending(self, end: Attacked) -> Attacked:
        """The result of an attack, with the scores at its point."""
        if end.scores is not None:
            return end
        if end.curve is None:
            return end._replace(scores=self.answers(end.x))
        with torch.no_grad():
            seen = self.watched(end.x)
        values = torch.cat([end.curve.values, self.values(seen)[None]])
        return end._replace(
            scores=answers_of(self.pack, seen), curve=end.curve._replace(values=values)
        )

    @torch.no_grad()
    def values(self, watched: Scores) -> Tensor:
        """(requests, 2): the loss of each request's example, and its log-likelihood."""
        return self._values(self.read.value(watched), answers_of(self.pack, watched))

    def _values(self, loss: Tensor, answers: Scores | None) -> Tensor:
        n, of_examples = len(self.pack.requests), self.of_examples(loss)
        if len(of_examples) < n:
            of_examples = of_examples[self._question_of_requests]
        own = torch.full_like(of_examples, torch.nan)
        if answers is not None:
            own = sum_by(answers.log_prob, self.pack.scored.request, n)
        return torch.stack([of_examples.to(own), own], -1)

    @cached_property
    def target(self) -> Tensor:
        """(questions, choices) booleans: the target choice of targeted attacks."""
        assert self.clean.scores is not None
        return self.read.target(self.clean.scores)

    def of_examples(self, values: Tensor) -> Tensor:
        """(examples,) values: the sums over requests, if a question's requests are one example."""
        if len(values) == self.examples.n:
            return values
        return sum_by(values, self._question_of_requests, self.examples.n)

    @cached_property
    def _question_of_requests(self) -> Tensor:
        sizes = [len(q.requests) for q in self.pack.questions]
        return _owners(sizes).to(self.pack.input_ids.device)

    # -- attacks ---------------------------------------------------------------------------------

    def attack(self, attack: Attack) -> Attacked:
        """Attacks the batch. Returns the point, the diagnostics, and the answers if known."""
        return self.attacks([attack])[0]

    def attacks(self, family: Sequence[Attack]) -> list[Attacked]:
        """Runs attacks that differ only in `steps` as one run with the most steps.

        Each point equals that of a separate run to the last bit.
        """
        longest = max(family, key=lambda attack: attack.points)
        ends = {attack.points: attack for attack in family}
        look = _Look(self, longest)
        attacked: dict[int, Attacked] = {}
        points: dict[int, int] = {}
        for i, x in enumerate(self._way(longest, look), 1):
            # the gradient of this step was taken at that point
            if i - 1 in attacked and look.last is not None:
                of_point = attacked[i - 1]._replace(scores=look.last)
                attacked[i - 1] = of_point._replace(curve=look.curve(points[i - 1] + 1))
            if i in ends:
                points[i] = len(look.values)
                scores = look.best if longest.keeps_best else None
                sums = self._sums(ends[i], x, look) | look.passes(scores is None)
                attacked[i] = Attacked(x, sums, scores, look.curve())
        return [attacked[attack.points] for attack in family]

    def _way(self, attack: Attack, look: _Look) -> Iterable[Tensor]:
        """The points of an attack, one after every step."""
        if attack.kind.fixed:
            assert self.fixed is not None
            return [self.fixed.added(self.pack, self.x, attack.kind.fixed, self.threat.seed)]
        if attack.kind.tied:
            return [self.tables[attack](self)]
        known, watch = self._known(attack), Watch(look.count, look.keep)
        if attack.kind.swaps:
            assert self.scorer.vocabulary is not None
            inputs = self.ball(attack), ids_of(self.pack), look.losses(), known, self.keys
            self.swapped[attack] = swap(attack, *inputs, self.scorer.vocabulary, watch)
            return [self.swapped[attack].point]
        more: Any = {"elements": self.elements, "known": known, "watch": watch}
        more |= {"keys": self.keys if attack.draws else None}
        if attack.cells is None:
            return trajectory(attack, self.x, look.losses(), **more)
        return confined(attack, self.cells(attack.cells), look.losses(), **more)

    def cells(self, name: str) -> Cells:
        """The cells of the clean point in a format."""
        if name not in self._cells:
            self._cells[name] = Cells.of(Format.of(name), self.x)
        return self._cells[name]

    def _known(self, attack: Attack) -> Known:
        """The values at the clean point that an attack need not compute again."""
        clean, gap = self.clean, None
        if clean.scores is not None and self.read.kind.gold and not self.read.kind.whole:
            gap = self.read.gap(clean.scores)
        if clean.gradient is None or not attack.uses_clean_gradient:
            return Known(gap=gap)
        assert clean.loss is not None
        return Known(self.of_examples(clean.loss), clean.gradient, gap)

    def alignment(self, attack: Attack) -> Tensor:
        """(examples, 4): x·g, x·x and g·g at the clean point, and an estimate of an amplitude.

        x is the clean point and g the gradient. x·g / sqrt(x·x g·g) is the cosine similarity of
        embeddings and gradient. The estimate is the amplitude, in a norm, that makes the answer
        wrong to first order: the distance of the loss from 0, divided by the dual norm of g. It is
        NaN if a loss of 0 does not mean a wrong answer, as with losses that do not know the gold.
        """
        assert self.clean.gradient is not None and self.clean.loss is not None
        x, g = (part.to(self._precise) for part in (self.x, self.clean.gradient))
        if self.mask is not None:
            x, g = (part * self.mask[..., None] for part in (x, g))
        sums = [self.examples.sum(part) for part in (x * g, x * x, g * g)]
        estimate = torch.full_like(sums[0], torch.nan)
        if self.read.kind.gold:
            estimate = self.clean.loss.neg().clamp(min=0) / self.ball(attack).dual(g)
        return torch.stack([part.to(estimate) for part in (*sums, estimate)], -1)

    def critical_epsilon(self, attack: Attack, adversarial: Tensor, scores: Scores) -> Tensor:
        """(questions,) norm of the perturbation that makes the answer wrong; inf if it is right.

        Args:
            attack: an attack that looks for the nearest wrong answer.
            adversarial: the point that it found.
            scores: the answers at that point.
        """
        n = len(self.pack.requests)
        sums = sum_by(scores.log_prob, self.pack.scored.request, n)
        length = self.ball(attack).length(adversarial - self.x)
        return torch.where(self.read.choices.gap(sums) > 0, length, torch.inf)

    def changes(self, attack: Attack, x: Tensor, scores: Scores) -> list[Changes]:
        """For each question, the tokens that an attack changed.

        Args:
            attack: an attack that chooses tokens.
            x: the point that it found.
            scores: the answers at that point.
        """
        sums = sum_by(scores.log_prob, self.pack.scored.request, len(self.pack.requests))
        wrong, swapped = self.read.choices.gap(sums) > 0, self.swapped.get(attack)
        how = swapped, self.scorer.vocabulary, self.clean.gradient
        return changes(attack, self.ball(attack), self.pack, x, wrong, *how)

    def _sums(self, attack: Attack, x: Tensor, look: _Look) -> dict[str, Tensor]:
        """The values that an attack which ends at `x` adds to the diagnostics."""
        wide = widest(self.x.device)
        moves = torch.ones_like(self.x[..., :1]) if self.mask is None else self.mask[..., None]
        elements = moves.sum(dtype=wide) * self.x.shape[-1]
        clean = self.x.to(self._precise)
        noise = x.to(self._precise) - clean
        return {
            "signal": (clean.square() * moves).sum(dtype=wide),
            "noise": noise.square().sum(dtype=wide),
            "elements": elements,
            **look.of_gradients(elements),
            **diagnostics.moved(attack, self.ball(attack), noise),
            **self._rounded(attack, noise),
            **self._nearest(x),
        }

    def _rounded(self, attack: Attack, noise: Tensor) -> dict[str, Tensor]:
        """Sums of the cells: the format's own rounding, and how far it goes the same way.

        The way of an attack is from the middle of the cells, so signs that are drawn have none.
        """
        if attack.cells is None:
            return {}
        cells, wide = self.cells(attack.cells), widest(self.x.device)
        moves = self.ball(attack).moves
        low, high, clean = (end.to(wide) for end in (cells.low, cells.high, cells.x))
        own = (cells.rounded.to(wide) - clean) * moves
        way = (clean + noise - (low + high) / 2) * moves
        if attack.kind.inside == "none":  # it goes to about the middle, so it has no way
            way = torch.zeros_like(way)
        sums = {"rounding": own.square(), "along": own * way, "way": way.square()}
        sums["widths"] = ((high - low) * moves).square()
        return {name: part.sum() for name, part in sums.items()}

    def _nearest(self, x: Tensor) -> dict[str, Tensor]:
        """Number of tokens that were looked up, and how many are unchanged in L2 and in Linf."""
        if self.scorer.nearest is None:
            return {}
        ids, first = self.pack.input_ids.flatten(), self.pack.first
        ids = ids if first is None else ids[first]
        chosen = diagnostics.sampled(self.keys.to(x.device), x)
        if self.mask is not None:
            chosen = chosen & self.mask
        chosen = chosen.flatten()
        l2, linf = self.scorer.nearest.unchanged(x.flatten(0, -2)[chosen], ids[chosen])
        sums = {"tokens": torch.ones_like(l2), "nearest_l2": l2, "nearest_linf": linf}
        return {name: of_tokens.sum() for name, of_tokens in sums.items()}


class _Look:
    """Keeps the scores that an attack computes on its way, so they need not be computed again.

    Args:
        batch: the batch.
        attack: the attack.

    Attributes:
        slopes: the copy that computes the losses; None if the model whose answers count does.
        values: the values of `Curve`, a tensor for each step.
        last: the scores at the last point that was evaluated.
        best: for each example, the scores at the point that `keep` marked. None if there is no
            such point, or if the scores come from the copy.
        zeros: for each used gradient, the number of its coordinates that are zero.
        changing, flat: for each used gradient, the number of examples whose loss can change, and
            of those where it is zero in every coordinate.
    """

    def __init__(self, batch: AttackedBatch, attack: Attack) -> None:
        self.batch, self.attack = batch, attack
        self.slopes = batch.slopes if attack.kind.gradient else None
        self.last: Scores | None = None
        self.best = None if self.slopes is not None else batch.clean.scores
        self.values: list[Tensor] = []
        clean = batch.clean
        if batch.trace and attack.uses_clean_gradient and clean.loss is not None:
            self.values.append(batch._values(clean.loss, clean.scores))
        self.forwards, self.backwards = self._at_the_start()
        self.zeros: list[Tensor] = []
        self.changing: list[Tensor] = []
        self.flat: list[Tensor] = []
        self.can_change = self._differs(0)

    def _at_the_start(self) -> tuple[int, int]:
        """Passes at the clean point that the attack needs, forward and backward."""
        kind, needs = self.attack.kind, Needs.of([self.attack])
        # the gap there, which another condition may have needed as well
        gap = kind.targeted and kind.adaptive and self.batch.clean.scores is not None
        answers = needs.answers or gap
        if kind.tied:  # the passes of the fit
            return (self.attack.steps + 1, self.attack.steps) if kind.gradient else (0, 0)
        if not needs.gradient:
            return int(answers), 0
        return 1 + int(answers and self.slopes is not None), 1

    def passes(self, answers: bool) -> dict[str, Tensor]:
        """The passes so far, as sums for the diagnostics.

        Args:
            answers: whether one more forward pass reads the answers.
        """
        n = self.batch.examples.n
        counts = {"points": n, "forwards": n * (self.forwards + answers)}
        counts["backwards"] = n * self.backwards
        return {name: torch.as_tensor(count) for name, count in counts.items()}

    def curve(self, n: int | None = None) -> Curve | None:
        """The first `n` steps so far; None: all of them."""
        if not self.batch.trace:
            return None
        kind = self.attack.kind
        nothing = self.batch.x.new_empty(0, len(self.batch.pack.requests), 2)
        values = torch.stack(self.values[:n]) if self.values else nothing
        return Curve(self.attack.name, int(kind.search or kind.noise), values)

    def losses(self) -> Losses:
        """The losses of the attack. They record the scores that they evaluate."""
        attack, batch, gold = self.attack, self.batch, self.batch.read.kind.gold
        targets: list[partial[Tensor]] = []
        if attack.kind.targeted and attack.kind.adaptive:
            others = range(max(1, batch.read.choices.most_others))
            targets = [partial(self._lead, other) for other in others]
        one = attack.kind.targeted and not attack.kind.adaptive
        gap = self._gap if gold else None
        return Losses(self._loss, self._target_loss if one else None, targets, gap)

    def _see(self, x: Tensor, step: bool = True) -> Scores:
        """The scores that the loss reads at a point, which may be a step of the curve."""
        scores = self.batch.watched(x, self.slopes)
        self.forwards += 1
        if x.requires_grad:
            x.register_hook(self._backward)
        if step and self.batch.trace:
            self.values.append(self.batch.values(scores))
        if self.slopes is None:
            self.last = answers_of(self.batch.pack, scores)
        return scores

    @cached_property
    def _moving(self) -> Tensor:
        """(examples,) whether the attack may move any position of the example."""
        mask = self.batch.mask
        ones = torch.ones_like(self.batch.x[..., :1])
        return self.batch.examples.largest(ones if mask is None else ones * mask[..., None]) > 0

    def _differs(self, other: int) -> Tensor:
        """(examples,) whether a loss that compares the gold with another choice can change.

        Args:
            other: the number of that choice. A question may have fewer.
        """
        read = self.batch.read
        if not read.kind.gold:
            return self._moving
        return self._moving & (read.choices.others > other)

    def _loss(self, x: Tensor) -> Tensor:
        return self.batch.of_examples(self.batch.read.value(self._see(x)))

    def _target_loss(self, x: Tensor) -> Tensor:
        """The loss of the target choice, (questions,), which targeted attacks lower."""
        read = self.batch.read
        return read.choices.margin(read.sums(self._see(x)), self.batch.target)

    def _lead(self, other: int, x: Tensor) -> Tensor:
        """(questions,) the gold's lead over one of the other choices; 0 if it does not exist."""
        read, self.can_change = self.batch.read, self._differs(other)
        return read.choices.lead(read.sums(self._see(x)), other)

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += 1

    def _gap(self, x: Tensor) -> Tensor:
        kind = self.attack.kind
        if self.slopes is not None:  # the model itself decides whether an answer is wrong
            self.forwards += 1
            return self.batch.gap(x)
        # others look only whether a point that they have evaluated is wrong
        return self.batch.read.gap(self._see(x, step=kind.minimal and not kind.adaptive))

    def count(self, gradient: Tensor) -> None:
        """Counts the zero coordinates of a gradient that is used."""
        mask, wide = self.batch.mask, widest(gradient.device)
        zero = (gradient == 0) | gradient.isnan()
        zero = zero if mask is None else zero & mask[..., None]
        self.zeros.append(zero.sum(dtype=wide))
        followed = ~zero if mask is None else ~zero & mask[..., None]
        flat = self.batch.examples.largest(followed) == 0
        self.changing.append(self.can_change.sum(dtype=wide))
        self.flat.append((flat & self.can_change).sum(dtype=wide))

    def of_gradients(self, elements: Tensor) -> dict[str, Tensor]:
        """The sums over all gradients so far that the diagnostics need, by their names.

        Args:
            elements: the number of coordinates of one gradient.
        """
        return {
            "zero_gradients": sum(self.zeros, 0 * elements),
            "gradients": elements * len(self.zeros),
            "slopes": sum(self.changing, 0 * elements),
            "flat": sum(self.flat, 0 * elements),
        }

    def keep(self, better: Tensor) -> None:
        """Marks the last point as the best so far of the examples where `better` is true."""
        if self.last is None:
            return
        if self.best is None:
            self.best = self.last
            return
        chosen = better[self._example]
        pairs = zip(self.last, self.best, strict=True)
        self.best = Scores(*(torch.where(chosen, last, best) for last, best in pairs))

    @cached_property
    def _example(self) -> Tensor:
        """(E,) the example of each scored prediction."""
        request = self.batch.pack.scored.request
        if self.batch.examples.n == len(self.batch.pack.requests):
            return request
        return self.batch._question_of_requests[request]


def _owners(sizes: list[int]) -> Tensor:
    """For question i, repeats the number i `sizes[i]` times."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes), output_size=sum(sizes))
