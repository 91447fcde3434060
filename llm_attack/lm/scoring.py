"""One forward of the model: logits at the positions asked for, with the point put at the hook."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import PreTrainedModel

from llm_attack.lm.hook import capture, edit_input, edit_output
from llm_attack.lm.pack import Entries, Pack


class Scores(NamedTuple):
    """What the model says of E predictions, each (E,).

    Attributes:
        log_prob: log-probability, for a loss: its gradient is precise.
        answer: log-probability as lm-eval computes it, detached.
        greedy: whether the token is the likeliest.
    """

    log_prob: Tensor
    answer: Tensor
    greedy: Tensor

    def by_request(self, sizes: list[int]) -> tuple[Tensor, Tensor]:
        """(n,) log-likelihood of each of n requests, and whether all its predictions are greedy.

        `sizes` are the requests' numbers of predictions, which stand in order. The sums are made as
        lm-eval makes them: at -1000 the last place of float32 is 1e-4, so the order matters.
        """
        log_likelihoods = torch.stack([part.sum() for part in self.answer.split(sizes)])
        greedy = torch.stack([part.all() for part in self.greedy.split(sizes)])
        return log_likelihoods, greedy


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
        base = getattr(model, "get_base_model", lambda: model)()  # inside a PEFT model
        takes_cache = "use_cache" in inspect.signature(base.forward).parameters
        self.options = {"use_cache": False} if takes_cache else {}

    def point(self, pack: Pack) -> Tensor:
        """The clean point of `pack`, (B, L, H)."""
        return capture(self.hookpoint, lambda: self._forward(pack))

    def __call__(self, pack: Pack, entries: Entries, point: Tensor | None = None) -> Scores:
        """Scores of `entries`; with `point`, (B, L, H), in place of the hookpoint's output."""
        logits = self.logits(pack, entries.positions, point).to(self.softmax_dtype)
        scores = look_up(logits, entries.slot.to(logits.device), entries.target.to(logits.device))
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
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            return self.model(input_ids=pack.input_ids, **self.options)


def look_up(logits: Tensor, slot: Tensor, target: Tensor) -> Scores:
    """Scores of the tokens `target` (E,) at the rows `slot` (E,) of `logits` (P, V).

    Answers are log-softmax. For a gradient, that of the likeliest token is written as
    -softplus(rest - top), where rest is the logsumexp of all others. It keeps its precision where a
    model is sure of a token: there the gradient of log-softmax, p - 1, is nothing but rounding
    error, and an attack that follows its sign follows noise.
    """
    values = logits.detach()
    top = values.argmax(-1, keepdim=True)
    greedy = top.squeeze(-1)[slot] == target
    answer = values.log_softmax(-1)[slot, target]
    if not logits.requires_grad:
        return Scores(answer, answer, greedy)
    relative = logits - values.gather(-1, top)
    of_top = relative.gather(-1, top).squeeze(-1)
    rest = relative.scatter(-1, top, -torch.inf).logsumexp(-1)
    sure = -softplus(rest - of_top)[slot]
    unsure = relative[slot, target] - torch.logaddexp(of_top, rest)[slot]
    return Scores(torch.where(greedy, sure, unsure), answer, greedy)
