"""Perturbations that were found before: universal ones, and those that a run has stored.

A perturbation is a table of rows (R, H). `Fixed` says which row belongs to each token of a pack.
The controls keep the size of each coordinate, and change its sign.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_attack.attacks import keys_for
from llm_attack.attacks.draws import signs, words
from llm_attack.attacks.settings import KEPT, SHUFFLED
from llm_attack.base.tensors import widened
from llm_attack.lm.engine.moving import moving
from llm_attack.lm.fixed import POSITION, TOKEN
from llm_attack.lm.packing.pack import Pack


class Fixed(ABC):
    """A perturbation that does not depend on the model that it is added to."""

    @abstractmethod
    def rows(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """The perturbation of the N tokens of a pack that may move, in the order of `moving`.

        Returns:
            int64 (N,) numbers of rows, and the rows (N, H). A row of 0 leaves a token unchanged.
        """

    def added(self, pack: Pack, x: Tensor, kind: str, seed: int) -> Tensor:
        """The clean point `x` plus the perturbation, added in the dtype of `x`.

        Args:
            pack: the batch.
            x: its clean point, (B, L, H) or (U, H).
            kind: KEPT, SHUFFLED or RANDOM: the signs of the perturbation.
            seed: seed of the draws.
        """
        numbers, rows = self.rows(pack)
        rows = with_signs(rows, numbers, kind, seed)
        index, places = moving(pack), x.reshape(-1, x.shape[-1]).clone()
        places[index] += rows.to(places)
        return places.reshape(x.shape)


def with_signs(rows: Tensor, numbers: Tensor, kind: str, seed: int) -> Tensor:
    """Rows with other signs. The draw of a row depends only on the seed and its number.

    Args:
        rows: (N, H) perturbations.
        numbers: int64 (N,) numbers of the rows. Equal numbers get equal draws.
        kind: KEPT returns the rows. SHUFFLED permutes the signs among the coordinates of a row that
            are not 0. RANDOM draws each sign from {-1, +1}.
        seed: seed of the draws.
    """
    if kind == KEPT:
        return rows
    numbers = numbers.to(rows.device) + keys_for(seed, ())
    keys = words(numbers, numbers[:, None])[:, 0]
    if kind != SHUFFLED:
        return rows.abs() * signs(keys, rows)
    # of each row, the places that are not 0 in order, and the same places in a random order
    zero = rows == 0
    places = zero.to(torch.uint8).argsort(dim=1, stable=True)
    drawn = words(keys, rows).masked_fill(zero, torch.iinfo(torch.int64).max)
    others = rows.sign().gather(1, drawn.argsort(dim=1, stable=True))
    return rows.abs() * torch.zeros_like(rows).scatter(1, places, others)


@dataclass(frozen=True)
class Universal(Fixed):
    """One perturbation for all questions.

    Attributes:
        table: (R, H) perturbations.
        share: one of `SHARES`: which tokens have a row in common.
    """

    table: Tensor
    share: str

    def rows(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """See `Fixed.rows`. Tokens without a row, such as those of later positions, get 0."""
        numbers = row_of(pack, self.share)
        table = self.table.to(numbers.device)
        known = numbers < len(table)
        rows = table[torch.where(known, numbers, 0)]
        return numbers, rows.masked_fill(~known[:, None], 0)


def row_of(pack: Pack, share: str) -> Tensor:
    """int64 (N,) number of the row of each token that may move, in the order of `moving`."""
    index = moving(pack)
    flat = index if pack.first is None else pack.first[index]
    if share == TOKEN:
        return pack.input_ids.flatten()[flat]
    if share == POSITION:
        if pack.depth is not None:
            return pack.depth.flatten()[flat]
        return flat % pack.input_ids.shape[1]
    return torch.zeros_like(flat)


@dataclass(frozen=True)
class Stored(Fixed):
    """The perturbations that a run stored for each question (`Question.stored`).

    Attributes:
        change: (R, H) of each task, as stored.
        rows_of: (U + 1,) of each task: the first row of each unit, and the end.
        before: for each task, the number of rows of the tasks before it.
    """

    change: Mapping[str, NDArray[np.generic]]
    rows_of: Mapping[str, NDArray[np.int64]]
    before: Mapping[str, int]

    def rows(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """See `Fixed.rows`."""
        numbers, rows = [], []
        for question in pack.questions:
            assert question.stored is not None  # `prepare` has looked it up
            task, unit = question.stored
            start, end = self.rows_of[task][unit : unit + 2]
            numbers.append(self.before[task] + np.arange(start, end))
            rows.append(widened(self.change[task][start:end]))
        device = pack.input_ids.device
        joined = torch.from_numpy(np.concatenate(numbers)), torch.from_numpy(np.concatenate(rows))
        return joined[0].to(device), joined[1].to(device)
