"""How far a sound bound without sampling reaches: interval bound propagation through the demo.

    python benchmarks/interval_bounds.py --tasks demo_arc_easy --limit 20

Every coordinate of the embeddings may move by at most r. Each operation of the network turns
intervals into intervals that contain all its results (Gowal et al. 2018, arXiv 1810.12715). If the
lower end of the right choice's score is above the upper end of every other score, no perturbation
within r changes the answer. This holds for the network itself, and without chance. A ball of radius
r in L2 lies inside this box, so r is also a bound in L2.

The numbers are float64 without outward rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from torch import Tensor, nn

from llm_attack.base.record import hardware, versions, write_json
from llm_attack.harness.patches import without_bars
from llm_attack.lm.packing.batches import Batch
from llm_attack.lm.packing.questions import Question, Request
from llm_attack.suite.evaluate import silence
from llm_attack.suite.plan import Plan
from llm_attack.suite.run.execute import prepare

ROUNDS = 9  # of the bisection; each halves the logarithm of the bracket
SMALLEST, LARGEST = 1e-16, 1e-2  # of the bracket, in the RMS of the embeddings
_LOWEST_SILU = -1.2784645427610738  # where x * sigmoid(x) has its minimum


class Interval(NamedTuple):
    """All tensors between two ends, coordinate by coordinate."""

    low: Tensor
    high: Tensor

    @classmethod
    def around(cls, middle: Tensor, half: Any) -> Interval:
        return cls(middle - half, middle + half)

    @property
    def middle(self) -> Tensor:
        return (self.low + self.high) / 2

    @property
    def half(self) -> Tensor:
        return (self.high - self.low) / 2

    def plus(self, other: Interval) -> Interval:
        return Interval(self.low + other.low, self.high + other.high)

    def times(self, other: Interval) -> Interval:
        """The products of each element with that of `other`."""
        ends = torch.stack([a * b for a in self for b in other])
        return Interval(ends.amin(0), ends.amax(0))

    def linear(self, weight: Tensor) -> Interval:
        return Interval.around(self.middle @ weight.T, self.half @ weight.abs().T)

    def mapped(self, shape: Any) -> Interval:
        """Both ends after a function that only moves elements."""
        return Interval(shape(self.low), shape(self.high))


def normed(x: Interval, norm: nn.Module) -> Interval:
    """The RMS norm: each coordinate is bounded with the others free, but with itself as it is.

    x / sqrt((x² + s) / n + eps) rises with x, where s is the sum of the other squares.
    """
    n = x.low.shape[-1]
    least = torch.where((x.low <= 0) & (x.high >= 0), 0, torch.minimum(x.low**2, x.high**2))
    most = torch.maximum(x.low**2, x.high**2)
    rest = Interval(least.sum(-1, keepdim=True) - least, most.sum(-1, keepdim=True) - most)
    eps = norm.variance_epsilon

    def at(value: Tensor, others: Tensor) -> Tensor:
        return value / ((value**2 + others.clamp(min=0)) / n + eps).sqrt()

    low = torch.where(x.low > 0, at(x.low, rest.high), at(x.low, rest.low))
    high = torch.where(x.high > 0, at(x.high, rest.low), at(x.high, rest.high))
    weight = norm.weight.double()
    return Interval(low, high).times(Interval(weight, weight))


def silu(x: Interval) -> Interval:
    """x · sigmoid(x), which falls up to `_LOWEST_SILU` and rises after it."""
    ends = torch.stack([nn.functional.silu(end) for end in x])
    inside = (x.low < _LOWEST_SILU) & (x.high > _LOWEST_SILU)
    lowest = nn.functional.silu(torch.full_like(x.low, _LOWEST_SILU))
    return Interval(torch.where(inside, lowest, ends.amin(0)), ends.amax(0))


def products(a: Interval, b: Interval) -> Interval:
    """The matrix products of a (..., N, K) and b (..., K, M)."""
    middle = a.middle @ b.middle
    half = a.half @ b.middle.abs() + a.middle.abs() @ b.half + a.half @ b.half
    return Interval.around(middle, half)


def attended(scores: Interval, values: Interval) -> Interval:
    """The weighted sums of `values` (..., L, D) with the softmax of `scores` (..., L, L).

    A weight is least if its own score is at the lower end and all others are at the upper end.
    """

    def weights(own: Tensor, others: Tensor) -> Tensor:
        ahead = others.unsqueeze(-2) - own.unsqueeze(-1)
        ahead.diagonal(dim1=-2, dim2=-1).zero_()
        return 1 / ahead.exp().sum(-1)

    share = Interval(weights(scores.low, scores.high), weights(scores.high, scores.low))
    middle = scores.middle.softmax(-1)
    away = torch.maximum(share.high - middle, middle - share.low)
    # weights sum to 1, so a vector that all values have in common cannot change the sum
    common = middle @ values.middle
    apart = (values.middle.unsqueeze(-3) - common.unsqueeze(-2)).abs()
    moved = (away.unsqueeze(-2) @ apart).squeeze(-2)
    return Interval.around(common, moved + share.high @ values.half)


def rotated(x: Interval, cos: Tensor, sin: Tensor) -> Interval:
    """Rotary embeddings, a linear map of pairs of coordinates."""
    first, second = (x.mapped(lambda end, i=i: end.chunk(2, -1)[i]) for i in (0, 1))
    cos, sin = cos.chunk(2, -1)[0], sin.chunk(2, -1)[0]

    def sum_of(a: Interval, by_a: Tensor, b: Interval, by_b: Tensor) -> Interval:
        middle = a.middle * by_a + b.middle * by_b
        return Interval.around(middle, a.half * by_a.abs() + b.half * by_b.abs())

    parts = sum_of(first, cos, second, -sin), sum_of(second, cos, first, sin)
    return Interval(*(torch.cat(ends, -1) for ends in zip(*parts, strict=True)))


class Bounds:
    """Interval bounds of a small Llama without grouped queries, in float64.

    Args:
        model: the model, a `LlamaForCausalLM`.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.heads = self.config.num_attention_heads
        if self.config.num_key_value_heads != self.heads:
            raise ValueError("the bounds are only for models without grouped queries")

    def logits(self, tokens: Sequence[int], r: float) -> Interval:
        """The logits (L, V) if each coordinate of the embeddings moves by at most r."""
        base, ids = self.model.model, torch.tensor([list(tokens)])
        x = Interval.around(base.embed_tokens(ids)[0].double(), r)
        length = len(tokens)
        cos, sin = (
            part[0].double() for part in base.rotary_emb(x.low[None], torch.arange(length)[None])
        )
        causal = torch.full((length, length), -1e30, dtype=torch.float64).triu(1)
        for block in base.layers:
            x = x.plus(
                self._attention(block.self_attn, normed(x, block.input_layernorm), cos, sin, causal)
            )
            x = x.plus(self._mlp(block.mlp, normed(x, block.post_attention_layernorm)))
        return normed(x, base.norm).linear(self.model.lm_head.weight.double())

    def _attention(
        self, layer: Any, x: Interval, cos: Tensor, sin: Tensor, causal: Tensor
    ) -> Interval:
        def of_heads(end: Tensor) -> Tensor:
            return end.unflatten(-1, (self.heads, -1)).transpose(0, 1)

        query, key, value = (
            x.linear(p.weight.double()).mapped(of_heads)
            for p in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        scale = query.low.shape[-1] ** -0.5
        scores = products(query, key.mapped(lambda end: end.transpose(-1, -2)))
        scores = scores.mapped(lambda end: end * scale + causal)
        mixed = attended(scores, value).mapped(lambda end: end.transpose(0, 1).flatten(1))
        return mixed.linear(layer.o_proj.weight.double())

    def _mlp(self, layer: Any, x: Interval) -> Interval:
        gate, up = (x.linear(p.weight.double()) for p in (layer.gate_proj, layer.up_proj))
        return silu(gate).times(up).linear(layer.down_proj.weight.double())

    def score(self, request: Request, r: float) -> tuple[float, float]:
        """The ends of the log-likelihood of a request's continuation."""
        logits, n = self.logits(request.inputs, r), request.n_continuation
        target = torch.tensor(request.tokens[-n:])[:, None]
        low, high = (end[-n:] for end in logits)
        own = Interval(*(end.gather(1, target) for end in (low, high)))
        sums = [
            _log_share(own.low, high.scatter(1, target, own.low)),
            _log_share(own.high, low.scatter(1, target, own.high)),
        ]
        return sums[0], sums[1]

    def certifies(self, question: Question, r: float) -> bool:
        """Whether no perturbation of at most r in each coordinate makes the answer wrong."""
        ends = [self.score(request, r) for request in question.requests[: len(question.gold)]]
        gold = [end for end, is_gold in zip(ends, question.gold, strict=True) if is_gold]
        others = [end for end, is_gold in zip(ends, question.gold, strict=True) if not is_gold]
        return max(low for low, _ in gold) > max(high for _, high in others)

    def reach(self, question: Question, unit: float) -> float:
        """The largest r in `unit` that was found to be certified; 0 if `SMALLEST` is not."""
        low, high = SMALLEST, LARGEST
        if not self.certifies(question, low * unit):
            return 0.0
        for _ in range(ROUNDS):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.certifies(question, middle * unit) else (low, middle)
        return low


def _log_share(own: Tensor, all_: Tensor) -> float:
    return float((own[:, 0] - all_.logsumexp(-1)).sum())


@click.command()
@click.option("--tasks", default="demo_arc_easy", show_default=True, help="Tasks.")
@click.option("--limit", default=20, show_default=True, help="Questions of each task.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder of the result.")
@torch.no_grad()
def main(tasks: str, limit: int, output: Path | None) -> None:
    """Measure how far interval bounds reach on the bundled model."""
    silence()
    plan = Plan("demo", tasks, attacks="none", loss="margin", limit=limit, batch_size=1)
    with without_bars():
        prepared = prepare(plan, "quiet", Console(quiet=True))
    lm, rows = prepared.lm, []
    bounds, rms = Bounds(lm.model), lm.signal.rms
    for work in prepared.work:
        assert isinstance(work.batch, Batch)
        for question in work.batch.questions:
            doc_id = prepared.requests[work.numbers[question.answers[0][0]]].doc_id
            reach = bounds.reach(question, rms)
            rows.append({"task": work.key[0], "doc_id": doc_id, "reach_rms": reach})
            print(f"{work.key[0]} {doc_id}: {reach:.3g} RMS")
    rows.sort(key=lambda row: (row["task"], row["doc_id"]))
    values = torch.tensor([row["reach_rms"] for row in rows], dtype=torch.float64)
    right = values[values > 0]
    if len(right):
        print(f"{len(right)} of {len(rows)} certified; median of them {right.median():.3g} RMS")
    if output is not None:
        command = (
            f"python benchmarks/interval_bounds.py --tasks {tasks} --limit {limit} -o {output}"
        )
        content = {"command": command, "rms": rms, "questions": rows}
        write_json(output / "run.json", content | {"versions": versions(), "hardware": hardware()})


if __name__ == "__main__":
    main()
