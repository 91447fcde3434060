"""Packs: a batch of questions as tensors, and the positions of the logits that are read.

There are three layouts:

- a row per request
- a row per request, with a perturbation that the choices share
- a row per question, as a tree that holds the shared prefix of its requests once
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llm_attack.attacks import keys_for
from llm_attack.lm.packing.positions import ALL, of_question, of_request
from llm_attack.lm.packing.prefix import space
from llm_attack.lm.packing.questions import PairRequest, Question, Request
from llm_attack.lm.packing.trie import Trie, build

_MOST_NODES = 0.8  # share of the tokens: with more, copying to twins costs as much as it saves
_MOST_REAL = 0.97  # share of the positions: with more, copying costs as much as padding


@dataclass(frozen=True)
class Entries:
    """Predictions to look up: E (position, token) pairs, at P distinct positions.

    Attributes:
        positions: (P,) flat indices into batch x sequence at which logits are needed, ascending.
        slot: (E,) index into `positions`.
        target: (E,) the predicted token.
        request: (E,) the request that the prediction belongs to, ascending.
        continuation: (E,) whether the token belongs to the request's continuation.
    """

    positions: Tensor
    slot: Tensor
    target: Tensor
    request: Tensor
    continuation: Tensor

    def to(self, device: torch.device) -> Entries:
        """The same entries with their tensors on `device`."""
        return Entries(**{k: _send(v, device) for k, v in vars(self).items()})


@dataclass(frozen=True)
class Flat:
    """The N tokens of B x L positions as one sequence without padding.

    Attributes:
        shape: (B, L).
        real: (N,) flat position of each token in the rows, ascending.
        number: (B x L,) the token of each position, from 0 to N - 1; 0 on padding.
    """

    shape: tuple[int, int]
    real: Tensor
    number: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Flat | None:
        """Makes it from the lengths of the rows; None if there is too little padding."""
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        (real,) = mask.ravel().nonzero()
        if len(real) > _MOST_REAL * mask.size:
            return None
        number = np.zeros(mask.size, np.int64)
        number[real] = np.arange(len(real))
        return cls((mask.shape[0], mask.shape[1]), *map(torch.from_numpy, (real, number)))

    def to(self, device: torch.device) -> Flat:
        """The same with its tensors on `device`."""
        return Flat(self.shape, _send(self.real, device), _send(self.number, device))


@dataclass(frozen=True)
class Twins:
    """Twins: equal tokens behind equal prefixes in different rows. Twins share a node.

    Attributes:
        node: (B x L,) the node of each token, from 0 to U - 1; padding is node 0.
        first: (U,) flat position of one token of each node.
        entries: the P different watched predictions, each with its own slot. Predictions of twins
            appear once.
        of_entry: (E,) index into `entries` of each watched prediction.
        at: (E,) flat position of each watched prediction.
    """

    node: Tensor
    first: Tensor
    entries: Entries
    of_entry: Tensor
    at: Tensor

    def to(self, device: torch.device) -> Twins:
        """The same with its tensors on `device`."""
        parts = {k: _send(v, device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, entries=self.entries.to(device), **parts)

    def flat(self, flat: Flat) -> Twins:
        """The same with places in the sequence of `flat` for those in the rows."""
        positions = flat.number[self.entries.positions]
        return replace(
            self,
            node=self.node[flat.real],
            first=flat.number[self.first],
            entries=replace(self.entries, positions=positions),
            at=flat.number[self.at],
        )


class Inputs(NamedTuple):
    """The inputs of a forward pass of the model: B rows of tokens, of length L.

    Attributes:
        tokens: (B, L) int64.
        depth, end: (B, L) of the trees (see `Trie`); None with a row per request.
        prefix: number of tokens before each row, whose keys and values were computed before.
        part: see `Pack`.
    """

    tokens: Tensor
    depth: Tensor | None
    end: Tensor | None
    prefix: int = 0
    part: Tensor | None = None

    def attention(self, dtype: torch.dtype) -> Tensor | None:
        """(B, 1, L, prefix + L) mask that is added to the attention's scores.

        It is None if the model's own causal mask will do. A token sees itself and the tokens before
        it in the requests that it belongs to. Padding sees itself. With a row per request, padding
        comes after all tokens that are read, so a causal model does not see it.
        """
        if self.end is None:
            return None
        at = torch.arange(self.end.shape[1], device=self.end.device)
        seen = (at <= at[:, None]) & (at[:, None] < self.end[:, None, :])
        seen = nn.functional.pad(seen, (self.prefix, 0), value=True)
        scores = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return scores.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)

    def some(self, rows: Sequence[int], length: int) -> Inputs:
        """The first `length` tokens of some rows."""
        depth, end, part = (
            None if x is None else x[list(rows), :length] for x in (self.depth, self.end, self.part)
        )
        return Inputs(self.tokens[list(rows), :length], depth, end, self.prefix, part)


@dataclass(frozen=True)
class Pack:
    """Rows of tokens, padded on the right: B of them, of length L.

    Attributes:
        questions: the questions.
        input_ids: (B, L) int64.
        mask: (B, L) booleans, False on padding.
        scored: a prediction for each token of the continuations, in order of requests.
        watched: the predictions that a loss may need: all tokens of the requests except their
            first, or the same as `scored`.
        kept: indices of `scored` among `watched`.
        depth, end: (B, L) of the trees (see `Trie`); None with a row per request.
        node: (B, L) with a row per request and a shared point: the node of each token, from 0 to
            U - 1. Equal tokens of a question behind equal prefixes have one node, and padding has
            node 0.
        first: (U,) flat index into B x L of one token of each node.
        moves: (B, L), or (U,) if there are nodes, booleans: whether a token may be perturbed; None:
            all except padding.
        prefix: the first tokens of every row, which are computed once. None of them moves, and no
            prediction is read before the last of them.
        twins: tokens that rows have in common, if there are enough of them.
        limit: largest number of tokens of a forward, unless one row has more.
        flat: with a row per request, the rows without padding, if there is enough padding.
        part: (B, L) of an encoder-decoder model: 1 for tokens of the encoder, 2 for those of the
            decoder, which come after them, 0 for padding; None for other models.
    """

    questions: Sequence[Question]
    input_ids: Tensor
    mask: Tensor
    scored: Entries
    watched: Entries
    kept: Tensor
    depth: Tensor | None = None
    end: Tensor | None = None
    node: Tensor | None = None
    first: Tensor | None = None
    moves: Tensor | None = None
    prefix: tuple[int, ...] = ()
    twins: Twins | None = None
    limit: int = sys.maxsize
    flat: Flat | None = None
    part: Tensor | None = None

    @cached_property
    def requests(self) -> list[Request]:
        return [r for q in self.questions for r in q.requests]

    def to(self, device: torch.device) -> Pack:
        """The same pack with its tensors on `device`."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: _send(value, device) if isinstance(value, Tensor) else value.to(device)
            for name, value in content.items()
            if isinstance(value, (Entries, Flat, Tensor, Twins))
        }
        return replace(self, **moved)

    @property
    def inputs(self) -> Inputs:
        """The input of all rows, after the prefix."""
        n = len(self.prefix)
        depth, end = (None if x is None else x[:, n:] for x in (self.depth, self.end))
        end = None if end is None else end - n
        return Inputs(self.input_ids[:, n:], depth, end, n, self.part)

    @property
    def space(self) -> int:
        """The number of tokens that the pack counts for, padding included."""
        rows, length = self.input_ids.shape
        return rows * space(length, len(self.prefix))

    @property
    def longest(self) -> list[int]:
        """For each row, the number of tokens that the model reads for its longest request."""
        if self.end is None:
            return [len(r.inputs) for r in self.requests]
        return [q.longest for q in self.questions]

    def keys(self, seed: int) -> Tensor:
        """Keys of random draws: (B,) hashes of the requests' own tokens.

        If the point is shared, they are (B, L) or (U,) hashes of all tokens up to that of the node.
        """
        if self.end is None and self.node is None:
            return torch.tensor([keys_for(seed, r.tokens) for r in self.requests])
        tries = [q.trie.keys(seed) for q in self.questions]
        if self.node is not None:
            return torch.tensor([key for of_tree in tries for key in of_tree])
        keys = torch.zeros(self.input_ids.shape, dtype=torch.int64)
        for row, of_tree in zip(keys, tries, strict=True):
            row[: len(of_tree)] = torch.tensor(of_tree)
        return keys


