"""The blocks of a Llama as one function, in fewer passes over memory, forward and backward.

The forward pass computes each node once (`Twins`), and only attention sees rows. The backward pass
goes row by row, and reads the tensors of nodes that the forward pass has kept. Many results replace
their inputs in memory. Autograd cannot do so, because it does not know who else needs a tensor.

The engine uses the function on a CPU in float32, if a trial gives the numbers of the model's own
code. A block with other parts, or with a hook, keeps the model's code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llm_attack.lm.engine.flat import ATTENTION
from llm_attack.lm.network.blocks import known_blocks
from llm_attack.lm.network.lean import Lean, turned, turned_back
from llm_attack.lm.packing.pack import Flat, Twins

_NORMS = ("input_layernorm", "post_attention_layernorm")
_PARTS = {
    "": {"self_attn", "mlp", *_NORMS},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}


@dataclass(frozen=True)
class Places:
    """The places of tokens: N tokens of rows, and U nodes that the forward computes.

    Attributes:
        shape: (B, L) of the rows.
        node: (N,) the node of each token; None: each token is a node.
        first: (U,) one token of each node; None: each token is a node.
        flat: the rows without padding; None: the N tokens are B x L positions.
    """

    shape: tuple[int, int]
    node: Tensor | None = None
    first: Tensor | None = None
    flat: Flat | None = None

    @cached_property
    def _of_positions(self) -> Tensor | None:
        """(B x L,) the node of each position."""
        if self.flat is None:
            return self.node
        return self.flat.number if self.node is None else self.node[self.flat.number]

    @cached_property
    def _of_nodes(self) -> Tensor | None:
        """(U,) a position of each node."""
        if self.flat is None:
            return self.first
        return self.flat.real if self.first is None else self.flat.real[self.first]

    def to_rows(self, nodes: Tensor) -> Tensor:
        """From nodes (U, ...) to (B x L, ...). Padding gets some token's values, never read."""
        index = self._of_positions
        return nodes if index is None else nodes.index_select(0, index)

    def of_rows(self, rows: Tensor) -> Tensor:
        """From (B x L, ...) to nodes (U, ...)."""
        index = self._of_nodes
        return rows if index is None else rows.index_select(0, index)

    def slopes_to_rows(self, slopes: Tensor) -> Tensor:
        """From tokens (N, ...) to (B x L, ...), with zeros for padding."""
        if self.flat is None:
            return slopes
        rows = slopes.new_zeros(len(self.flat.number), *slopes.shape[1:])
        return rows.index_copy_(0, self.flat.real, slopes)

    def slopes_of_rows(self, rows: Tensor) -> Tensor:
        """From (B x L, ...) to tokens (N, ...)."""
        return rows if self.flat is None else rows.index_select(0, self.flat.real)

    def nodes_of(self, tokens: Tensor) -> Tensor:
        """From tokens (N, ...) to nodes (U, ...)."""
        return tokens if self.first is None else tokens.index_select(0, self.first)

    def to_tokens(self, nodes: Tensor) -> Tensor:
        """From nodes (U, ...) to tokens (N, ...)."""
        return nodes if self.node is None else nodes.index_select(0, self.node)


@dataclass
class _Call:
    """A block and its inputs, without the hidden states.

    Attributes:
        block: the block.
        mask: the mask of its attention.
        angles: cosines and sines, (N, 1, D) each, of all tokens.
        of_nodes: cosines and sines of the nodes, (U, 1, D) each.
    """

    block: Any
    mask: Tensor | None
    angles: list[Tensor]
    of_nodes: list[Tensor]


@dataclass
class _Attended:
    """The attention of a block: inputs, and output with its graph, each (B, heads, L, D)."""

    inputs: list[Tensor]
    output: Tensor


class _Blocks(torch.autograd.Function):
    """(1 or B, ..., H) hidden states after all blocks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, calls: list[_Call], places: Places) -> Tensor:
        ctx.calls, ctx.places, ctx.attended = calls, places, []
        kept: list[Tensor] = []
        result = _forward(hidden, calls, places, kept, ctx.attended)
        ctx.save_for_backward(*kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        kept, places = [*ctx.saved_tensors], ctx.places
        slope = upstream.reshape(-1, upstream.shape[-1]).clone()
        while ctx.calls:
            call, block = ctx.calls.pop(), kept[-_KEPT:]
            del kept[-_KEPT:]
            _block_backward(slope, call, places, block, ctx.attended.pop())
        return slope.view_as(upstream), None, None


_KEPT = 6  # tensors that a block keeps


def _forward(
    hidden: Tensor,
    calls: list[_Call],
    places: Places,
    kept: list[Tensor] | None = None,
    attended: list[_Attended] | None = None,
) -> Tensor:
    """The blocks' output; `kept` and `attended` get the tensors that the backward pass reads."""
    x = hidden.reshape(-1, hidden.shape[-1])
    x = x.clone() if places.first is None else places.nodes_of(x)
    for call in calls:
        x = _block_forward(x, call, places, kept, attended)
    return places.to_tokens(x).view_as(hidden)


