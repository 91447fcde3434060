"""The figures of "On paper" in `scale.md`: estimates for runs that are too large to try here.

    python docs/scale.py

It prints Markdown. The code has the formulas. The assumptions, which are not measured, come first.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_attack.suite.report.tables import Cells

PEAK, SHARE = 989e12, 0.4  # FLOP/s of an H100 in bfloat16, and the share of it that products reach
BYTES = 2  # of a number in bfloat16

# Tokens of the six benchmarks (all questions) in Llama's vocabulary of 32,000: of all requests, and
# of the trees. These are counted, and not assumed.
QUESTIONS, REQUESTS, ROWS, TREES = 17_195, 62_566, 4_387_285, 2_238_430
# Bytes of a row of samples.parquet and of questions.parquet, in results/fig3/smollm2-135m.
SAMPLE, QUESTION = 16, 122

# Forwards and backwards of none, random, fgsm and bim in ten steps. One forward for the clean
# answers gives the first gradient. Nine more steps have both, and three conditions have one forward
# for their answers.
FORWARDS, BACKWARDS = 1 + 9 + 3, 1 + 9


@dataclass(frozen=True)
class Model:
    """A Llama.

    Attributes:
        layers, width, inner, heads_width: sizes of the blocks; `heads_width` is that of keys and
            values.
        vocabulary: rows of the head.
    """

    layers: int
    width: int
    inner: int
    heads_width: int
    vocabulary: int

    @property
    def blocks(self) -> int:
        """Weights of the blocks."""
        attention = 2 * self.width**2 + 2 * self.width * self.heads_width
        return self.layers * (attention + 3 * self.width * self.inner)

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.vocabulary * self.width

    def flop(self, tokens: int) -> float:
        """FLOP of the four conditions, with a loss that reads every token.

        A product takes two operations per weight. The backward pass takes as many as the forward
        pass, because it gives the gradient of the point, and none of the weights.
        """
        return 2.0 * (self.blocks + self.head) * tokens * (FORWARDS + BACKWARDS)

    def kept(self, checkpointing: bool) -> float:
        """Bytes per token that are kept for the backward pass.

        With checkpointing, they are the input of each block. Without, they are the tensors that its
        operations save: two normalisations save two widths each, attention saves a width of queries
        and one of outputs, keys and values, and the activation and its product save three inner
        widths. Products with frozen weights save nothing. Logits are computed in slices, and are
        extra.
        """
        each = self.width
        if not checkpointing:
            each = 6 * self.width + 2 * self.heads_width + 3 * self.inner
        return float(BYTES * self.layers * each)


LARGE = Model(80, 8192, 28_672, 1024, 128_256)
MIDDLE = Model(32, 4096, 14_336, 1024, 128_256)


def hours(flop: float, devices: int) -> float:
    """Hours at `SHARE` of the peak."""
    return flop / (PEAK * SHARE * devices) / 3600


def fig3() -> Cells:
    """Fig. 3 for a model of 70 billion weights, on eight H100."""
    weights = BYTES * (LARGE.blocks + 2 * LARGE.head)
    rows = [
        ["weights, in all and on each device", f"{weights / 1e9:.0f} GB, {weights / 8e9:.0f} GB"],
    ]
    for name, tokens in (("`context=shared`", TREES), ("`context=own`", ROWS)):
        flop = LARGE.flop(tokens)
        rows.append([f"tokens, {name}", f"{tokens:,}"])
        rows.append([f"FLOP, {name}", f"{flop:.2g}"])
        rows.append([f"hours, {name}", f"{hours(flop, 8):.1f}"])
    for name, checkpointing in (("without", False), ("with", True)):
        kept = LARGE.kept(checkpointing)
        rows.append([f"kept of a token, {name} checkpointing", f"{kept / 1e6:.2g} MB"])
    samples = SAMPLE * 4 * QUESTIONS + QUESTION * QUESTIONS
    rows.append(["samples and questions on disk", f"{samples / 1e6:.1f} MB"])
    return Cells(["Fig. 3, 70 B, eight H100", "figure"], rows, [])


def cluster() -> Cells:
    """A hundred models of 8 billion weights on sixty tasks of 1,500 questions of this kind."""
    questions = 60 * 1500
    tokens = round(questions * TREES / QUESTIONS)
    flop = MIDDLE.flop(tokens)
    weights = BYTES * (MIDDLE.blocks + 2 * MIDDLE.head)
    samples = 100 * questions * (SAMPLE * 4 + QUESTION)
    rows = [
        ["tokens of a model, `context=shared`", f"{tokens:,}"],
        ["FLOP of a model", f"{flop:.2g}"],
        ["H100 hours, of a model and of all", f"{hours(flop, 1):.1f}, {100 * hours(flop, 1):.0f}"],
        ["weights to be loaded, in all", f"{100 * weights / 1e12:.1f} TB"],
        ["samples and questions on disk", f"{samples / 1e9:.1f} GB"],
    ]
    return Cells(["100 models of 8 B, 60 tasks", "figure"], rows, [])


if __name__ == "__main__":
    for found in (fig3(), cluster()):
        print(found.markdown())
