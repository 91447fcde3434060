"""Every architecture that the tests know, as a small network with random weights.

`ARCHITECTURES` is the only list of them. `docs/architectures.md` shows the results of `measured`.
"""

import copy
import functools
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn.functional import layer_norm
from torch.overrides import TorchFunctionMode
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)
from versions import TRANSFORMERS, dtype_of

from llm_attack.lm.engine.attacked import AttackedBatch
from llm_attack.lm.engine.clean import Needs, clean_pass
from llm_attack.lm.engine.probe import longest_tree
from llm_attack.lm.engine.scoring import Scorer
from llm_attack.lm.losses import LOSSES, ThreatModel
from llm_attack.lm.network.blocks import blocks
from llm_attack.lm.network.hook import capture, frozen, resolve
from llm_attack.lm.packing.pack import pack_rows
from llm_attack.lm.packing.questions import Question, Request

CPU = torch.device("cpu")
VOCABULARY = 64
THRESHOLD = 32  # tokens to read, up to which scaled rotary embeddings are plain ones
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
# Names of their own for the same sizes.
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
MPT = {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}
EXPERTS = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
WINDOW = 40  # longer than all that the probe tries
ANY = sys.maxsize


@dataclass(frozen=True)
class Architecture:
    """An architecture, or one of its variants.

    Attributes:
        options: of its config, besides `SMALL`.
        kind: `model_type` of its config, if the name it goes by is another.
        trees: the longest that it takes; 0: none.
        growth: factor of its weights, from the initial ones: large enough that positions and
            context matter.
        states_from: where the output of its first block stands among its own hidden states.
        since: release of transformers that has it in this form.
        note: for the page.
    """

    options: dict = field(default_factory=dict)
    kind: str = ""
    trees: int = ANY
    growth: float = 12
    states_from: int = 1
    since: str = "4.51"
    note: str = ""


ALIBI = "ALiBi: its attention takes no positions"
RECURRENT = "recurrent: there is no attention to mask"
BY_LENGTH = "short and long requests never share a forward"
BY_EACH_LENGTH = "nor do long ones of different lengths"
ARCHITECTURES = {
    "llama": Architecture(),
    "llama, dynamic": Architecture(
        {
            "max_position_embeddings": THRESHOLD,
            "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        },
        kind="llama",
        note=f"{BY_LENGTH}, {BY_EACH_LENGTH}",
    ),
    "gpt2": Architecture(GPT),
    "gpt_neox": Architecture(),
    "gpt_neo": Architecture(
        {
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 30,
        },
        trees=30,
    ),
    "opt": Architecture({"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "bloom": Architecture(trees=0, note=ALIBI),
    "falcon": Architecture({"head_dim": None}),
    "falcon, ALiBi": Architecture(
        {"head_dim": None, "alibi": True}, kind="falcon", trees=0, note=ALIBI
    ),
    "mpt": Architecture(MPT, trees=0, note=ALIBI),
    "phi": Architecture(),
    "phi3": Architecture({"sliding_window": None}),
    "phi3, longrope": Architecture(
        {
            "sliding_window": None,
            "max_position_embeddings": 128,
            "original_max_position_embeddings": THRESHOLD,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.2, 1.4, 1.6],
                "long_factor": [1.0, 4.0, 9.0, 16.0],
            },
        },
        kind="phi3",
        note=BY_LENGTH,
    ),
    "qwen2": Architecture({"tie_word_embeddings": True, "sliding_window": None}),
    "qwen3": Architecture({"sliding_window": None}),
    "qwen3_moe": Architecture({**EXPERTS, "sliding_window": None}),
    "mistral": Architecture({"sliding_window": WINDOW}, trees=WINDOW),
    "mixtral": Architecture(EXPERTS),
    "gemma2": Architecture(
        {"sliding_window": WINDOW, "final_logit_softcapping": 3.0}, trees=WINDOW
    ),
    "gemma3_text": Architecture({"sliding_window": WINDOW}, trees=WINDOW),
    "gemma3_text, dynamic": Architecture(
        {
            "sliding_window": WINDOW,
            "max_position_embeddings": THRESHOLD,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            },
        },
        kind="gemma3_text",
        trees=WINDOW,
        since="5.0",
        note=f"{BY_LENGTH}, {BY_EACH_LENGTH}",
    ),
    "olmo2": Architecture(),
    "cohere": Architecture({"logit_scale": 0.25}),
    "granite": Architecture(
        {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}
    ),
    "stablelm": Architecture(),
    "smollm3": Architecture(since="4.53"),
    "mamba": Architecture(trees=0, growth=1, states_from=0, note=RECURRENT),
    "rwkv": Architecture(
        {"attention_hidden_size": 16, "context_length": 64},
        trees=0,
        growth=1,
        states_from=0,
        note=RECURRENT,
    ),
}
ROTARY_BY_LENGTH = [name for name, a in ARCHITECTURES.items() if BY_LENGTH in a.note]


@functools.cache
def network(name, vocabulary=VOCABULARY):
    """A small model in float64, which is shared: copy it before changing it.

    Skips the test where this transformers does not have the architecture.
    """
    of = ARCHITECTURES[name]
    kind = of.kind or name
    if TRANSFORMERS.release < tuple(map(int, of.since.split("."))):
        pytest.skip(f"{name} is in transformers from {of.since} on; this is {TRANSFORMERS}")
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"{kind} is not in transformers {TRANSFORMERS}")
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, **SMALL, **of.options}
    if sizes["head_dim"] is None:
        del sizes["head_dim"]  # of a config that works it out itself
    config = AutoConfig.for_model(kind, **sizes)
    model = AutoModelForCausalLM.from_config(config, **dtype_of(torch.float64)).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others' kernels refuse float64
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(of.growth)
    return model


