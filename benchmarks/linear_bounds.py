"""How far sound linear bounds without sampling reach on the bundled model.

    python benchmarks/linear_bounds.py --tasks demo_arc_easy --limit 20

Each number that the network computes is bounded by a linear function of the perturbation plus or
minus a rest. The slope is the derivative at the clean point. The rest bounds what the derivative
misses: half of the largest second derivative times the squared size of the change, and products of
changes. This is forward linear relaxation (Xu et al. 2020, arXiv 2002.12920) with tangents as the
lines. Interval bounds forget that coordinates move together, and these lines remember it.

If the lower bound of the margin is above 0, no perturbation within the radius changes the answer.
This holds for the network itself, and without chance. The numbers are float64 without outward
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
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

NORMS = ("linf", "l2")
EXPONENTS = torch.linspace(-11, -3, 81, dtype=torch.float64)  # of the radii that are tried


class Line(NamedTuple):
    """Tensors that are linear in the perturbation, up to a rest.

    Attributes:
        value: (...) at the clean point.
        slope: (N, ...) derivatives by the N coordinates of the perturbation.
        rest: (2, R, ...) for each norm and radius, the largest distance from the linear function.
    """

    value: Tensor
    slope: Tensor
    rest: Tensor

    def mapped(self, function: Any) -> Line:
        """All parts after a function that only moves elements of the trailing dimensions."""
        return Line(*(function(part) for part in self))

    def plus(self, other: Line) -> Line:
        return Line(*(a + b for a, b in zip(self, other, strict=True)))

    def linear(self, weight: Tensor) -> Line:
        return Line(self.value @ weight.T, self.slope @ weight.T, self.rest @ weight.abs().T)

    def times(self, factor: Tensor) -> Line:
        """Multiplied by numbers that do not depend on the perturbation."""
        return Line(self.value * factor, self.slope * factor, self.rest * factor.abs())


class Bounds:
    """Linear bounds of a small Llama without grouped queries.

    Args:
        model: the model, a `LlamaForCausalLM`.
        radii: (R,) radii of the balls, in the units of the embeddings.
    """

    def __init__(self, model: Any, radii: Tensor) -> None:
        self.model, self.radii = model, radii.double()
        self.heads = model.config.num_attention_heads
        if model.config.num_key_value_heads != self.heads:
            raise ValueError("the bounds are only for models without grouped queries")

    # -- operations --------------------------------------------------------------------------------

    def size(self, x: Line) -> Tensor:
        """(2, R, ...) the largest change of each number."""
        norms = torch.stack([x.slope.abs().sum(0), x.slope.square().sum(0).sqrt()])
        radii = self.radii.reshape(1, -1, *[1] * x.value.dim())
        return (norms[:, None] * radii + x.rest).nan_to_num(torch.inf, torch.inf)  # of 0 * inf

    def bent(self, x: Line, value: Tensor, first: Tensor, second: Tensor) -> Line:
        """A function of each element.

        Args:
            x: its argument.
            value, first: the function and its derivative at the clean point.
            second: the largest absolute second derivative within reach.
        """
        rest = first.abs() * x.rest + second / 2 * self.size(x).square()
        return Line(value, x.slope * first, rest)

    def product(self, a: Line, b: Line, times: Any = torch.mul) -> Line:
        """The product of two lines; with `times`, their matrix product."""
        rest = times(a.value.abs(), b.rest) + times(a.rest, b.value.abs())
        rest = rest + times(self.size(a), self.size(b))
        slope = times(a.value, b.slope) + times(a.slope, b.value)
        return Line(times(a.value, b.value), slope, rest)

    def exp(self, x: Line) -> Line:
        value = x.value.exp()
        return self.bent(x, value, value, (x.value + self.size(x)).exp())

    def power(self, x: Line, exponent: float) -> Line:
        """x to a negative power, or with the exponent 0 its logarithm; for numbers above 0."""
        least = x.value - self.size(x)
        lead = abs(exponent * (exponent - 1)) or 1.0
        second = torch.where(least > 0, lead * least ** (exponent - 2), torch.inf)
        value = x.value**exponent if exponent else x.value.log()
        return self.bent(x, value, (exponent or 1.0) * x.value ** (exponent - 1), second)

    def norm(self, x: Line, layer: nn.Module) -> Line:
        """The RMS norm."""
        square = self.product(x, x).mapped(lambda part: part.mean(-1, keepdim=True))
        square = square._replace(value=square.value + layer.variance_epsilon)
        return self.product(x, self.power(square, -0.5)).times(layer.weight.double())

    def silu(self, x: Line) -> Line:
        """x · sigmoid(x), whose second derivative is between -0.2 and 0.5."""
        s = x.value.sigmoid()
        first = s * (1 + x.value * (1 - s))
        return self.bent(x, x.value * s, first, torch.full_like(x.value, 0.5))

    def softmax(self, x: Line, allowed: Tensor) -> Line:
        top = x.value.masked_fill(~allowed, -torch.inf).amax(-1, keepdim=True)
        raised = self.exp(x._replace(value=x.value - top)).mapped(lambda part: part * allowed)
        total = raised.mapped(lambda part: part.sum(-1, keepdim=True))
        return self.product(raised, self.power(total, -1.0))

    # -- the network -------------------------------------------------------------------------------

    def logits(self, tokens: Sequence[int], n: int) -> Line:
        """The last n logits, (n, V), as lines in the L · H coordinates of the embeddings."""
        last = self.hidden(tuple(tokens)).mapped(lambda part: part[..., -n:, :])
        return last.linear(self.model.lm_head.weight.double())

    @lru_cache(maxsize=2)  # noqa: B019  # choices of one token have the same inputs
    def hidden(self, tokens: tuple[int, ...]) -> Line:
        """(L, H) what the head reads, as lines in the L · H coordinates of the embeddings."""
        base, ids = self.model.model, torch.tensor([list(tokens)])
        x = base.embed_tokens(ids)[0].double()
        length, n = len(tokens), x.numel()
        cos, sin = (
            part[0].double() for part in base.rotary_emb(x[None], torch.arange(length)[None])
        )
        slope = torch.eye(n, dtype=torch.float64).reshape(n, *x.shape)
        line = Line(x, slope, torch.zeros(2, len(self.radii), *x.shape, dtype=torch.float64))
        for block in base.layers:
            line = line.plus(
                self._attention(block.self_attn, self.norm(line, block.input_layernorm), cos, sin)
            )
            line = line.plus(self._mlp(block.mlp, self.norm(line, block.post_attention_layernorm)))
        return self.norm(line, base.norm)

    def _attention(self, layer: Any, x: Line, cos: Tensor, sin: Tensor) -> Line:
        def of_heads(part: Tensor) -> Tensor:
            return part.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

        def turned(line: Line) -> Line:
            return line.times(cos).plus(
                line.mapped(lambda p: p.roll(p.shape[-1] // 2, -1)).times(sin * sign)
            )

        query, key, value = (
            x.linear(p.weight.double()).mapped(of_heads)
            for p in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        half = query.value.shape[-1] // 2
        sign = torch.cat([-torch.ones(half), torch.ones(half)]).double()
        query = turned(query).times(torch.tensor(2 * half, dtype=torch.float64) ** -0.5)
        key = turned(key).mapped(lambda part: part.transpose(-1, -2))
        scores = self.product(query, key, torch.matmul)
        allowed = torch.ones(scores.value.shape[-2:], dtype=torch.bool).tril()
        mixed = self.product(self.softmax(scores, allowed), value, torch.matmul)
        joined = mixed.mapped(lambda part: part.transpose(-3, -2).flatten(-2))
        return joined.linear(layer.o_proj.weight.double())

    def _mlp(self, layer: Any, x: Line) -> Line:
        gate, up = (x.linear(p.weight.double()) for p in (layer.gate_proj, layer.up_proj))
        return self.product(self.silu(gate), up).linear(layer.down_proj.weight.double())

    # -- questions ---------------------------------------------------------------------------------

    def score(self, request: Request) -> Line:
        """The log-likelihood of a request's continuation."""
        n = request.n_continuation
        logits = self.logits(request.inputs, n)
        top = logits.value.amax(-1, keepdim=True)
        logits = logits._replace(value=logits.value - top)
        target = torch.tensor(request.tokens[-n:])
        own = logits.mapped(lambda part: part[..., torch.arange(n), target])
        total = self.exp(logits).mapped(lambda part: part.sum(-1))
        return own.plus(self.power(total, 0.0).times(torch.tensor(-1.0))).mapped(
            lambda p: p.sum(-1)
        )

    def margin(self, question: Question) -> Tensor:
        """(2, R) lower bound of the margin, for each norm and radius.

        Choices share the perturbation of the tokens that they have in common.
        """
        requests = question.requests[: len(question.gold)]
        scores = [self.score(request) for request in requests]
        pairs = list(zip(requests, scores, question.gold, strict=True))
        golds, others = ([p[:2] for p in pairs if p[2] == gold] for gold in (True, False))
        ends = [
            torch.stack([self._ahead(*gold, *other) for other in others]).amin(0) for gold in golds
        ]
        return torch.stack(ends).amax(0)

    def _ahead(self, gold: Request, score: Line, other: Request, of_other: Line) -> Tensor:
        """(2, R) lower bound of the difference of two scores."""
        pairs = list(zip(gold.inputs, other.inputs, strict=False))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        width = len(score.slope) // len(gold.inputs)
        one, two = score.slope, of_other.slope
        slope = torch.cat(
            [one[: same * width] - two[: same * width], one[same * width :], two[same * width :]]
        )
        between = Line(score.value - of_other.value, slope, score.rest + of_other.rest)
        return between.value - self.size(between)

    def reach(self, question: Question) -> list[float]:
        """For each norm, the largest radius up to which all are certified; 0 if none is."""
        certified = self.margin(question) > 0
        n = certified.long().cumprod(-1).sum(-1)
        return [float(self.radii[k - 1]) if k else 0.0 for k in n.tolist()]


