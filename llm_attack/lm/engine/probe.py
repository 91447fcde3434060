"""Tries whether a model honours the mask and the positions of a tree."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from itertools import chain

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from llm_attack.base.failures import one_line
from llm_attack.lm.engine.scoring import Scorer
from llm_attack.lm.engine.stack import Stack
from llm_attack.lm.network.hook import vocabulary_of
from llm_attack.lm.packing.pack import Pack, Twins, pack_rows, pack_trees
from llm_attack.lm.packing.questions import Question, Request

# A layer with such a window counts rows and not a tree's positions, or loses its window to the mask
# of the tree. Trees that are not longer than the window are safe in both cases.
WINDOWS = (
    "attention_chunk_size",
    "attention_window",
    "local_attention",
    "sliding_window",
    "window_size",
)

log = logging.getLogger(__name__)


def longest_tree(scorer: Scorer, device: torch.device, pad: int = 0) -> int:
    """The length up to which the model supports trees; 0: it does not.

    A model does not support trees if its attention ignores the mask (some flash kernels), or if it
    counts positions itself (ALiBi, recurrent models). The log says so.
    """
    wrong = trees_fault(scorer, made_up(scorer), device, pad)
    if wrong:
        log.warning("packing: off, because a trial of trees %s; every request gets a row", wrong)
        return 0
    return window(scorer)


def window(scorer: Scorer) -> int:
    """The smallest sliding window of all layers."""
    config = scorer.model.config
    configs = (config, getattr(config, "get_text_config", lambda: config)())
    sizes = [getattr(c, name, None) for c in configs for name in WINDOWS]
    windows = chain.from_iterable(s if isinstance(s, (list, tuple)) else [s] for s in sizes)
    return min([w for w in windows if isinstance(w, int) and w > 0], default=sys.maxsize)


def longest_flat(scorer: Scorer, device: torch.device, pad: int = 0) -> int:
    """Tries up to which length rows may go through the model without padding.

    Log-probabilities and gradients of made-up questions must equal those of rows with padding.
    """
    pack = pack_rows(made_up(scorer), pad, whole=True).to(device)
    if pack.flat is None or not scorer.together(pack):
        return 0
    slopes = []
    for length in (0, window(scorer)):
        scorer.longest_flat = length
        try:
            slopes.append(_slopes(scorer, pack, None))
        except Exception as error:
            scorer.longest_flat = 0
            if should_reduce_batch_size(error):
                raise
            log.info("padding: computed as well: %s: %s", type(error).__name__, error)
            return 0
    scorer.longest_flat = 0
    return length if all(equal_logits(scorer, b, a) for a, b in zip(*slopes, strict=True)) else 0


def _slopes(scorer: Scorer, pack: Pack, twins: Twins | None) -> tuple[Tensor, Tensor]:
    """The log-probabilities of watched predictions, or of twins, and the gradient of their sum."""
    x = scorer.point(pack).requires_grad_(True)
    with torch.enable_grad():
        if twins is None:
            log_prob = scorer(pack, pack.watched, x).log_prob
        else:
            log_prob = scorer.at_twins(pack, twins, x, None).log_prob
        (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    log_prob = log_prob.detach()
    return log_prob if twins is None else log_prob[twins.of_entry], gradient


def trees_fault(
    scorer: Scorer, questions: Sequence[Question], device: torch.device, pad: int = 0
) -> str:
    """Compares the logits of `questions` as trees with those of a row per request; see `fault`.

    Wrong positions, or a mask that is ignored, change the first digits.
    """
    packs = [make(questions, pad).to(device) for make in (pack_trees, pack_rows)]
    return fault(scorer, *packs)


def fault(scorer: Scorer, some: Pack, others: Pack) -> str:
    """The fault of the first of two layouts of the same questions; empty if there is none.

    Their logits are compared by `equal_logits`.
    """
    logits = []
    for pack in (some, others):
        try:
            with torch.no_grad():
                of_pack = scorer.logits(pack, pack.scored.positions)
        except Exception as error:
            if should_reduce_batch_size(error):
                raise
            return f"raises {one_line(error)}"
        logits.append(of_pack[pack.scored.slot.to(of_pack.device)].float())
    return "" if equal_logits(scorer, *logits) else "gives other logits"


def equal_logits(scorer: Scorer, some: Tensor, others: Tensor) -> bool:
    """Whether logits agree in half of the digits of the dtype that the model computes with.

    The root mean square of the difference counts, relative to the spread of `others`.
    """
    difference = (some - others).float().square().mean().sqrt()
    # models in float64 compute some parts in float32
    eps = max(torch.finfo(t).eps for t in (scorer.autocast or scorer.model.dtype, torch.float32))
    return bool(difference <= eps**0.5 * others.float().std())


def beside_fault(
    scorer: Scorer, questions: Sequence[Question], device: torch.device, pad: int = 0
) -> tuple[str, str]:
    """Compares the logits of the shortest request by itself, beside the longest, and again.

    The code of a model may let the longest row of a forward decide the rotary embeddings of all
    rows (dynamic NTK), or may keep them for the next forward.

    Returns:
        The fault beside the longest request, and the fault after it; empty if there is none.
    """
    requests = [request for question in questions for request in question.requests]
    short = min(requests, key=lambda r: len(r.inputs), default=None)
    if short is None:
        return "", ""
    long = max(requests, key=lambda r: len(r.inputs))
    logits = []
    for several in ([short], [short, long], [short]):
        pack = pack_rows([Question([r], [[i]]) for i, r in enumerate(several)], pad).to(device)
        with torch.no_grad():
            of_pack = scorer.logits(pack, pack.scored.positions)
        slots = pack.scored.slot[pack.scored.request == 0]
        logits.append(of_pack[slots.to(of_pack.device)].float())
    alone, *others = logits
    lengths = f"a request of {len(short.inputs)} tokens changes its logits"
    return tuple(  # type: ignore[return-value]
        "" if equal_logits(scorer, other, alone) else f"{lengths} {what} {len(long.inputs)} tokens"
        for other, what in zip(others, ("beside one of", "after a forward of"), strict=True)
    )


def made_up(scorer: Scorer) -> list[Question]:
    """Two questions of different sizes. Their requests share different parts of their contexts."""
    vocabulary = vocabulary_of(scorer.model)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(vocabulary, (40,), generator=generator).tolist()
    context, rest = tuple(words[:12]), words[12:]
    first = [context + tuple(rest[i : i + n]) for i, n in ((0, 5), (5, 3), (8, 6))]
    first.append(first[0][:14] + tuple(rest[14:18]))
    second = [(*rest[20:24], word) for word in rest[24:26]]
    return [
        Question([Request(tokens, 4) for tokens in requests], [[i] for i in range(len(requests))])
        for requests in (first, second)
    ]


def takes_twins(scorer: Scorer, device: torch.device, pad: int = 0) -> bool:
    """Tries whether the clean forward may compute tokens that rows share only once.

    Log-probabilities and gradients of a made-up question must equal those of whole rows; see
    `equal_logits`. A model may refuse, for example if its layers are split over devices or packed.
    """
    pack = pack_rows([made_up(scorer)[0]], pad, whole=True).to(device)
    twins = pack.twins
    if twins is None or not scorer.together(pack):
        return False
    slopes = []
    for once in (None, twins):
        try:
            slopes.append(_slopes(scorer, pack, once))
        except Exception as error:
            if should_reduce_batch_size(error):
                raise
            log.info("twins: computed for each row: %s: %s", type(error).__name__, error)
            return False
    return all(equal_logits(scorer, b, a) for a, b in zip(*slopes, strict=True))


def usable_stack(scorer: Scorer, device: torch.device, pad: int = 0) -> Stack | None:
    """Tries whether one function may compute all blocks.

    Log-probabilities and gradients of made-up questions, as rows and as trees, must equal those of
    the model's own code; see `equal_logits`.
    """
    stack = None if scorer.lean is None else Stack.of(scorer.model, scorer.lean)
    if stack is None or scorer.skip is not None or stack.contains(scorer.hookpoint):
        return None
    packs = [make(made_up(scorer), pad, whole=True).to(device) for make in (pack_rows, pack_trees)]
    slopes: list[list[Tensor]] = []
    try:
        for used in (None, stack):
            scorer.stack = used
            slopes.append([part for pack in packs for part in _slopes(scorer, pack, None)])
    except Exception as error:
        if should_reduce_batch_size(error):
            raise
        log.info("blocks: computed by the model: %s: %s", type(error).__name__, error)
        return None
    finally:
        scorer.stack = None
    return stack if all(equal_logits(scorer, b, a) for a, b in zip(*slopes, strict=True)) else None