def _answers(hidden: Tensor, calls: list[_Call], places: Places, read: Tensor) -> Tensor:
    """The blocks' output at some of the tokens, (P,), without a gradient; zero at the others."""
    x = hidden.flatten(0, 1).clone()
    for call in calls[:-1]:
        x = _block_forward(x, call, places)
    x = _block_forward(x, calls[-1], places, read=read)
    output = x.new_zeros(hidden.shape).flatten(0, 1)
    return output.index_copy_(0, read, x).view_as(hidden)


def _block_forward(
    x: Tensor,
    call: _Call,
    places: Places,
    kept: list[Tensor] | None = None,
    attended: list[_Attended] | None = None,
    read: Tensor | None = None,
) -> Tensor:
    """(U, H) output of a block, or (P, H) of the nodes that are read."""
    attention, mlp = call.block.self_attn, call.block.mlp
    normed, scale = _normed(x, call.block.input_layernorm)
    q, k, v = (_projected(normed, attention, f"{name}_proj") for name in "qkv")
    heads = [t.view(len(t), -1, attention.head_dim) for t in (q, k, v)]
    heads[:2] = [turned(t, *call.of_nodes) for t in heads[:2]]
    output = _attend(call, places, heads, attended)
    if read is not None:
        output, x = output.index_select(0, read), x.index_select(0, read)
    attention_output = linear(output, attention.o_proj.weight, attention.o_proj.bias)
    y = x.add_(attention_output) if kept is None else attention_output.add_(x)
    normed, of_norm = _normed(y, call.block.post_attention_layernorm)
    gate, up = (_projected(normed, mlp, f"{name}_proj") for name in ("gate", "up"))
    del normed
    if kept is None:
        return y.add_(_projected(silu(gate, inplace=True).mul_(up), mlp, "down_proj"))
    of_up = silu(gate)
    of_gate = torch.ops.aten.silu_backward(up, gate)
    kept += [x, scale, y, of_norm, of_gate, of_up]
    return _projected(up.mul_(of_up), mlp, "down_proj").add_(y)


def _attend(
    call: _Call, places: Places, heads: list[Tensor], attended: list[_Attended] | None
) -> Tensor:
    """(U, heads x D) output of the attention of rows, for inputs (U, heads, D)."""
    attention = call.block.self_attn
    rows = [
        places.to_rows(t.flatten(1)).view(*places.shape, *t.shape[1:]).transpose(1, 2)
        for t in heads
    ]
    with torch.set_grad_enabled(attended is not None):
        rows = [t.detach().requires_grad_(attended is not None) for t in rows]
        function = ALL_ATTENTION_FUNCTIONS[ATTENTION]
        output, _ = function(attention, *rows, call.mask, dropout=0.0, scaling=attention.scaling)
    if attended is not None:
        attended.append(_Attended(rows, output))
    return places.of_rows(output.detach().reshape(len(rows[0]) * rows[0].shape[2], -1))


def _block_backward(
    slope: Tensor, call: _Call, places: Places, kept: list[Tensor], attended: _Attended
) -> None:
    """Turns the gradient at a block's output, (N, H), into the gradient at its input, in place."""
    x, scale, y, of_norm, of_gate, of_up = kept
    attention, mlp = call.block.self_attn, call.block.mlp
    inner = slope @ mlp.down_proj.weight
    through = places.to_tokens(of_gate).mul_(inner)
    gradient = through @ mlp.gate_proj.weight
    del through
    gradient.addmm_(inner.mul_(places.to_tokens(of_up)), mlp.up_proj.weight)
    del inner
    _add_normed(slope, gradient, call.block.post_attention_layernorm, places, y, of_norm)
    rows = places.slopes_to_rows(slope @ attention.o_proj.weight)
    heads = torch.autograd.grad(attended.output, attended.inputs, rows.view_as(attended.output))
    for head, name in zip(heads, "qkv", strict=True):
        of_tokens = places.slopes_of_rows(head.transpose(1, 2).reshape(len(rows), -1))
        if name != "v":
            of_heads = of_tokens.view(len(of_tokens), -1, attention.head_dim)
            of_tokens = turned_back(of_heads, *call.angles).flatten(1)
        weight = getattr(attention, f"{name}_proj").weight
        if name == "q":
            gradient = of_tokens @ weight
        else:
            gradient.addmm_(of_tokens, weight)
    _add_normed(slope, gradient, call.block.input_layernorm, places, x, scale)


def _projected(x: Tensor, parent: Any, name: str) -> Tensor:
    layer = getattr(parent, name)
    return linear(x, layer.weight, layer.bias)


