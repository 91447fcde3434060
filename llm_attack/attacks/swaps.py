"""Swaps of tokens: points whose moved elements are the embeddings of other tokens.

HotFlip (Ebrahimi et al. 2018) estimates by the gradient how much each swap raises the loss. GCG
(Zou et al. 2023) draws swaps among those with the best estimates, and keeps the best of each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from llm_attack.attacks.apgd import Hill
from llm_attack.attacks.draws import rehashed, uniform, words
from llm_attack.attacks.norms import Ball, widest
from llm_attack.attacks.sparse import Owned

TOP = 256
"""GCG draws among this number of tokens at each place, as the paper does."""

_BLOCK = 4096  # tokens of the vocabulary that are embedded at a time


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that may take the place of others.

    Attributes:
        embed: ids -> embeddings, (..., H), as the model reads them.
        allowed: (V,) ids.
    """

    embed: Callable[[Tensor], Tensor]
    allowed: Tensor
    _nearest: dict[int, tuple[float, float]] = field(default_factory=dict, init=False, repr=False)

    def nearest(self, token: int) -> tuple[float, float]:
        """The smallest change of its embedding by a swap: root mean square, largest coordinate.

        The two minima may belong to different swaps. They are infinite if there is no other token.
        """
        if token not in self._nearest:
            own = self.embed(self.allowed.new_tensor([token])).to(torch.float32)
            rms = linf = math.inf
            for block in self.allowed[self.allowed != token].split(_BLOCK):
                change = (self.embed(block) - own).abs()
                rms = min(rms, float(change.square().mean(-1).min().sqrt()))
                linf = min(linf, float(change.amax(-1).min()))
            self._nearest[token] = rms, linf
        return self._nearest[token]


class Swapped(NamedTuple):
    """The result of a search for swaps.

    Attributes:
        point: the point. If several swaps make the answer wrong, it has the shortest. If no swap
            does, it has the greatest gap, or after several steps the greatest loss.
        ids: its tokens, in the shape of the point without its last dimension.
        tried: (E,) the number of evaluated points with a new token at each element.
        wrong: (E,) the number of those points with a wrong answer. GCG asks only for the best of
            each step.
    """

    point: Tensor
    ids: Tensor
    tried: Tensor
    wrong: Tensor


class Pairs(NamedTuple):
    """One swap for each example.

    Attributes:
        element: (n,) the element that gets another token.
        token: (n,) this token.
        exists: (n,) whether the example has this swap.
    """

    element: Tensor
    token: Tensor
    exists: Tensor


class Gains(NamedTuple):
    """The swaps of each element with the greatest first-order gains, best first.

    Attributes:
        value: (E, K) the gradient times the change of the embedding; -inf if there is no such swap.
        token: (E, K) the new token.
    """

    value: Tensor
    token: Tensor


def first_order(slope: Tensor, x: Tensor, ids: Tensor, vocabulary: Vocabulary, n: int) -> Gains:
    """The best `n` swaps of each element by HotFlip's estimate.

    Args:
        slope: gradient of the loss, like `x`.
        x: embeddings, (..., H).
        ids: their tokens.
        vocabulary: the tokens to take.
        n: number of swaps of each element; fewer if the vocabulary is smaller.
    """
    wide = widest(x.device)
    g = slope.flatten(0, -2).to(wide)
    own, ids = (g * x.flatten(0, -2)).sum(-1, keepdim=True), ids.flatten()
    value, token = g.new_empty(len(g), 0), ids.new_empty(len(g), 0)
    for block in vocabulary.allowed.split(_BLOCK):
        gain = g @ vocabulary.embed(block).to(wide).T - own
        gain = gain.masked_fill(block == ids[:, None], -torch.inf)
        value = torch.cat([value, gain], -1)
        token = torch.cat([token, block.expand(len(g), -1)], -1)
        value, best = value.topk(min(n, value.shape[-1]), -1)
        token = token.gather(-1, best)
    return Gains(value, token)


