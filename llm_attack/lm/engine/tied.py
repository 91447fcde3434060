"""A table of embeddings that is perturbed as a whole: all occurrences of a token move together.

The table is fitted to many questions, or drawn as a control. It stays in the rounding cells of a
format, so it is quantized to the same codes as the clean table, and it could be shipped as the
weights of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from llm_attack.attacks import Attack, keys_for, loss_gradient, widest
from llm_attack.attacks.cells import Cells
from llm_attack.attacks.draws import rehashed, signs
from llm_attack.attacks.formats import Format
from llm_attack.lm.engine.attacked import AttackedBatch


class Fitted(NamedTuple):
    """A table that was fitted or drawn.

    Attributes:
        ids: (U,) the tokens that moved, in increasing order.
        cells: the cells of their embeddings, (U, H).
        rows: (U, H) the perturbed embeddings.
        losses: the loss of all examples together before each step, and after the last; empty if
            the table was drawn.
    """

    ids: Tensor
    cells: Cells
    rows: Tensor
    losses: list[float]

    def point(self, batch: AttackedBatch) -> Tensor:
        """The point of a batch with these rows in place of the clean embeddings."""
        return placed(batch, self.ids, self.rows)


def fit(attack: Attack, batches: Callable[[], Iterable[AttackedBatch]], seed: int = 0) -> Fitted:
    """Fits a table by steps along the sign of the gradient, summed over all occurrences of a token.

    The result is the table with the greatest loss, among those before each step and after the last.
    An attack without a gradient draws the lower or the upper end of each cell. The draw depends on
    the seed and on the token.

    Args:
        attack: the attack, with `step` in widths of a cell.
        batches: gives all batches, with their clean points, each time it is called.
        seed: seed of the draws.
    """
    assert attack.cells is not None
    ids, clean = _rows(batches())
    cells = Cells.of(Format.of(attack.cells), clean)
    if not attack.kind.gradient:
        keys = rehashed(ids + keys_for(seed, ()))
        return Fitted(ids, cells, torch.where(signs(keys, clean) > 0, cells.high, cells.low), [])
    z, best, losses = cells.start, cells.x, list[float]()
    for step in range(attack.steps + 1):
        rows, last = cells.point(z), step == attack.steps
        total, slope = _summed(batches(), ids, rows, gradient=not last)
        if not losses or total > max(losses):
            best = rows
        losses.append(total)
        z = (z + attack.in_ball.step * (slope * cells.width).sign().to(z.dtype)).clamp(0, 1)
    return Fitted(ids, cells, best, losses)


def placed(batch: AttackedBatch, ids: Tensor, rows: Tensor) -> Tensor:
    """The point of a batch, with `rows` at the tokens that move and are among `ids`."""
    tokens, moves = tokens_of(batch)
    place = torch.searchsorted(ids, tokens).clamp(max=len(ids) - 1)
    moves = moves & (ids[place] == tokens)
    return torch.where(moves[..., None], rows[place], batch.x)


def tokens_of(batch: AttackedBatch) -> tuple[Tensor, Tensor]:
    """For each element of the point, its token, and whether it moves."""
    ids, first = batch.pack.input_ids, batch.pack.first
    tokens = ids if first is None else ids.flatten()[first]
    return tokens, torch.ones_like(tokens, dtype=torch.bool) if batch.mask is None else batch.mask


def _rows(batches: Iterable[AttackedBatch]) -> tuple[Tensor, Tensor]:
    """The tokens that move, in increasing order, and their clean embeddings."""
    found: dict[int, Tensor] = {}
    device = torch.device("cpu")
    for batch in batches:
        tokens, moves = tokens_of(batch)
        device = tokens.device
        for token, row in zip(tokens[moves].tolist(), batch.x[moves], strict=True):
            found.setdefault(token, row)
    ids = sorted(found)
    return torch.tensor(ids, device=device), torch.stack([found[i] for i in ids])


def _summed(
    batches: Iterable[AttackedBatch], ids: Tensor, rows: Tensor, gradient: bool
) -> tuple[float, Tensor]:
    """The loss of all batches with a table, and its gradient with respect to the rows."""
    total, slope = 0.0, torch.zeros_like(rows, dtype=widest(rows.device))
    for batch in batches:
        point, values = placed(batch, ids, rows), list[Tensor]()

        def loss(x: Tensor, at: AttackedBatch = batch, seen: list[Tensor] = values) -> Tensor:
            value = at.loss(x)
            seen.append(value.detach())
            return value

        if gradient:
            tokens, moves = tokens_of(batch)
            own = loss_gradient(loss, point).nan_to_num(0, 0, 0)
            slope.index_add_(0, torch.searchsorted(ids, tokens[moves]), own[moves].to(slope))
        else:
            with torch.no_grad():
                loss(point)
        total += float(values[0].double().nan_to_num().sum())
    return total, slope
