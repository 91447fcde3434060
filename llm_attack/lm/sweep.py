"""Several hookpoints: which they are, one clean pass for all, and forwards that start at each."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_attack.errors import UsageError, closest
from llm_attack.lm.hook import edit_output, resolve
from llm_attack.lm.layers import known_blocks
from llm_attack.lm.pack import pack_rows
from llm_attack.lm.probe import made_up
from llm_attack.lm.scoring import Scorer
from llm_attack.lm.surface import Surface

EMBED, LAYERS = "embed", "layers"

log = logging.getLogger(__name__)


def expand(model: PreTrainedModel, hookpoints: Sequence[str]) -> list[str | None]:
    """The modules that are meant, by name, each once; None: the input embedding.

    Args:
        model: whose modules they are.
        hookpoints: `EMBED`; `LAYERS`, the outputs of all blocks; dotted paths, in which * stands
            for any one name, such as `model.layers.*.mlp`.

    Raises:
        UsageError: one of them is no module's.
    """
    names = {module: name for name, module in model.named_modules()}
    found: list[str | None] = []
    for given in hookpoints:
        if given == EMBED:
            found.append(None)
        elif given == LAYERS:
            found += [names[block] for block in _blocks(model, given)]
        elif "*" in given:
            pattern = re.escape(given).replace(r"\*", "[^.]+")
            matching = [name for name in names.values() if re.fullmatch(pattern, name)]
            if not matching:
                shapes = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names.values()}
                meant = closest(given, shapes)
                hint = f"; did you mean {meant!r}?" if meant else ""
                raise UsageError(
                    f"hookpoints={given}: must match modules of the model, such as"
                    f" 'model.layers.*.mlp'{hint}"
                )
            found += matching
        else:
            resolve(model, given)
            found.append(given)
    return list(dict.fromkeys(found))


def _blocks(model: PreTrainedModel, given: str) -> list[nn.Module]:
    found = known_blocks(model)
    if not found:
        raise UsageError(
            f"hookpoints={given}: must be modules by name for {type(model).__name__}, whose blocks"
            " transformers does not name"
        )
    return found


@dataclass(frozen=True)
class Skip:
    """The blocks before a hookpoint, which need not run once its clean activations are known.

    Attributes:
        blocks: those that are left out; below is the output of the last of them.
        rest: of each block, what its output has besides the hidden states; None: it is no tuple.
    """

    blocks: tuple[nn.Module, ...]
    rest: tuple[tuple[Any, ...] | None, ...]

    @contextmanager
    def over(self, below: Tensor) -> Iterator[None]:
        """While it lasts, the blocks return `below`, (B, L, H), and compute nothing."""
        before = [vars(block).get("forward") for block in self.blocks]
        try:
            for block, rest in zip(self.blocks, self.rest, strict=True):
                block.forward = _returns(below if rest is None else (below, *rest))
            yield
        finally:
            for block, forward in zip(self.blocks, before, strict=True):
                if forward is None:
                    vars(block).pop("forward", None)
                else:
                    block.forward = forward


def _returns(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def scorers(base: Scorer, hookpoints: Sequence[str | None], device: torch.device) -> list[Scorer]:
    """A scorer for each hookpoint, which starts there where a trial shows that it can.

    Args:
        base: the scorer of the first.
        hookpoints: as of `expand`.
        device: where the trial is made.
    """
    found = [base]
    for name in hookpoints[1:]:
        scorer = copy.copy(base)
        scorer.hookpoint, scorer.nearest = resolve(base.model, name), None
        if name is None:
            scorer = Scorer(base.model, scorer.hookpoint, base.autocast, base.softmax_dtype)
        found.append(scorer)
    every = known_blocks(base.model)
    outputs = _outputs(base, every, device)
    refused = []
    for name, scorer in zip(hookpoints, found, strict=True):
        scorer.skip = _skip(scorer.hookpoint, every, outputs)
        if scorer.skip is not None and not _equal(scorer, device):
            scorer.skip = None
            refused.append(str(name))
    if refused:
        log.warning("hookpoints: whole forwards, as starting there changes %s", ", ".join(refused))
    return found


def _outputs(base: Scorer, every: Sequence[nn.Module], device: torch.device) -> dict:
    """What each block returns besides its hidden states; of those that run once, in order."""
    outputs: dict[nn.Module, list[Any]] = {}

    def keep(block: nn.Module, args: tuple, output: Any) -> None:
        outputs.setdefault(block, []).append(output)

    handles = [block.register_forward_hook(keep) for block in every]
    try:
        with torch.no_grad():
            base.logits(*_trial(base, device))
    finally:
        for handle in handles:
            handle.remove()
    return {
        block: tuple(found[0][1:]) if isinstance(found[0], tuple) else None
        for block, found in outputs.items()
        if len(found) == 1
    }


def _skip(hookpoint: nn.Module, every: Sequence[nn.Module], outputs: dict) -> Skip | None:
    """The blocks before a hookpoint, the block itself included if it is one."""
    running = [block for block in every if block in outputs]
    for i, block in enumerate(running):
        if hookpoint in block.modules():
            left = running[: i + (hookpoint is block)]
            return Skip(tuple(left), tuple(outputs[b] for b in left)) if left else None
    return None


def _trial(scorer: Scorer, device: torch.device) -> tuple[Any, Tensor]:
    pack = pack_rows(made_up(scorer)[:1]).to(device)
    return pack, pack.scored.positions


def _equal(scorer: Scorer, device: torch.device) -> bool:
    """Whether the logits at a point that is not the clean one are those of a whole forward."""
    assert scorer.skip is not None
    pack, positions = _trial(scorer, device)
    try:
        with torch.no_grad(), _captured([scorer.hookpoint, scorer.skip.blocks[-1]]) as seen:
            scorer.logits(pack, positions)
            point = seen[scorer.hookpoint] * 1.01
            whole = scorer.logits(pack, positions, point)
            part = scorer.logits(pack, positions, point, seen[scorer.skip.blocks[-1]])
    except Exception as error:
        if should_reduce_batch_size(error):
            raise
        log.info("hookpoints: the model refused to start there: %s", error)
        return False
    eps = max(torch.finfo(t).eps for t in (scorer.autocast or scorer.model.dtype, torch.float32))
    return bool((part - whole).float().square().mean().sqrt() <= eps**0.5 * whole.float().std())


@contextmanager
def _captured(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """The first outputs of modules while it lasts, as they stand in the graph.

    At its end those are left out that have been written to since.
    """
    seen: dict[nn.Module, Tensor] = {}
    versions: dict[nn.Module, int] = {}

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
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


def share(surfaces: Sequence[Surface], gradient: bool) -> None:
    """Gives the surfaces of one pack their clean points, answers and gradients from one pass.

    Args:
        surfaces: which differ in their hookpoints.
        gradient: whether gradients are needed.
    """
    first = surfaces[0]
    pack, scorer = first.pack, first.scorer
    if not scorer.together(pack):
        return  # rows of different frequencies, each by itself
    embedding = scorer.model.get_input_embeddings()
    modules = [s.scorer.hookpoint for s in surfaces]
    modules += [s.scorer.skip.blocks[-1] for s in surfaces if s.scorer.skip is not None]
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(gradient))
        if gradient:  # so that there is a graph: parameters have no gradients
            leaf = edit_output(embedding, lambda x: x.detach().requires_grad_(True))
            stack.enter_context(leaf)
        with _captured(modules) as seen:
            scores = scorer(pack, pack.watched)
        found = [surface for surface in surfaces if surface.scorer.hookpoint in seen]
        if gradient:
            values = first.loss_of(scores)
            points = [seen[surface.scorer.hookpoint] for surface in found]
            slopes = torch.autograd.grad(values.sum(), points)
    clean = type(scores)(*(s.detach()[pack.kept] for s in scores))
    for i, surface in enumerate(found):
        surface.clean = clean
        surface.x = surface.of_nodes(seen[surface.scorer.hookpoint].detach())
        skip = surface.scorer.skip
        if skip is not None and skip.blocks[-1] in seen:
            surface.below = seen[skip.blocks[-1]].detach()
        if gradient:
            surface.clean_loss = values.detach()
            surface.gradient = surface.of_nodes(slopes[i], total=True)
