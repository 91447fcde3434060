"""The tokens of a question that an attack changed, and swaps of tokens for others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_attack.attacks import Attack, Ball, Known, Losses, Watch, loss_gradient
from llm_attack.attacks.apgd import Hill
from llm_attack.attacks.settings import EVERY, FIRST_ORDER
from llm_attack.attacks.sparse import gains
from llm_attack.attacks.swaps import Sentence, Swapped, Vocabulary, every, gcg, hotflip
from llm_attack.base.errors import UsageError
from llm_attack.lm.packing.pack import Pack
from llm_attack.lm.packing.positions import of_question
from llm_attack.lm.packing.questions import Question


class Change(NamedTuple):
    """One changed token.

    Attributes:
        node: number of the token in its question's trie.
        old, new: its id, and the id of the token in its place; `new` is -1 if it was not swapped.
        rms: root mean square of the change of its embedding.
        linf: largest change of a coordinate.
    """

    node: int
    old: int
    new: int
    rms: float
    linf: float


class Changes(NamedTuple):
    """The changes of one question by an attack that chooses tokens.

    Attributes:
        changed: the changed tokens; empty if the clean answer is wrong. None if no wrong answer was
            found.
        tokens: the ids of all tokens of the question, in the order of its trie.
        saliency: for each token, how much the loss rises to first order if only this token moves
            by epsilon; 0 if it may not move. Empty for swaps.
        tried, wrong: for each token, the counts of `Swapped`; empty unless tokens are swapped.
        nearest: for each token, the smallest change of its embedding by a swap: as root mean
            square, and as largest coordinate. None if the token may not be swapped. Empty unless
            tokens are swapped.
    """

    changed: list[Change] | None
    tokens: list[int]
    saliency: list[float]
    tried: list[int]
    wrong: list[int]
    nearest: list[tuple[float, float] | None]


def ids_of(pack: Pack) -> Tensor:
    """The tokens of the elements of a pack's point: (B, L), or (U,) if it has nodes."""
    return pack.input_ids if pack.first is None else pack.input_ids.flatten()[pack.first]


def prompt_of(pack: Pack) -> Tensor:
    """Whether each element is a token of the prompt that all choices share; may be swapped."""
    parts = [torch.from_numpy(_of_prompt(question)) for question in pack.questions]
    if pack.first is not None:
        prompt = torch.cat(parts)
    else:
        prompt = torch.zeros(pack.input_ids.shape, dtype=torch.bool)
        for row, part in zip(prompt, parts, strict=True):
            row[: len(part)] = part
    prompt = prompt.to(pack.input_ids.device)
    return prompt if pack.moves is None else prompt & pack.moves


def _of_prompt(question: Question) -> NDArray[np.bool_]:
    """(nodes,) whether each node is in the context of every request."""
    shared = of_question(question, "context")
    for path in question.trie.paths:
        of_path = np.zeros_like(shared)
        of_path[path] = True
        shared &= of_path
    return shared


def sizes_of(questions: Sequence[Question], positions: str) -> tuple[int, int]:
    """The largest numbers of tokens of a question that may move, and that may be swapped."""
    moving = [of_question(question, positions) for question in questions]
    prompts = (_of_prompt(q) & moves for q, moves in zip(questions, moving, strict=True))
    return max(int(m.sum()) for m in moving), max(int(p.sum()) for p in prompts)


def swap(
    attack: Attack,
    ball: Ball,
    ids: Tensor,
    losses: Losses,
    known: Known,
    keys: Tensor,
    vocabulary: Vocabulary,
    watch: Watch,
) -> Swapped:
    """Runs an attack that swaps tokens.

    Args:
        attack: the attack; its epsilon is the number of tokens.
        ball: the clean point, with only those tokens moving that may be swapped.
        ids: the tokens.
        losses: `loss` and `gap`.
        known: values at the clean point.
        keys: seeds of the draws.
        vocabulary: the tokens to take.
        watch: gets every gradient.
    """
    loss = losses.loss
    assert loss is not None

    def slope(point: Tensor) -> tuple[Tensor, Tensor]:
        gradient = loss_gradient(loss, point)
        watch.on_gradient(gradient)
        usable = gradient.masked_fill(gradient.isnan() | ~ball.moves, 0)
        return usable.flatten(1).sum(-1), usable

    def value(function: object, point: Tensor) -> Tensor:
        assert callable(function)
        with torch.no_grad():
            values: Tensor = function(point)
        return values.masked_fill(values.isnan(), -torch.inf)

    clean_slope = known.gradient
    if clean_slope is not None:
        watch.on_gradient(clean_slope)
        clean_slope = clean_slope.masked_fill(clean_slope.isnan() | ~ball.moves, 0)
    gap = Hill(lambda point: value(losses.gap, point), slope, known.gap)
    hill = Hill(lambda point: value(loss, point), slope, known.loss, clean_slope)
    sentence = Sentence(gap, ball, ids, vocabulary)
    if attack.kind.swaps == EVERY:
        return every(sentence)
    if attack.kind.swaps == FIRST_ORDER:
        used = hill.slope(ball.x)[1] if clean_slope is None else clean_slope
        return hotflip(sentence, used, candidates=attack.candidates)
    how = {"steps": attack.steps, "candidates": attack.candidates}
    return gcg(sentence, hill, keys, swaps=round(attack.epsilon), **how)