@dataclass
class Sentence:
    """The tokens that are searched, and the best result so far.

    Args:
        gap: above 0 if the answer is wrong; only its values are read. None: no answer is wrong.
        ball: the clean point and its examples. Tokens that do not move are not swapped.
        ids: its tokens.
        vocabulary: the tokens that may take their places.
    """

    gap: Hill | None
    ball: Ball
    ids: Tensor
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        clean = None if self.gap is None else self.gap.clean_value
        self.value = self.gap_at(self.ball.x) if clean is None else clean
        self.right = self.value <= 0
        self.elements = Owned.of(self.ball)
        self.point, self.now = self.ball.x, self.ids.flatten()
        self.length = torch.full_like(self.ball.length(self.ball.x - self.ball.x), torch.inf)
        self.tried = torch.zeros_like(self.now)
        self.wrong = torch.zeros_like(self.tried)

    def gap_at(self, point: Tensor) -> Tensor:
        """(n,) the gap at a point."""
        if self.gap is None:
            return torch.zeros(self.ball.examples.n, device=point.device)
        return self.gap.value(point)

    def swapped(self, point: Tensor, ids: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The point and the tokens after one swap in each example that has it."""
        element, token = pairs.element[pairs.exists], pairs.token[pairs.exists]
        rows = point.flatten(0, -2).clone()
        rows[element] = self.vocabulary.embed(token).to(rows.dtype)
        ids = ids.clone()
        ids[element] = token
        return rows.reshape(point.shape), ids

    def try_out(self, pairs: Pairs) -> None:
        """Tries one swap of the clean tokens of each example whose clean answer is right."""
        pairs = pairs._replace(exists=pairs.exists & self.right)
        point, ids = self.swapped(self.ball.x, self.ids.flatten(), pairs)
        value, length = self.gap_at(point), self.ball.length(point - self.ball.x)
        wrong = pairs.exists & (value > 0)
        self.count(pairs, wrong)
        none = self.length.isinf()
        taken = (wrong & (length < self.length)) | (
            pairs.exists & none & (self.value < value) & ~wrong
        )
        self.take(taken, point, ids)
        self.value = torch.where(taken, value, self.value)
        self.length = torch.where(taken & wrong, length, self.length)

    def count(self, pairs: Pairs, wrong: Tensor) -> None:
        """Counts evaluated swaps, and those of them with a wrong answer."""
        self.tried = self.tried.index_add(0, pairs.element, pairs.exists.long())
        self.wrong = self.wrong.index_add(0, pairs.element, wrong.long())

    def take(self, taken: Tensor, point: Tensor, ids: Tensor) -> None:
        """Keeps point and tokens of the examples in `taken`."""
        self.point = self.ball.where(taken, point, self.point)
        self.now = torch.where(taken[self.elements.owner], ids, self.now)

    @property
    def result(self) -> Swapped:
        return Swapped(self.point, self.now.reshape(self.ids.shape), self.tried, self.wrong)


def every(sentence: Sentence) -> Swapped:
    """Tries every swap of one token."""
    for pairs in _every(sentence) if sentence.right.any() else ():
        sentence.try_out(pairs)
    return sentence.result


def _every(sentence: Sentence) -> Iterator[Pairs]:
    elements, ids = sentence.elements, sentence.ids.flatten()
    rank, sizes = elements.ranks(elements.moves.double()), elements.sizes
    for place in range(int(sizes.max())):
        here = (rank == place) & elements.moves
        element = torch.zeros_like(sizes)
        element[elements.owner[here]] = here.nonzero().flatten()
        for token in sentence.vocabulary.allowed:
            exists = (sizes > place) & (ids[element] != token)
            yield Pairs(element, token.expand(len(element)), exists)


def hotflip(sentence: Sentence, slope: Tensor, *, candidates: int) -> Swapped:
    """Tries the swaps of one token with the greatest first-order gains.

    Args:
        sentence: the clean tokens.
        slope: gradient of the loss at the clean point.
        candidates: number of swaps of each example to try.
    """
    ids, x = sentence.ids, sentence.ball.x
    of_elements = first_order(slope, x, ids, sentence.vocabulary, candidates)
    elements, width = sentence.elements, of_elements.value.shape[-1]
    value = of_elements.value.masked_fill(~elements.moves[:, None], -torch.inf).flatten()
    spread = Owned(elements.owner.repeat_interleave(width), value.isfinite(), elements.n)
    rank = spread.ranks(value)
    for i in range(candidates):
        here = ((rank == i) & spread.moves).nonzero().flatten()
        if not len(here) or not sentence.right.any():
            break
        element, token = torch.zeros(2, elements.n, dtype=torch.int64, device=ids.device)
        exists = torch.zeros(elements.n, dtype=torch.bool, device=ids.device)
        at = spread.owner[here]
        element[at], token[at] = here // width, of_elements.token.flatten()[here]
        exists[at] = True
        sentence.try_out(Pairs(element, token, exists))
    return sentence.result


def gcg(
    sentence: Sentence, hill: Hill, keys: Tensor, *, swaps: int, steps: int, candidates: int
) -> Swapped:
    """Greedy coordinate gradient: at most `swaps` tokens change, one for each step.

    A step draws swaps among the `TOP` with the greatest first-order gains at each place, and takes
    the one with the greatest loss, even if the loss was greater before. If `swaps` tokens have
    changed, only these change again. The search of an example ends with the first wrong answer.

    Args:
        sentence: the clean tokens.
        hill: the loss that is raised.
        keys: seeds of the draws; see `perturb`.
        swaps: largest number of tokens that differ.
        steps: number of steps.
        candidates: number of swaps that each step draws and evaluates.
    """
    ball, ids, vocabulary = sentence.ball, sentence.ids, sentence.vocabulary
    point, now = ball.x, sentence.now
    best, slope = torch.full_like(sentence.value, -torch.inf), hill.clean_slope
    for step in range(steps):
        if not sentence.right.any():
            break
        if slope is None or step:
            _, slope = hill.slope(point)
        of_elements = first_order(slope, point, now.reshape(ids.shape), vocabulary, TOP)
        keys = rehashed(keys)
        drawn = _drawn(sentence, of_elements, now, keys, swaps, candidates)
        value = torch.full_like(best, -torch.inf)
        after, tokens, last = point, now, torch.zeros_like(sentence.elements.sizes)
        for pairs in drawn:
            tried, of_try = sentence.swapped(point, now, pairs)
            of_loss = hill.value(tried)
            sentence.count(pairs, torch.zeros_like(pairs.exists))
            better = pairs.exists & (of_loss > value)
            last = torch.where(better, pairs.element, last)
            value = torch.where(better, of_loss, value)
            after = ball.where(better, tried, after)
            tokens = torch.where(better[sentence.elements.owner], of_try, tokens)
        point, now = after, tokens
        wrong = sentence.right & value.isfinite()
        wrong = wrong & (sentence.gap_at(point) > 0)
        sentence.take(wrong | (sentence.right & (value > best)), point, now)
        best = torch.maximum(best, value)
        sentence.wrong = sentence.wrong.index_add(0, last, wrong.long())
        sentence.right = sentence.right & ~wrong
    return sentence.result


def _drawn(
    sentence: Sentence, of_elements: Gains, now: Tensor, keys: Tensor, swaps: int, candidates: int
) -> Iterator[Pairs]:
    """Draws the swaps of a step: a place, uniformly, and one of its best tokens, uniformly."""
    elements, ball = sentence.elements, sentence.ball
    changed = now != sentence.ids.flatten()
    n_changed = elements.sizes.new_zeros(elements.n).index_add(0, elements.owner, changed.long())
    free = (n_changed < swaps)[elements.owner]
    places = elements._replace(moves=elements.moves & (changed | free))
    rank, sizes = places.ranks(places.moves.double()), places.sizes
    first = torch.zeros(elements.n, max(1, int(sizes.max())), dtype=torch.int64, device=now.device)
    first[places.owner[places.moves], rank[places.moves]] = places.moves.nonzero().flatten()
    moves = ball.moves.expand_as(ball.x).any(-1, keepdim=True)
    of_example = ball.examples.sum(words(keys, ball.x[..., :1]) * moves)
    wide = ball.x.new_empty(elements.n, 2 * candidates, dtype=widest(now.device))
    draws = (1 + uniform(of_example, wide)) / 2
    width = of_elements.token.shape[-1]
    example = torch.arange(elements.n, device=now.device)
    for i in range(candidates):
        place = (draws[:, 2 * i] * sizes).long().clamp(max=sizes.clamp(min=1) - 1)
        element = first[example, place]
        which = (draws[:, 2 * i + 1] * width).long().clamp(max=width - 1)
        possible = of_elements.value[element, which].isfinite() & (sizes > 0) & sentence.right
        yield Pairs(element, of_elements.token[element, which], possible)
