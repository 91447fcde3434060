"""A trial refuses hookpoints that cannot work, whatever their names."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3Config

from llm_attack.base.errors import UsageError
from llm_attack.lm.network.hook import try_out

IDS = torch.arange(12)[None]
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
LAYER = "model.layers.1"


def network(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SIZES)).eval()
    model.model.spare = torch.nn.Linear(16, 16)
    return model


@pytest.fixture(scope="module")
def qwen():
    return network(Qwen3Config)


@pytest.mark.parametrize(
    ("name", "reason", "meant"),
    [
        ("lm_head", "is the head, or runs after it", "model.norm"),
        ("model", "BaseModelOutputWithPast", "model.norm"),
        ("model.rotary_emb", r"\(1, 6, 8\)", "model.embed_tokens"),
        (f"{LAYER}.self_attn.q_norm", r"\(2, 6, 2, 8\)", f"{LAYER}.self_attn.q_proj"),
        ("model.spare", "does not run", "model.norm"),
        ("model.layers", "does not run", "model.layers.1"),
    ],
)
def test_refused(qwen, name, reason, meant):
    with pytest.raises(UsageError) as caught:
        try_out(qwen, [name], IDS)
    message = str(caught.value)
    assert message.startswith(f"hookpoint={name}: must be ") and "\n" not in message
    assert reason.replace("\\", "") in message and f"did you mean {meant!r}?" in message
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in qwen.modules())
    try_out(qwen, [meant], IDS)


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens", LAYER, f"{LAYER}.self_attn", f"{LAYER}.mlp.up_proj", "model.norm"],
)
def test_taken(qwen, name):
    try_out(qwen, [name], IDS)


def test_head_of_another_name(qwen):
    """What the model says is its head, and what comes behind it."""
    network = torch.nn.Module()
    network.inner, network.last, network.behind = qwen.model, qwen.lm_head, torch.nn.Identity()
    network.get_output_embeddings = lambda: network.last

    def forward(input_ids):
        return network.behind(network.last(network.inner(input_ids).last_hidden_state))

    network.forward = forward
    for name in ("last", "behind"):
        with pytest.raises(UsageError, match=rf"hookpoint={name}: .*did you mean 'inner.norm'"):
            try_out(network, [name], IDS)


def test_run_twice(qwen, monkeypatch):
    """One output put in two places is not what was asked for."""
    first, second = (layer.input_layernorm for layer in qwen.model.layers)
    monkeypatch.setattr(qwen.model.layers[1], "input_layernorm", first)
    with pytest.raises(UsageError, match=r"input_layernorm: .* runs 2 times"):
        try_out(qwen, ["model.layers.0.input_layernorm"], IDS)
    assert second is not first


def test_router():
    model = network(MixtralConfig)
    (name,) = [n for n, _ in model.named_modules() if n.startswith(LAYER) and n.endswith("gate")]
    with pytest.raises(UsageError, match=rf"hookpoint={name}: .*\(12, \d\)"):
        try_out(model, [name], IDS)


@pytest.mark.parametrize("name", ["lm_head", "model", "model.rotary_emb"])
@pytest.mark.parametrize("attack", ["none", "fgsm"])
def test_before_anything_is_computed(make, name, attack):
    with pytest.raises(UsageError, match=f"hookpoint={name}: must be"):
        make(hookpoint=name, attack=attack)
