"""Encoder-decoder models of every kind that the tests know, small and with random weights.

`PAIRS` is the one list of them.
"""

import functools
import re

import pytest
import torch
from networks import CPU, VOCABULARY, exact, path_of, prepared
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)
from versions import TRANSFORMERS, dtype_of

from llm_attack.lm.engine.pairs import PairScorer, longest_decoder
from llm_attack.lm.losses import LOSSES, ThreatModel
from llm_attack.lm.network.blocks import known_blocks
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.network.pairs import BOTH, PARTS, embedding_of, part_of
from llm_attack.lm.packing.pack import pack_rows
from llm_attack.lm.packing.questions import Question

IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 0}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "init_std": 0.2,
}
GEMMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": 64,
    "sliding_window": 40,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# kind -> (model_type, its options)
PAIRS = {
    "t5": ("t5", T5),
    "t5, gated and untied": (
        "t5",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mt5": ("mt5", T5),
    "umt5": ("umt5", T5),
    "bart": ("bart", {**BART, "decoder_start_token_id": 1}),
    "bart, scaled": ("bart", {**BART, "scale_embedding": True, "decoder_start_token_id": 1}),
    "mbart": ("mbart", BART),
    "pegasus": ("pegasus", BART),
    "m2m_100": ("m2m_100", {**BART, "decoder_start_token_id": 1}),
    "marian": ("marian", BART),
    "blenderbot": ("blenderbot", BART),
    "t5gemma": ("t5gemma", {"encoder": GEMMA, "decoder": GEMMA, "vocab_size": VOCABULARY}),
}
NOTES = {
    "mbart": "the decoder begins with the last token of the continuation, as in stock `hf`",
}
every = pytest.mark.parametrize("kind", PAIRS)


@functools.cache
def network(kind):
    """A small model in float64, which is shared: copy it before changing it."""
    model_type, options = PAIRS[kind]
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"{model_type} is not in transformers {TRANSFORMERS}")
    if model_type == "t5gemma" and TRANSFORMERS.major < 5:
        pytest.skip(f"transformers {TRANSFORMERS} cannot generate texts with t5gemma")
    torch.manual_seed(0)
    given = {"vocab_size": VOCABULARY, **IDS, **options}
    config = AutoConfig.for_model(model_type, **given)
    model = AutoModelForSeq2SeqLM.from_config(config, **dtype_of(torch.float64)).eval()
    for weight in model.parameters():
        if weight.dim() > 1 and weight.shape[0] != VOCABULARY:
            weight.data.mul_(2)  # contexts matter
    return model


def tokenizer():
    """Of words w3, w4, ...; a token for each, and one behind every text."""
    words = ["<pad>", "</s>", "<s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    made = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="w3"))
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )


# (context, continuation, gold) of two questions; those of the second have other contexts.
ASKED = [
    [((9, 4, 7, 5, 8, 6, 1), (11, 12)), ((9, 4, 7, 5, 8, 6, 1), (11, 13, 14, 15))],
    [((20, 21, 22, 1), (30, 31, 32)), ((20, 21, 23, 24, 1), (30, 31, 32))],
    [((40, 41, 1), (50,))],
]


def asked(scorer):
    """Questions for a scorer, whose hookpoint the requests know."""
    made, number = [], 0
    for choices in ASKED:
        requests = [scorer.request(*pair) for pair in choices]
        answers = [[number + i] for i in range(len(requests))]
        number += len(requests)
        made.append(Question(requests, answers, gold=[True] + [False] * (len(requests) - 1)))
    return made


@functools.cache
def longest(kind):
    """Length up to which requests share a row of the decoder."""
    with torch.no_grad():
        return longest_decoder(PairScorer(network(kind), None), CPU)


def scorer_of(kind, hookpoint=None, joined=True):
    scorer = PairScorer(network(kind), hookpoint, softmax_dtype=torch.float64)
    scorer.longest_decoder = longest(kind) if joined else 0
    return scorer


def alone(model, request, encoder=None, decoder=None):
    """Log-probabilities of a continuation's tokens, with other embeddings where they are given."""
    given = {"decoder_input_ids": torch.tensor([request.decoder])}
    if decoder is not None:
        given = {"decoder_inputs_embeds": decoder[None]}
    if encoder is not None:
        given["inputs_embeds"] = encoder[None]
    else:
        given["input_ids"] = torch.tensor([request.context])
    logits = model(**given).logits[0].log_softmax(-1)
    return logits[torch.arange(request.n_continuation), torch.tensor(request.predicted)]


def packed(scorer, shared=False, loss="sequence"):
    return pack_rows(asked(scorer), shared=shared, whole=LOSSES[loss].whole)


@functools.cache
def slope_error(kind, hookpoint, loss, shared):
    """As `networks.slope_error`."""
    with exact(), frozen(network(kind)):
        scorer = scorer_of(kind, hookpoint)
        batch = prepared(scorer, packed(scorer, shared, loss), ThreatModel(loss, shared))
        gradient, h = batch.clean.gradient, 3e-5 * batch.x.square().mean().sqrt()
        drawn = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
        errors = []
        for d in (gradient, drawn):
            d = d / d.norm()
            with torch.no_grad():
                up, down = (batch.loss(batch.x + s * h * d).sum() for s in (1, -1))
            errors.append(((gradient * d).sum() - (up - down) / (2 * h)).abs() / gradient.norm())
    return float(max(errors))


def measured(kind):
    """A row of the page: what was found to be so."""
    model = network(kind)
    losses = [loss for loss in LOSSES if slope_error(kind, BOTH, loss, True) < 1e-6]
    embeddings = [path_of(model, embedding_of(model, part)) for part in PARTS]
    inside = [set(part_of(model, part).modules()) for part in PARTS]
    # of some, transformers does not name the blocks
    first = [next((b for b in known_blocks(model) if b in some), None) for some in inside]
    found = [re.sub(r"\.0$", ".N", path_of(model, block)) for block in first if block is not None]
    return [
        f"`{kind}`" if "," not in kind else "`{}`, {}".format(*kind.split(", ")),
        ", ".join(losses),
        ", ".join(f"`{path}`" for path in embeddings),
        ", ".join(f"`{path}`" for path in found) or "not known",
        NOTES.get(kind, ""),
    ]
