"""One forward of the model: logits at the positions asked for, with the point put at the hook."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_attack.lm.hook import capture, edit_input, edit_output
from llm_attack.lm.nearest import Nearest
from llm_attack.lm.pack import Entries, Pack


class Scores(NamedTuple):
    """The model's scores of E predictions, each (E,).

    Attributes:
        log_prob: log-probability.
        greedy: whether the token is the likeliest.
    """

    log_prob: Tensor
    greedy: Tensor


class Scorer:
    """Runs a causal language model on packs.

    Args:
        model: a transformers causal LM (or a PEFT model round one).
        hookpoint: the module whose output is the point.
        autocast: dtype of mixed precision, or None.
        softmax_dtype: dtype of log-probabilities; float32 unless told.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        hookpoint: nn.Module,
        autocast: torch.dtype | None = None,
        softmax_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.hookpoint = hookpoint
        self.autocast = autocast
        self.softmax_dtype = softmax_dtype or torch.float32
        self.head = model.get_output_embeddings()
        self.nearest = None
        if isinstance(hookpoint, nn.Embedding) and hookpoint is model.get_input_embeddings():
            self.nearest = Nearest(hookpoint, hookpoint.num_embeddings)
        base = getattr(model, "get_base_model", lambda: model)()  # inside a PEFT model
        takes_cache = "use_cache" in inspect.signature(base.forward).parameters
        self.options = {"use_cache": False} if takes_cache else {}

    def point(self, pack: Pack) -> Tensor:
        """The clean point of `pack`, (B, L, H)."""
        return capture(self.hookpoint, lambda: self._forward(pack))

    def __call__(self, pack: Pack, entries: Entries, point: Tensor | None = None) -> Scores:
        """Scores of `entries`; with `point`, (B, L, H), in place of the hookpoint's output."""
        logits = self.logits(pack, entries.positions, point)
        slot, target = entries.slot.to(logits.device), entries.target.to(logits.device)
        scores = look_up(logits, slot, target, self.softmax_dtype)
        # a model split over devices answers on its last one
        return Scores(*(s.to(pack.input_ids.device) for s in scores))

    def logits(self, pack: Pack, positions: Tensor, point: Tensor | None = None) -> Tensor:
        """(P, V) logits at `positions`, flat indices into the pack's B x L.

        Hidden states are gathered before the head, so that the (B, L, V) tensor never exists; what
        an architecture does behind its head (scaling, soft-capping) is still its own.
        """
        rows, columns = pack.input_ids.shape
        gathered = False

        def gather(hidden: Tensor) -> Tensor:
            nonlocal gathered
            gathered = True
            hidden = hidden[:, hidden.shape[1] - columns :]  # virtual tokens of prompt tuning
            return hidden.reshape(rows * columns, -1)[positions.to(hidden.device)].unsqueeze(0)

        with ExitStack() as stack:
            if point is not None:
                stack.enter_context(edit_output(self.hookpoint, lambda output: point))
            if self.head is not None:
                stack.enter_context(edit_input(self.head, gather))
            logits = self._forward(pack).logits
        if gathered:
            return logits[0]
        logits = logits[:, logits.shape[1] - columns :]
        return logits.reshape(rows * columns, -1)[positions.to(logits.device)]

    def _forward(self, pack: Pack):
        device = pack.input_ids.device.type
        options: dict[str, Any] = dict(self.options)
        mask = pack.attention(self.model.dtype)
        if mask is not None:
            options |= {"attention_mask": mask, "position_ids": pack.depth}
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            return self.model(input_ids=pack.input_ids, **options)


def look_up(logits: Tensor, slot: Tensor, target: Tensor, dtype: torch.dtype) -> Scores:
    """Scores, computed in `dtype`, of the tokens `target` (E,) at the rows `slot` (E,) of `logits`.

    `logits` are (P, V). Log-probability and gradient keep their precision where a model is sure of
    a token: there the gradient of log-softmax, p - 1, is nothing but rounding error, and an attack
    that follows its sign follows noise. Here the probability of the rest is summed without the
    likeliest token.
    """
    log_prob, greedy = _LogSoftmaxAt.apply(logits, slot, target, dtype)
    return Scores(log_prob, greedy)


class _LogSoftmaxAt(torch.autograd.Function):
    """Log-softmax at a few places, in passes over slices that stay in the cache.

    Besides the logits themselves, nothing of their size is ever kept, and one tensor is made: their
    gradient.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, slot: Tensor, target: Tensor, dtype: torch.dtype):
        best = logits.argmax(-1)
        top = logits.gather(-1, best[:, None]).to(dtype)
        rest = torch.empty_like(top)  # odds against the likeliest token
        for part in _slices(logits):
            odds = (logits[part].to(dtype) - top[part]).exp_()
            odds.scatter_(-1, best[part, None], 0)
            torch.sum(odds, -1, keepdim=True, out=rest[part])
        ctx.save_for_backward(logits, best, top, rest, slot, target)
        ctx.dtype = dtype
        greedy = target == best[slot]
        ctx.mark_non_differentiable(greedy)
        relative = logits[slot, target].to(dtype) - top[slot, 0]
        return relative - rest.log1p()[slot, 0], greedy

    @staticmethod
    def backward(ctx, upstream: Tensor, _: None):
        logits, best, top, rest, slot, target = ctx.saved_tensors
        total = upstream.new_zeros(len(logits)).index_add(0, slot, upstream)
        sure = target == best[slot]
        of_best = upstream.new_zeros(len(logits)).index_add(0, slot, upstream * sure)
        scale = total[:, None] / (1 + rest)
        gradient = torch.empty_like(logits)
        for part in _slices(logits):
            odds = (logits[part].to(ctx.dtype) - top[part]).exp_()
            gradient[part] = odds.mul_(-scale[part])
        # the likeliest token's own, without the difference 1 - p
        own = (of_best * rest[:, 0] - (total - of_best)) / (1 + rest[:, 0])
        gradient.scatter_(-1, best[:, None], own[:, None].to(gradient))
        others = (upstream * ~sure).to(gradient)
        return gradient.index_put_((slot, target), others, accumulate=True), None, None, None


def _slices(logits: Tensor) -> list[slice]:
    """Of the rows of `logits`, such that one is about 4 MB on a CPU, 256 MB elsewhere."""
    elements = 2**20 if logits.device.type == "cpu" else 2**26
    step = max(1, elements // max(1, logits.shape[1]))
    return [slice(i, i + step) for i in range(0, len(logits), step)]