@click.command()
@click.option("--tasks", default="demo_arc_easy", show_default=True, help="Tasks.")
@click.option("--limit", default=20, show_default=True, help="Questions of each task.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder of the result.")
@torch.no_grad()
def main(tasks: str, limit: int, output: Path | None) -> None:
    """Measure how far linear bounds reach on the bundled model."""
    silence()
    plan = Plan("demo", tasks, attacks="none", loss="margin", limit=limit, batch_size=1)
    with without_bars():
        prepared = prepare(plan, "quiet", Console(quiet=True))
    lm, rows = prepared.lm, []
    size = lm.signal.width**0.5  # length in L2 of a token with 1 in each coordinate
    units = {"linf": lm.signal.rms, "l2": lm.signal.rms * size}
    bounds = Bounds(lm.model, 10**EXPONENTS * lm.signal.rms)
    for work in prepared.work:
        assert isinstance(work.batch, Batch)
        for question in work.batch.questions:
            doc_id = prepared.requests[work.numbers[question.answers[0][0]]].doc_id
            reach = dict(zip(NORMS, bounds.reach(question), strict=True))
            found = {f"reach_{norm}_rms": reach[norm] / units[norm] for norm in NORMS}
            rows.append({"task": work.key[0], "doc_id": doc_id, **found})
            print(", ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    rows.sort(key=lambda row: (row["task"], row["doc_id"]))
    for norm in NORMS:
        values = torch.tensor([row[f"reach_{norm}_rms"] for row in rows], dtype=torch.float64)
        right = values[values > 0]
        if len(right):
            print(f"{norm}: {len(right)} of {len(rows)}; median {right.median():.3g} RMS")
    if output is not None:
        command = f"python benchmarks/linear_bounds.py --tasks {tasks} --limit {limit} -o {output}"
        content = {"command": command, "rms": lm.signal.rms, "questions": rows}
        write_json(output / "run.json", content | {"versions": versions(), "hardware": hardware()})


if __name__ == "__main__":
    main()