def changes(
    attack: Attack,
    ball: Ball,
    pack: Pack,
    point: Tensor,
    wrong: Tensor,
    swapped: Swapped | None,
    vocabulary: Vocabulary | None,
    gradient: Tensor | None,
) -> list[Changes]:
    """The changes of each question by an attack that chooses tokens. Waits for the device.

    Args:
        attack: the attack.
        ball: the clean point, and what may move.
        pack: the batch.
        point: the attacked point.
        wrong: (questions,) whether the answer there is wrong.
        swapped: the result of `swap`; None for other attacks.
        vocabulary: the tokens that a swap could take; None for other attacks.
        gradient: gradient of the loss at the clean point, if it is known.
    """
    ids, noise = ids_of(pack).flatten(), (point - ball.x).flatten(0, -2).double()
    new = None if swapped is None else swapped.ids.flatten()
    moved = (noise != 0).any(-1) if new is None else new != ids
    rms, linf = noise.square().mean(-1).sqrt().tolist(), noise.abs().amax(-1).tolist()
    saliency = None
    if attack.kind.sparse and gradient is not None:
        slope = gradient.masked_fill(gradient.isnan() | ~ball.moves, 0)
        saliency = (attack.epsilon * gains(slope, ball)).tolist()
    movable, found = ball.moves.expand_as(ball.x).any(-1).flatten(), []
    for i, (start, n) in enumerate(_places(pack)):
        node = range(start, start + n)
        changed = [
            Change(e - start, int(ids[e]), -1 if new is None else int(new[e]), rms[e], linf[e])
            for e in node
            if moved[e]
        ]
        tokens = ids[start : start + n].tolist()
        of_tokens = [] if saliency is None else saliency[start : start + n]
        tried, errors = list[int](), list[int]()
        nearest: list[tuple[float, float] | None] = []
        if swapped is not None and vocabulary is not None:
            of_node = slice(start, start + n)
            tried, errors = swapped.tried[of_node].tolist(), swapped.wrong[of_node].tolist()
            nearest = [
                vocabulary.nearest(token) if movable[e] else None
                for e, token in zip(node, tokens, strict=True)
            ]
        found.append(
            Changes(changed if wrong[i] else None, tokens, of_tokens, tried, errors, nearest)
        )
    return found


def _places(pack: Pack) -> list[tuple[int, int]]:
    """For each question, its first element in the point, and the number of its nodes."""
    sizes = [len(question.trie) for question in pack.questions]
    length = pack.input_ids.shape[1]
    if pack.first is None:
        return [(row * length, n) for row, n in enumerate(sizes)]
    ends = np.cumsum(sizes).tolist()
    return [(end - n, n) for end, n in zip(ends, sizes, strict=True)]


def vocabulary_for(embedding: torch.nn.Module, ids: list[int], size: int) -> Vocabulary:
    """The tokens that may be put in place of others.

    Args:
        embedding: the model's input embedding.
        ids: the tokens of the tokenizer without special ones.
        size: number of rows of the embedding.

    Raises:
        UsageError: there are none.
    """
    allowed = sorted(token for token in {*ids} if 0 <= token < size)
    if not allowed:
        raise UsageError("tokenizer: must have tokens that are not special, to swap tokens")
    weight = next(embedding.parameters())

    def embed(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            rows: Tensor = embedding(tokens)
        return rows

    return Vocabulary(embed, torch.tensor(allowed, device=weight.device))
