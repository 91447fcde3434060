"""Packs: a batch of questions as tensors, and which of the model's logits are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_attack.attacks import keys_for
from llm_attack.lm.questions import Question


@dataclass(frozen=True)
class Entries:
    """Predictions to look up: E (position, token) pairs, at P distinct positions.

    Attributes:
        positions: (P,) flat indices into batch x sequence, where logits are needed.
        slot: (E,) index into `positions`.
        target: (E,) the token that is predicted there.
        request: (E,) the request that the prediction belongs to.
        continuation: (E,) whether the token is one of the request's continuation.
    """

    positions: Tensor
    slot: Tensor
    target: Tensor
    request: Tensor
    continuation: Tensor

    def to(self, device: torch.device) -> Entries:
        """The same entries with their tensors on `device`."""
        return Entries(**{k: v.to(device) for k, v in vars(self).items()})

    def of_continuations(self) -> Entries:
        """Only the predictions of continuations."""
        keep = self.continuation
        used, slot = self.slot[keep].unique(return_inverse=True)
        return Entries(
            self.positions[used], slot, self.target[keep], self.request[keep], keep[keep]
        )


@dataclass(frozen=True)
class Pack:
    """One row per request, padded on the right.

    Attributes:
        input_ids: (B, L) int64.
        mask: (B, L) booleans, False on padding.
        entries: a prediction for each token of each request but its first, in order of requests.
        questions: what was packed; request i is row i.
        node: (B, L) index of each token's node: tokens of a question with the same prefix are one
            node, padding is node 0. Perturbations that the choices share live on nodes.
        first: (U,) flat index into B x L of a token of each node.
    """

    input_ids: Tensor
    mask: Tensor
    entries: Entries
    questions: Sequence[Question]
    node: Tensor
    first: Tensor

    @property
    def n_requests(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> Pack:
        """The same pack with its tensors on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            mask=self.mask.to(device),
            entries=self.entries.to(device),
            node=self.node.to(device),
            first=self.first.to(device),
        )

    def row_keys(self, seed: int) -> Tensor:
        """(B,) int64: draws keyed by the request's own tokens."""
        return torch.tensor([keys_for(seed, r.tokens) for r in _requests(self.questions)])

    def node_keys(self, seed: int) -> Tensor:
        """(U,) int64: draws keyed by the tokens up to and including the node's."""
        rows = [r.inputs for r in _requests(self.questions)]
        length = self.input_ids.shape[1]
        prefixes = ((rows[i // length], i % length) for i in self.first.tolist())
        return torch.tensor([keys_for(seed, row[: at + 1]) for row, at in prefixes])


def _requests(questions: Sequence[Question]) -> list:
    return [r for q in questions for r in q.requests]


def pack_rows(questions: Sequence[Question], pad: int = 0) -> Pack:
    """Pack with a row for each request; shapes are (requests, longest request's inputs).

    The model needs no attention mask for it: padding stands behind everything that is looked at,
    where a causal model cannot see it.
    """
    rows = _requests(questions)
    read = torch.tensor([len(r.inputs) for r in rows])
    predicted = torch.tensor([len(r.tokens) - 1 for r in rows])
    scored = torch.tensor([r.n_continuation for r in rows])
    length = int(read.max())
    input_ids = torch.full((len(rows), length), pad)
    targets = torch.full((len(rows), length), pad)
    for i, r in enumerate(rows):
        input_ids[i, : len(r.inputs)] = torch.tensor(r.inputs)
        targets[i, : len(r.tokens) - 1] = torch.tensor(r.tokens[1:])
    column = torch.arange(length).expand(len(rows), -1)
    known = column < predicted[:, None]
    positions = known.flatten().nonzero().squeeze(1)
    entries = Entries(
        positions=positions,
        slot=torch.arange(len(positions)),
        target=targets[known],
        request=torch.arange(len(rows)).repeat_interleave(predicted),
        continuation=(column >= (predicted - scored)[:, None])[known],
    )
    node, first = _nodes(questions, length)
    return Pack(input_ids, column < read[:, None], entries, questions, node, first)


def _nodes(questions: Sequence[Question], length: int) -> tuple[Tensor, Tensor]:
    """`node` and `first` of a `Pack`: a trie over the tokens of each question."""
    first: list[int] = []
    node: list[list[int]] = []
    for question in questions:
        children: dict[tuple[int, int], int] = {}
        for r in question.requests:
            at, row = -1, []
            for column, token in enumerate(r.inputs):
                child = children.get((at, token))
                if child is None:
                    child = children[at, token] = len(first)
                    first.append(len(node) * length + column)
                row.append(child)
                at = child
            node.append(row + [0] * (length - len(row)))
    return torch.tensor(node), torch.tensor(first)
