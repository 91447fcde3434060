"""A small network whose code is not part of transformers, with attention as published code has it.

The code is our own. Each entry of `ATTENTION` repeats what the code of a family does with positions
and masks; `MODEL` is the same network round all of them.
"""

import json
import shutil

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from llm_attack.demo import MODEL_PATH

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}

ATTENTION = {
    # ChatGLM: half of each head turns with the place in the text, the other half with the place
    # after the first end of a sentence; neighbouring coordinates are pairs; its own causal mask.
    "chatglm": """
class Attention(Base):
    def place(self, q, k, input_ids, position_ids):
        after = (input_ids == 1).cumsum(-1).clamp(max=1)
        places = torch.arange(q.shape[2], device=q.device).expand(len(q), -1)
        blocks = after.cumsum(-1)
        halves = zip(q.chunk(2, -1), k.chunk(2, -1), (places * (1 - after), blocks))
        turned = [(self.turn(a, at), self.turn(b, at)) for a, b, at in halves]
        return tuple(torch.cat(parts, -1) for parts in zip(*turned))

    def turn(self, x, at):
        angles = at[:, None, :, None] / 10000 ** (
            torch.arange(0, x.shape[-1], 2, device=x.device) / x.shape[-1]
        )
        even, odd = x[..., ::2], x[..., 1::2]
        turned = even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()
        return torch.stack(turned, -1).flatten(-2)
""",
    # Qwen, first generation: beyond a length the base grows with the forward, in steps; queries
    # beyond it are scaled by a logarithm.
    "qwen": """
class Attention(Base):
    LIMIT, ALPHA = 10, 0

    def place(self, q, k, input_ids, position_ids):
        length = q.shape[2]
        alpha = max(1, 2 ** math.ceil(math.log2(length / self.LIMIT) + 1) - 1)
        if alpha != self.ALPHA:  # a table that is made again
            self.ALPHA, self.base = alpha, 10000.0 * alpha ** (16 / 14)
        at = torch.arange(length, device=q.device)
        scale = (at + 1).clamp(min=self.LIMIT).log() / math.log(self.LIMIT)
        return self.rotary(q, at, self.base) * scale[:, None], self.rotary(k, at, self.base)
""",
    # Falcon: a table of the longest forward so far, read from its start; no position ids.
    "falcon": """
class Attention(Base):
    LENGTH = 0

    def place(self, q, k, input_ids, position_ids):
        if q.shape[2] > self.LENGTH:
            self.LENGTH = q.shape[2]
            self.at = torch.arange(self.LENGTH, device=q.device)
        return tuple(self.rotary(x, self.at[: q.shape[2]], 10000.0) for x in (q, k))
""",
    # Baichuan: ALiBi, whose mask is kept and grows with the longest forward.
    "baichuan": """
class Attention(Base):
    LENGTH = 0

    def bias(self, length, heads, device):
        if length > self.LENGTH:
            self.LENGTH = length
            at = torch.arange(length, device=device)
            slopes = 2.0 ** (-8 * torch.arange(1, heads + 1, device=device) / heads)
            mask = torch.full((length, length), -torch.inf, device=device).triu(1)
            self.future = slopes[:, None, None] * at + mask
        return self.future[:, :length, :length]
""",
    # InternLM, and Llama's code before it was part of transformers: beyond a length the base grows,
    # and the table stays for later forwards, however short.
    "internlm": """
class Attention(Base):
    LIMIT, LENGTH = 60, 60

    def place(self, q, k, input_ids, position_ids):
        self.LENGTH = max(self.LENGTH, q.shape[2])
        base = 10000.0 * (2 * self.LENGTH / self.LIMIT - 1) ** (16 / 14)
        if position_ids is None:
            position_ids = torch.arange(q.shape[2], device=q.device)[None]
        return tuple(self.rotary(x, position_ids[:, None, :], base) for x in (q, k))
""",
}

# What the trial at the start does with each, as the page shows it.
NOTHING, EQUAL, REFUSED = "nothing", "only requests of equal length share a forward", "refused"
FAMILIES = {
    "qwen": ("first generation: the base grows in steps with the length of the forward", EQUAL),
    "chatglm": ("rotary places in the text and after a token, pairs of neighbours", NOTHING),
    "falcon": ("a rotary table as long as the longest forward so far", NOTHING),
    "internlm": ("the base grows with the longest forward, and stays for later ones", REFUSED),
    "baichuan": ("an ALiBi mask as long as the longest forward so far", NOTHING),
}


def measured(family):
    """A row of the page, which `test_code_as_published` tries."""
    return [f"`{family}`", *FAMILIES[family]]


MODEL = """
import math

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class Base(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, width = config.num_attention_heads, config.hidden_size
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def place(self, q, k, input_ids, position_ids):
        return q, k

    def bias(self, length, heads, device):
        return torch.full((length, length), -torch.inf, device=device).triu(1)

    def rotary(self, x, at, base):
        angles = at[..., None] / base ** (torch.arange(0, 16, 2, device=x.device) / 16)
        angles = torch.cat([angles, angles], -1)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def forward(self, x, input_ids, position_ids):
        parts = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = parts
        q, k = self.place(q, k, input_ids, position_ids)
        scores = q @ k.transpose(-1, -2) / 4 + self.bias(x.shape[1], self.heads, x.device)
        return self.dense((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention, width = Attention(config), config.hidden_size
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x, input_ids, position_ids):
        x = x + self.attention(self.norm(x), input_ids, position_ids)
        return x + torch.tanh(self.mlp(x))


class OwnForCausalLM(PreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.word_embeddings

    def get_output_embeddings(self):
        return self.output

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **_):
        x = self.word_embeddings(input_ids)
        for block in self.blocks:
            x = block(x, input_ids, position_ids)
        return CausalLMOutput(logits=self.output(x))
"""


def checkpoint(folder, family):
    """Writes a checkpoint with the code of a family and random weights. Returns its path."""
    shutil.copytree(MODEL_PATH, folder)
    base, _, rest = MODEL.partition("class Block")
    (folder / "own.py").write_text(f"{base}{ATTENTION[family].strip()}\n\n\nclass Block{rest}")
    known = json.loads((folder / "config.json").read_text())
    known |= {"auto_map": {"AutoModelForCausalLM": "own.OwnForCausalLM"}, **SIZES}
    (folder / "config.json").write_text(json.dumps(known | {"tie_word_embeddings": False}))
    torch.manual_seed(0)
    model = get_class_from_dynamic_module("own.OwnForCausalLM", str(folder))(
        AutoConfig.from_pretrained(folder)
    )
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    known["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(known | {"tie_word_embeddings": False}))
    return str(folder)


def alone(folder, pairs):
    """Log-likelihoods of (context, continuation) by fresh models, which read one request each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind = get_class_from_dynamic_module("own.OwnForCausalLM", folder)
    found = []
    for context, continuation in pairs:
        whole = tokenizer.encode(context + continuation)
        n = len(whole) - len(tokenizer.encode(context))
        model = kind.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
        predicted = torch.tensor(whole[1:])
        found.append(float(logits.gather(-1, predicted[:, None])[-n:].sum()))
    return found