def pack_rows(
    questions: Sequence[Question],
    pad: int = 0,
    *,
    shared: bool = False,
    whole: bool = False,
    positions: str = ALL,
    prefix: int = 0,
) -> Pack:
    """Packs questions with a row per request.

    Args:
        questions: the questions.
        pad: token id of padding.
        shared: whether the pack gets the nodes of the questions' tries.
        whole: whether the predictions of all tokens are watched, not only the continuations'.
        positions: the tokens that may be perturbed; see `lm.packing.positions`.
        prefix: number of tokens at the start of all requests that are computed once.
    """
    rows = [build([r.inputs]) for q in questions for r in q.requests]
    pack = _pack(questions, rows, pad, whole, prefix, twins=not (shared or prefix))
    if not prefix:
        pack = replace(pack, flat=Flat.of([len(row) for row in rows]))
    if not shared:
        return _with_moves(pack, [of_request(r, positions) for r in pack.requests], positions)
    node = np.zeros(pack.input_ids.shape, np.int64)
    first = np.empty(sum(len(q.trie) for q in questions), np.int64)
    row, base = 0, 0
    for question in questions:
        for path in question.trie.paths:
            node[row, : len(path)] = base + path
            first[base + path] = row * node.shape[1] + np.arange(len(path))
            row += 1
        base += len(question.trie)
    moves = None
    if not _all_move(pack, positions):
        moves = torch.from_numpy(np.concatenate([of_question(q, positions) for q in questions]))
    return replace(pack, node=torch.from_numpy(node), first=torch.from_numpy(first), moves=moves)