def single(name):
    """A copy in float32, with the kernels that are its default."""
    model = copy.deepcopy(network(name)).float()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(None)
    return model


class _Wide(TorchFunctionMode):
    """What asks for float32 gets float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def wide(x):
            return torch.float64 if x is torch.float32 else x

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        return function(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


@contextmanager
def exact():
    """While it lasts, models in float64 compute all in it.

    They normalise, rotate and take softmax in float32 otherwise, and make masks in it.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(default)


def asked():
    """Questions of two and three choices, of different lengths."""
    words = torch.randint(2, VOCABULARY, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    first = [(*words[:9], *words[20 : 20 + n]) for n in (4, 2, 3)]
    second = [(*words[10:15], *words[30 : 30 + n]) for n in (3, 4)]
    return [
        Question([Request(tokens, 2) for tokens in requests], [[i] for i in of], gold=gold)
        for requests, of, gold in (
            (first, range(3), [False, True, False]),
            (second, range(3, 5), [True, False]),
        )
    ]


def prepared(scorer, pack, threat):
    """The pack with all that a clean pass gives."""
    clean = clean_pass(scorer, pack, threat, Needs(gradient=True))
    return AttackedBatch(scorer, pack, threat, clean)


def scorer_of(model, hookpoint=None):
    return Scorer(model, resolve(model, hookpoint), softmax_dtype=torch.float64)


def path_of(model, module):
    return next(name for name, m in model.named_modules() if m is module)


def hookpoints(name):
    """Paths of the embedding and of the first block."""
    model = network(name)
    return path_of(model, model.get_input_embeddings()), path_of(model, blocks(model, "")[0])


@functools.cache
def longest_tree_of(name):
    with exact():
        return longest_tree(scorer_of(network(name)), CPU)


@functools.cache
def slope_error(name, hookpoint, loss):
    """How far the gradient is from central differences, relative to its length; two directions.

    In units of the point's RMS, in which losses have slopes and curvatures of 1 to 1000, a step of
    3e-5 makes the differences wrong by its square and by the loss's rounding, 1e-14, over it: 1e-9
    each, for slopes of 1.
    """
    model = network(name)
    pack = pack_rows(asked(), shared=LOSSES[loss].gold, whole=LOSSES[loss].whole)
    with exact(), frozen(model):
        batch = prepared(scorer_of(model, hookpoint), pack, ThreatModel(loss))
        gradient, h = batch.clean.gradient, 3e-5 * batch.x.square().mean().sqrt()
        drawn = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
        errors = []
        for d in (gradient, drawn):
            d = d / d.norm()
            with torch.no_grad():
                up, down = (batch.loss(batch.x + s * h * d).sum() for s in (1, -1))
            errors.append(((gradient * d).sum() - (up - down) / (2 * h)).abs() / gradient.norm())
    return float(max(errors))


def first_input(name, ids):
    """(embedding's output, first block's input) for `ids`, (1, L)."""
    model, seen = network(name), []
    (block, *_) = blocks(model, "")

    def keep(module, args, options):
        seen.append(args[0] if args else options["hidden_states"])

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), exact():
            point = capture(model.get_input_embeddings(), lambda: model(input_ids=ids))
            model(input_ids=ids)
    finally:
        handle.remove()
    return point, seen[0]


def between(name):
    """What comes between the embedding's output and the first block, in words."""
    found = [first_input(name, torch.arange(i, i + 8)[None]) for i in (5, 25)]
    if all(torch.equal(x, block) for x, block in found):
        return ""
    factor = found[0][1].norm() / found[0][0].norm()
    if all(torch.allclose(factor * x, block) for x, block in found):
        return f"multiplied before the blocks (by {factor:.3g} here)"
    if torch.allclose(*(block - x for x, block in found)):
        return "positions are added before the blocks"
    if all(torch.allclose(layer_norm(x, x.shape[-1:]), block, atol=1e-2) for x, block in found):
        return "normalised before the blocks"
    return "changed before the blocks"


def measured(name):
    """A row of the page: what was found to be so."""
    embedding, block = hookpoints(name)
    longest = longest_tree_of(name)
    packed = {0: "plain", ANY: "packed"}.get(longest, "packed, up to the window")
    losses = [
        loss
        for loss in LOSSES
        if all(slope_error(name, path, loss) < 1e-6 for path in (embedding, block))
    ]
    notes = [text for text in (between(name), ARCHITECTURES[name].note) if text]
    block = re.sub(r"\.0$", ".N", block)
    return [
        f"`{name}`" if "," not in name else "`{}`, {}".format(*name.split(", ")),
        packed,
        ", ".join(losses),
        f"`{embedding}`",
        f"`{block}`",
        "; ".join(notes),
    ]


def tokenizer():
    """Of words w0, w1, ...; a token for each."""
    words = ["<pad>", "<end>", "<unknown>", *(f"w{i}" for i in range(3, VOCABULARY))]
    made = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[2]))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=words[0], eos_token=words[1], unk_token=words[2]
    )