def _normed(x: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """The RMS norm of (U, H), and its scale, (U, 1)."""
    scale = x.square().mean(-1, keepdim=True).add_(_eps(norm)).rsqrt_()
    return (x * scale).mul_(norm.weight), scale


def _eps(norm: Any) -> float:
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


def _add_normed(
    slope: Tensor, gradient: Tensor, norm: Any, places: Places, x: Tensor, scale: Tensor
) -> None:
    """Adds the gradient at a norm's input to `slope`, from the gradient at its output."""
    x, scale = places.to_tokens(x), places.to_tokens(scale)
    gradient.mul_(norm.weight)
    along = (gradient * x).mean(-1, keepdim=True).mul_(scale).mul_(scale)
    slope.addcmul_(gradient.addcmul_(x, along, value=-1), scale)


class Stack:
    """The blocks of a model.

    Args:
        model: the model.
        blocks: its blocks.
    """

    def __init__(self, model: PreTrainedModel, blocks: list[nn.Module]) -> None:
        self.model, self.blocks = model, blocks

    @classmethod
    def of(cls, model: PreTrainedModel, lean: Lean) -> Stack | None:
        """The stack, if all blocks have the known parts."""
        blocks = known_blocks(model)
        sources = {source.__name__ for source in lean.sources if source is not None}
        for block in blocks:
            if type(block).__module__ not in sources or not _known(block, lean):
                return None
        known = blocks and getattr(model.config, "_attn_implementation", None) == ATTENTION
        return cls(model, blocks) if known else None

    def contains(self, module: nn.Module) -> bool:
        """Whether a module is one of the blocks or a part of one."""
        return any(module is part for block in self.blocks for part in block.modules())

    @property
    def free(self) -> bool:
        """Whether nobody has a hook in a block, or has replaced a part of it."""
        return not any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or _replaced(m)
            for block in self.blocks
            for m in block.modules()
        )

    @contextmanager
    def used(
        self, shape: tuple[int, int], flat: Flat | None, twins: Twins | None, read: Tensor
    ) -> Iterator[None]:
        """While the context lasts, the last block computes all blocks.

        Args:
            shape: (B, L) of the rows.
            flat: the rows without padding, if the model reads them so.
            twins: the twins of the tokens that the model reads.
            read: (P,) the tokens whose output is read.
        """
        places = Places(shape, flat=flat)
        if twins is not None:
            places = Places(shape, twins.node, twins.first, flat)
        calls: list[_Call] = []
        last: list[Any] = [None, [], []]  # angles, which all blocks share

        def noted(block: nn.Module) -> Any:
            def forward(
                hidden_states: Tensor,
                attention_mask: Tensor | None = None,
                position_embeddings: Any = None,
                past_key_values: Any = None,
                **_: Any,
            ) -> Tensor:
                if past_key_values is not None:
                    raise RuntimeError("a cache was given to blocks that have none")
                mask = attention_mask if flat is None else None
                if last[0] is not position_embeddings:
                    angles = _angles(position_embeddings, hidden_states)
                    of_nodes = [places.nodes_of(part) for part in angles]
                    last[:] = position_embeddings, angles, of_nodes
                calls.append(_Call(block, mask, *last[1:]))
                if block is not self.blocks[-1]:
                    return hidden_states
                if torch.is_grad_enabled() and hidden_states.requires_grad:
                    result: Tensor = _Blocks.apply(hidden_states, calls, places)  # type: ignore[no-untyped-call]
                    return result
                with torch.no_grad():
                    return _answers(hidden_states, calls, places, read)

            return forward

        try:
            for block in self.blocks:
                vars(block)["forward"] = noted(block)
            yield
        finally:
            for block in self.blocks:
                vars(block).pop("forward", None)


def _replaced(module: nn.Module) -> bool:
    """Whether a module has another forward than its class; its own may be an attribute, too."""
    own = MethodType(type(module).forward, module)
    return bool(vars(module).get("forward", own) != own)


def _angles(given: tuple[Tensor, Tensor], hidden: Tensor) -> list[Tensor]:
    """(N, 1, D) cosines and sines of all tokens."""
    return [part.expand(*hidden.shape[:2], -1).flatten(0, 1).unsqueeze(1) for part in given]


def _known(block: nn.Module, lean: Lean) -> bool:
    """Whether a block has the parts of a Llama's block."""
    for path, names in _PARTS.items():
        part = block.get_submodule(path) if not path or hasattr(block, path) else nn.Identity()
        children = dict(part.named_children())
        linears = [child for name, child in children.items() if name.endswith("_proj")]
        if {*children} != names or any(type(child) is not nn.Linear for child in linears):
            return False
    drawn = torch.linspace(-4, 4, 9)
    mlp: Any = block.mlp
    return all(getattr(block, name) in lean.norms for name in _NORMS) and torch.equal(
        mlp.act_fn(drawn), silu(drawn)
    )
