"""Several hookpoints: finds them, runs one clean pass for all, and starts forwards at each."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_attack.base.errors import UsageError, closest, hint
from llm_attack.base.failures import one_line
from llm_attack.lm.engine.clean import (
    BatchLoss,
    CleanPass,
    Needs,
    answers_of,
    clean_pass,
    of_nodes,
)
from llm_attack.lm.engine.probe import equal_logits, made_up
from llm_attack.lm.engine.scoring import Scorer, Scores
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.network.blocks import Skip, known_blocks
from llm_attack.lm.network.hook import edit_output, faults, resolve
from llm_attack.lm.packing.pack import Pack, pack_rows
from llm_attack.lm.settings import EMBED, LAYERS

log = logging.getLogger(__name__)


def expand(model: PreTrainedModel, hookpoints: Sequence[str]) -> list[str | None]:
    """The names of the modules that patterns mean, each once; None: the input embedding.

    Args:
        model: the model.
        hookpoints: `EMBED`; `LAYERS`, the outputs of all blocks; dotted paths, in which * stands
            for any one name, such as `model.layers.*.mlp`.

    Raises:
        UsageError: one of them matches no module.
    """
    names = {module: name for name, module in model.named_modules()}
    expanded: list[str | None] = []
    for given in hookpoints:
        if given == EMBED:
            expanded.append(None)
        elif given == LAYERS:
            expanded += _layers(model, names)
        elif "*" in given:
            pattern = re.escape(given).replace(r"\*", "[^.]+")
            matching = [name for name in names.values() if re.fullmatch(pattern, name)]
            if not matching:
                shapes = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names.values()}
                raise UsageError(
                    f"hookpoints={given}: must match modules of the model, such as"
                    f" 'model.layers.*.mlp'{hint(given, shapes)}"
                )
            expanded += matching
        else:
            meant = closest(given, (EMBED, LAYERS))
            if meant and "." not in given:
                raise UsageError(
                    f"hookpoints={given}: must be {EMBED}, {LAYERS} or dotted paths of modules; did"
                    f" you mean {meant!r}?"
                )
            resolve(model, given)
            expanded.append(given)
    expanded = list(dict.fromkeys(expanded))
    embedding = names.get(model.get_input_embeddings())
    if None in expanded and embedding in expanded:
        raise UsageError(f"hookpoints={EMBED},{embedding}: must name each module only once")
    return expanded


def _layers(model: PreTrainedModel, names: Mapping[nn.Module, str]) -> list[str]:
    """The names of the blocks that read text, so not those of a vision tower."""
    blocks = {names[block]: block for block in known_blocks(model)}
    text = torch.arange(6).repeat(2, 1).to(next(model.get_input_embeddings().parameters()).device)
    usable = [*faults(model, blocks, text)] if blocks else []
    if not usable:
        raise UsageError(
            f"hookpoints={LAYERS}: must be the names of modules for {type(model).__name__},"
            " because transformers does not name its blocks"
        )
    return usable


def scorers(base: Scorer, hookpoints: Sequence[str | None], device: torch.device) -> list[Scorer]:
    """Makes a scorer for each hookpoint. It starts at the hookpoint if a trial shows that it can.

    Args:
        base: the scorer of the first hookpoint.
        hookpoints: the result of `expand`.
        device: the device of the trial.
    """
    all_scorers = [base]
    for name in hookpoints[1:]:
        scorer = copy.copy(base)
        scorer.hookpoint, scorer.nearest = resolve(base.model, name), None
        if name is None:
            scorer = Scorer(base.model, scorer.hookpoint, base.autocast, base.softmax_dtype)
        all_scorers.append(scorer)
    rest = _rest(base, device)
    for scorer in all_scorers:
        scorer.skip = _skip(scorer.hookpoint, rest)
    refused = _refused([scorer for scorer in all_scorers if scorer.skip is not None], device)
    for scorer in refused:
        scorer.skip = None
    if refused:
        names = (str(name) for name, s in zip(hookpoints, all_scorers, strict=True) if s in refused)
        log.warning(
            "hookpoints: whole forward passes, because partial ones change or fail at %s",
            ", ".join(names),
        )
    return all_scorers


def _rest(base: Scorer, device: torch.device) -> dict[nn.Module, tuple[Any, ...] | None]:
    """The outputs of blocks other than the hidden states (see `Skip`), if a block runs once."""
    outputs: dict[nn.Module, list[Any]] = {}

    def keep(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.setdefault(block, []).append(output)

    handles = [block.register_forward_hook(keep) for block in known_blocks(base.model)]
    try:
        with torch.no_grad():
            base.logits(*_trial(base, device, 0))
    finally:
        for handle in handles:
            handle.remove()
    return {
        block: tuple(calls[0][1:]) if isinstance(calls[0], tuple) else None
        for block, calls in outputs.items()
        if len(calls) == 1
    }


def _skip(hookpoint: nn.Module, rest: Mapping[nn.Module, tuple[Any, ...] | None]) -> Skip | None:
    """The blocks before a hookpoint, and the hookpoint itself if it is a block."""
    running = list(rest)
    for i, block in enumerate(running):
        if hookpoint in block.modules():
            left = running[: i + (hookpoint is block)]
            return Skip(tuple(left), tuple(rest[b] for b in left)) if left else None
    return None


def _trial(scorer: Scorer, device: torch.device, which: int) -> tuple[Pack, Tensor]:
    pack = pack_rows([made_up(scorer)[which]]).to(device)
    return pack, pack.scored.positions


def _refused(scorers: Sequence[Scorer], device: torch.device) -> list[Scorer]:
    """The scorers whose logits change if forwards start at their hookpoint.

    The trial uses another question than `_rest`, and runs that one again before the start. So it
    notices if the other outputs of blocks, or states that they keep, depend on the question. For
    the same reason the last blocks are tried first.
    """
    if not scorers:
        return []
    base, *_ = scorers
    pack, positions = _trial(base, device, 1)
    below = {scorer: scorer.skip.blocks[-1] for scorer in scorers if scorer.skip is not None}
    refused = []
    with torch.no_grad():
        with _captured(list(below.values())) as seen:
            whole = base.logits(pack, positions)
        base.logits(*_trial(base, device, 0))
        for scorer in sorted(scorers, key=lambda s: -len(s.skip.blocks) if s.skip else 0):
            try:
                part = scorer.logits(pack, positions, below=seen.get(below[scorer]))
            except Exception as error:
                if should_reduce_batch_size(error):
                    raise
                log.warning("hookpoints: a partial forward pass raises %s", one_line(error))
                refused.append(scorer)
                continue
            if below[scorer] not in seen or not equal_logits(scorer, part, whole):
                refused.append(scorer)
    return refused


@contextmanager
def _captured(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """While the context lasts, collects the first outputs of modules, as parts of the graph.

    At its end, outputs that were overwritten since are removed.
    """
    seen: dict[nn.Module, Tensor] = {}
    versions: dict[nn.Module, int] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.setdefault(module, output[0] if isinstance(output, tuple) else output)
        versions.setdefault(module, seen[module]._version)

    handles = [module.register_forward_hook(keep) for module in dict.fromkeys(modules)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for module, version in versions.items():
            if seen[module]._version != version:
                del seen[module]


def clean_passes(
    scorers: Sequence[Scorer], pack: Pack, threat: ThreatModel, needs: Needs
) -> list[CleanPass]:
    """The clean passes of a pack at several hookpoints, from one pass for all of them.

    If rows have different frequencies, each hookpoint has its own pass.

    Args:
        scorers: the scorers of the hookpoints, each once.
        pack: the batch.
        threat: the threat model with the loss.
        needs: the parts that the attacks need.
    """
    first, *others = scorers
    if not others:
        return [clean_pass(first, pack, threat, needs)]
    if not first.together(pack):
        apart = [clean_pass(first, pack, threat, needs)]
        more = replace(needs, answers=False)
        apart += [clean_pass(scorer, pack, threat, more) for scorer in others]
        return [replace(clean, scores=apart[0].scores) for clean in apart]
    shared = _Shared(first, pack, threat, needs.gradient)
    passes = shared.run(scorers)
    missing = replace(needs, answers=False)
    return [
        passes[scorer]
        if scorer in passes
        else replace(clean_pass(scorer, pack, threat, missing), scores=shared.answers)
        for scorer in scorers
    ]


@dataclass
class _Shared:
    """One clean pass for several hookpoints.

    Args:
        scorer: the scorer of the first hookpoint.
        pack: the batch.
        threat: the threat model with the loss.
        gradient: whether gradients are needed.
    """

    scorer: Scorer
    pack: Pack
    threat: ThreatModel
    gradient: bool
    answers: Scores = field(init=False)

    def run(self, scorers: Sequence[Scorer]) -> dict[Scorer, CleanPass]:
        """The clean passes of the hookpoints that run."""
        modules = [s.hookpoint for s in scorers]
        modules += [s.skip.blocks[-1] for s in scorers if s.skip is not None]
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.gradient))
            if self.gradient:  # makes a graph, because parameters require no gradients
                embedding = self.scorer.model.get_input_embeddings()
                leaf = edit_output(embedding, lambda x: x.detach().requires_grad_(True))
                stack.enter_context(leaf)
            with _captured(modules) as seen:
                scores = self.scorer(self.pack, self.pack.watched)
            self.answers = answers_of(self.pack, scores)
            run = [scorer for scorer in scorers if scorer.hookpoint in seen]
            slopes: Sequence[Tensor | None] = [None] * len(run)
            values = None
            if self.gradient:
                values = BatchLoss(self.pack, self.threat).value(scores)
                points = [seen[scorer.hookpoint] for scorer in run]
                slopes = torch.autograd.grad(values.sum(), points)
                values = values.detach()
        return {
            scorer: CleanPass(
                x=of_nodes(self.pack, self._whole(seen[scorer.hookpoint].detach())),
                scores=self.answers,
                loss=values,
                gradient=None if slope is None else of_nodes(self.pack, self._whole(slope), True),
                below=self._below(scorer, seen),
            )
            for scorer, slope in zip(run, slopes, strict=True)
        }

    def _whole(self, part: Tensor) -> Tensor:
        return self.scorer.whole(self.pack, part)

    def _below(self, scorer: Scorer, seen: Mapping[nn.Module, Tensor]) -> Tensor | None:
        skip = scorer.skip
        if skip is None or skip.blocks[-1] not in seen:
            return None
        return self._whole(seen[skip.blocks[-1]].detach())
