"""One forward of a model that is known exactly, and the positions that are read."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llm_attack.lm.engine.scoring import Scorer, _slices, likeliest
from llm_attack.lm.packing.pack import pack_rows, pack_trees
from llm_attack.lm.packing.questions import Question, Request

ASKED = [
    Question([Request((1, 2, 3), 1), Request((1, 2, 4, 5), 2)], [[0], [1]]),
    Question([Request((3, 5), 1)], [[2]]),
]


class Words(nn.Module):
    """Reads a token at a time: its logits are those of its embedding."""

    dtype = torch.float64

    def __init__(self, virtual=0, head=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4, dtype=torch.float64)
        self.last = nn.Linear(4, 7, dtype=torch.float64)
        self.virtual, self.head, self.got = virtual, head, {}

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.last if self.head else None

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        self.got = {"attention_mask": attention_mask, "position_ids": position_ids}
        hidden = self.embed(input_ids)
        before = hidden.new_ones(len(hidden), self.virtual, 4)
        return SimpleNamespace(logits=self.last(torch.cat([before, hidden], 1)))


@pytest.mark.parametrize("make", [pack_rows, pack_trees])
@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
@pytest.mark.parametrize("virtual", [0, 2])
def test_logits_of_the_places_asked_for(make, virtual, head):
    """Also behind tokens that prompt tuning puts before, and of a model whose head is unknown."""
    model, pack = Words(virtual, head), make(ASKED)
    scorer = Scorer(model, model.embed)
    at = pack.scored.positions
    expected = model.last(model.embed(pack.input_ids.flatten()[at]))
    # not to the bit: a matrix product rounds by its shape
    assert torch.allclose(scorer.logits(pack, at), expected, rtol=1e-12)
    point = torch.randn(*pack.input_ids.shape, 4, dtype=torch.float64)
    expected = model.last(point.flatten(0, 1)[at])
    assert torch.allclose(scorer.logits(pack, at, point), expected, rtol=1e-12)
    assert torch.equal(scorer.point(pack), model.embed(pack.input_ids))


def test_scores_are_of_the_entries():
    model, pack = Words(), pack_trees(ASKED)
    scorer = Scorer(model, model.embed, softmax_dtype=torch.float64)
    point = torch.randn(*pack.input_ids.shape, 4, dtype=torch.float64)
    for x in (None, point):
        found = scorer(pack, pack.scored, x)
        logits = scorer.logits(pack, pack.scored.positions, x)[pack.scored.slot]
        expected = logits.log_softmax(-1)[range(len(logits)), pack.scored.target]
        assert torch.allclose(found.log_prob, expected, rtol=1e-12)
        assert torch.equal(found.greedy, logits.argmax(-1) == pack.scored.target)
    assert found.log_prob.dtype == torch.float64
    assert Scorer(model, model.embed)(pack, pack.scored).log_prob.dtype == torch.float32


def test_the_model_gets_a_mask_where_it_needs_one():
    model = Words()
    scorer, trees = Scorer(model, model.embed), pack_trees(ASKED)
    scorer.point(pack_rows(ASKED))
    scorer.logits(pack_rows(ASKED), torch.tensor([0]))
    assert model.got == {"attention_mask": None, "position_ids": None}
    scorer.logits(trees, torch.tensor([0]))
    assert torch.equal(model.got["attention_mask"], trees.inputs.attention(torch.float64))
    assert torch.equal(model.got["position_ids"], trees.inputs.depth)


def test_mixed_precision():
    model, pack = Words().float(), pack_rows(ASKED)
    model.dtype = torch.float32
    for autocast in (None, torch.bfloat16, torch.float16):
        scorer = Scorer(model, model.embed, autocast)
        found = scorer.logits(pack, pack.scored.positions)
        assert found.dtype == (autocast or torch.float32)


class Caching(Words):
    """Keeps keys and values, unless told not to."""

    def forward(self, input_ids, use_cache=True, **options):
        self.cached = use_cache
        return super().forward(input_ids, **options)


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_is_cached(wrapped):
    model = Caching()
    if wrapped:  # as PEFT does: its own forward takes anything
        outer = Words()
        outer.embed, outer.last, outer.get_base_model = model.embed, model.last, lambda: model
        outer.forward = lambda *arguments, **options: model(*arguments, **options)
    scorer = Scorer(outer if wrapped else model, model.embed)
    scorer.logits(pack_rows(ASKED), torch.tensor([0]))
    assert model.cached is False


def test_nearest_tokens_are_those_of_the_embedding():
    """They are known where the point is an embedding of tokens, and of the model's input."""
    model = Words()
    assert Scorer(model, model.embed).nearest.embedding is model.embed
    assert Scorer(model, model.embed).nearest.vocabulary == 7
    assert Scorer(model, model.last).nearest is None
    assert Scorer(model, nn.Embedding(7, 4)).nearest is None


def test_slices_are_of_the_same_size_and_hold_each_row_once():
    def ends(*shape, device="cpu"):
        return [(s.start, s.stop) for s in _slices(torch.empty(shape, device=device))]

    assert ends(5, 2**19) == [(0, 2), (2, 4), (4, 6)]
    assert ends(3, 2**21) == [(0, 1), (1, 2), (2, 3)]
    assert ends(300, 2**19, device="meta") == [(0, 128), (128, 256), (256, 384)]
    assert ends(0, 5) == []
    assert ends(2, 0) == [(0, 2**20)]


@pytest.mark.parametrize("size", [3, 256, 300, 512, 700])
def test_the_likeliest_is_the_first_of_equal_ones(size):
    """Also among values that are not numbers, which are the largest for torch.argmax too."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(9, (200, size), generator=generator).float()
    assert torch.equal(likeliest(logits), logits.argmax(-1))
    logits[:, -1] = torch.inf
    assert torch.equal(likeliest(logits), logits.argmax(-1))
    logits[::2, size // 2] = torch.nan
    logits[::3, -1] = torch.nan
    assert torch.equal(likeliest(logits), logits.argmax(-1))
    assert likeliest(logits[:0]).shape == (0,)