def pack_trees(
    questions: Sequence[Question],
    pad: int = 0,
    *,
    whole: bool = False,
    positions: str = ALL,
    prefix: int = 0,
) -> Pack:
    """Packs questions with a row per question, as a tree; arguments as for `pack_rows`."""
    tries = [q.trie for q in questions]
    pack = _pack(questions, tries, pad, whole, prefix)
    length = pack.input_ids.shape[1]
    depth = np.zeros((len(tries), length), np.int64)
    end = np.tile(np.arange(1, length + 1), (len(tries), 1))
    for row, trie in enumerate(tries):
        depth[row, : len(trie)] = trie.depth
        end[row, : len(trie)] = trie.end
    pack = _with_moves(pack, [of_question(q, positions) for q in questions], positions)
    return replace(pack, depth=torch.from_numpy(depth), end=torch.from_numpy(end))


def _twins(tries: Sequence[Trie], length: int, arrays: Sequence[NDArray[Any]]) -> Twins | None:
    """The twins of rows; None if there are too few.

    Args:
        tries: tries of rows with one request each.
        length: length of the rows.
        arrays: flat positions, targets, requests and continuation of the watched predictions.
    """
    trie = build([t.tokens.tolist() for t in tries])
    if len(tries) == 1 or len(trie) > _MOST_NODES * sum(map(len, tries)):
        return None
    node = np.zeros((len(tries), length), np.int64)
    first = np.empty(len(trie), np.int64)
    for row, path in enumerate(trie.paths):
        node[row, : len(path)] = path
        first[path] = row * length + np.arange(len(path))
    at, target, *_ = arrays
    pairs = np.stack([node.flatten()[at], target], 1)
    _, some, of_entry = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
    kept = [torch.from_numpy(array[some]) for array in arrays]
    return Twins(
        node=torch.from_numpy(node.flatten()),
        first=torch.from_numpy(first),
        entries=Entries(kept[0], torch.arange(len(some)), *kept[1:]),
        of_entry=torch.from_numpy(of_entry.reshape(-1)),  # numpy 2.0 gives it another shape
        at=torch.from_numpy(at),
    )


def _all_move(pack: Pack, positions: str) -> bool:
    """Whether all tokens of a pack may be perturbed."""
    return positions == ALL and pack.part is None


def _with_moves(pack: Pack, rows: Sequence[NDArray[np.bool_]], positions: str) -> Pack:
    """The pack with `moves` set: tokens may be perturbed where `rows` is true."""
    if _all_move(pack, positions):
        return pack
    moves = np.zeros(pack.input_ids.shape, np.bool_)
    for row, of_row in zip(moves, rows, strict=True):
        row[: len(of_row)] = of_row
    return replace(pack, moves=torch.from_numpy(moves))


def _pack(
    questions: Sequence[Question],
    tries: Sequence[Trie],
    pad: int,
    whole: bool,
    prefix: int,
    twins: bool = False,
) -> Pack:
    """Makes rows of the tokens of `tries`, whose paths are the requests of `questions` in order."""
    lengths = np.array([len(t) for t in tries])
    length = int(lengths.max())
    input_ids = np.full((len(tries), length), pad, np.int64)
    for row, trie in enumerate(tries):
        input_ids[row, : len(trie)] = trie.tokens
    paths = [row * length + path for row, trie in enumerate(tries) for path in trie.paths]
    requests = [r for q in questions for r in q.requests]
    predicted = np.array([len(r.predicted) for r in requests])
    request = np.repeat(np.arange(len(requests)), predicted)
    at = np.concatenate([path[r.predicts] for path, r in zip(paths, requests, strict=True)])
    target = np.concatenate([r.predicted for r in requests]).astype(np.int64)
    left = np.arange(len(at)) - np.repeat(
        predicted.cumsum(), predicted
    )  # indices from the end, < 0
    continuation = left >= -np.repeat([r.n_continuation for r in requests], predicted)
    scored_of = continuation.nonzero()[0]
    # predictions inside of the prefix add a constant to a loss
    watched_of = (at % length >= prefix).nonzero()[0] if whole else scored_of

    arrays: tuple[NDArray[Any], ...] = at, target, request, continuation

    def entries(some: NDArray[np.intp]) -> Entries:
        positions, slot = np.unique(at[some], return_inverse=True)
        others = (array[some] for array in arrays[1:])
        return Entries(*map(torch.from_numpy, (positions, slot, *others)))

    scored = entries(scored_of)
    mask = np.arange(length) < lengths[:, None]
    pairs = isinstance(requests[0], PairRequest)
    part = np.where(input_ids < 0, 2, 1) * mask if pairs else None
    return Pack(
        questions,
        input_ids=torch.from_numpy(np.where(input_ids < 0, ~input_ids, input_ids)),
        mask=torch.from_numpy(mask),
        scored=scored,
        watched=entries(watched_of) if whole else scored,
        kept=torch.from_numpy(np.searchsorted(watched_of, scored_of)),
        prefix=requests[0].tokens[:prefix],
        twins=_twins(tries, length, [array[watched_of] for array in arrays]) if twins else None,
        part=None if part is None else torch.from_numpy(part),
    )


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for the device."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
