"""Fits one perturbation to many questions (Moosavi-Dezfooli et al. 2017).

The point that is attacked is the table of a universal perturbation, and its loss is the mean over
all questions. So every attack of this package that follows a gradient can fit it. A step takes the
gradient of all questions. Memory holds one batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_attack.attacks import Attack, Elements, Known, Watch, perturb
from llm_attack.attacks.settings import KEPT
from llm_attack.lm.engine.attacked import AttackedBatch
from llm_attack.lm.engine.clean import Needs, clean_pass
from llm_attack.lm.engine.engine import Engine
from llm_attack.lm.engine.fixed import Universal, row_of
from llm_attack.lm.engine.moving import moving
from llm_attack.lm.fixed import POSITION, TOKEN
from llm_attack.lm.packing.batches import Batch
from llm_attack.lm.packing.pack import Pack


class Fitted(NamedTuple):
    """A universal perturbation.

    Attributes:
        table: (R, H) perturbations; 0 in rows that no question has.
        seen: (R,) booleans: rows of tokens that the questions have.
        before, after: mean loss of a question (or request) without and with the perturbation.
    """

    table: Tensor
    seen: Tensor
    before: float
    after: float


class MeanLoss:
    """The mean loss of questions as a function of a universal perturbation.

    Args:
        engine: the model, and the loss that attacks raise.
        batches: the questions.
        share: one of `SHARES`.
        vocabulary: number of rows if the tokens of a vocabulary entry share a row.
    """

    def __init__(
        self, engine: Engine, batches: Sequence[Batch], share: str, vocabulary: int
    ) -> None:
        self.engine, self.share = engine, share
        self.packs = [engine.pack(batch) for batch in batches]
        longest = max(pack.input_ids.shape[1] for pack in self.packs)
        self.n_rows = {TOKEN: vocabulary, POSITION: longest}.get(share, 1)
        self.seen = torch.zeros(self.n_rows, dtype=torch.bool)
        for pack in self.packs:
            self.seen[row_of(pack, share)] = True

    def zeros(self) -> Tensor:
        """The table without a perturbation, in the model's dtype or float32 if that is wider."""
        pack = self._part(self.packs[0])
        x = self._batch(pack).x
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.zeros(self.n_rows, x.shape[-1], dtype=dtype, device=x.device)

    def _part(self, pack: Pack) -> Pack:
        return pack.to(self.engine.device)

    def _batch(self, pack: Pack) -> AttackedBatch:
        scorer, threat = self.engine.scorer, self.engine.threat
        return AttackedBatch(scorer, pack, threat, clean_pass(scorer, pack, threat, Needs()))

    def __call__(self, table: Tensor, slope: bool) -> tuple[Tensor, Tensor]:
        """The mean loss, and its gradient like `table`; zeros without `slope`."""
        total = torch.zeros((), dtype=torch.float64)
        gradient, n = torch.zeros_like(table), 0
        for host in self.packs:
            pack = self._part(host)
            batch = self._batch(pack)
            x = Universal(table, self.share).added(pack, batch.x, KEPT, 0)
            with torch.set_grad_enabled(slope):
                x.requires_grad_(slope)
                values = batch.of_examples(batch.loss(x))
                if slope:
                    (of_x,) = torch.autograd.grad(values.sum(), x)
                    of_rows = of_x.reshape(-1, x.shape[-1])[moving(pack)].to(gradient)
                    gradient.index_add_(0, row_of(pack, self.share), of_rows)
            total += values.detach().sum(dtype=torch.float64).cpu()
            n += len(values)
        return (total / n).to(table), gradient / n


class _Mean(torch.autograd.Function):
    """A `MeanLoss` for attacks: (1, R, H) -> (1,)."""

    @staticmethod
    def forward(ctx: Any, point: Tensor, loss: MeanLoss) -> Tensor:
        value, gradient = loss(point[0], ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return value[None]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (upstream * gradient)[None], None


def fit(attack: Attack, loss: MeanLoss, seed: int, on_step: Callable[[Tensor], None]) -> Fitted:
    """Fits a universal perturbation.

    Args:
        attack: raises the loss. Its ball holds the whole table in the norm linf. With `per_token`
            there is a ball for each row.
        loss: the mean loss of the questions.
        seed: seed of random starts.
        on_step: called with every gradient.
    """
    zero = loss.zeros()
    before, gradient = loss(zero, True)
    seen = loss.seen.to(zero.device)
    table = perturb(
        attack,
        zero[None],
        lambda point: _Mean.apply(point, loss),  # type: ignore[no-untyped-call]
        elements=Elements(mask=seen[None]),
        keys=torch.tensor([seed], device=zero.device),
        known=Known(before[None], gradient[None]),
        watch=Watch(on_gradient=on_step),
    )[0]
    after, _ = loss(table, False)
    return Fitted(table, loss.seen, float(before), float(after))
