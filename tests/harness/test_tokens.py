"""Tokens without an embedding, and tokenizers that lack special ones."""

import logging

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_attack.base.errors import UsageError
from llm_attack.harness.model import AttackedHFLM

WORDS = ["end", *(f"w{i}" for i in range(1, 40))]


def tokenizer(**special):
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="end"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def model(vocabulary=40):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def asked(*pairs):
    return [
        Instance("loglikelihood", {}, pair, 0, metadata=("t", i, 1)) for i, pair in enumerate(pairs)
    ]


PAIRS = [("w1 w2 w3", " w4 w5 w6"), ("w7", " w8"), ("w9 w10", " w11")]


@pytest.mark.parametrize(
    "special",
    [{"eos_token": "end", "pad_token": "<pad>"}, {}],
    ids=["pad token behind the matrix", "no special tokens"],
)
@pytest.mark.parametrize("attack", ["none", "fgsm"])
def test_padding_has_no_influence(special, attack, caplog):
    """Whichever token pads; stock works, too. In float64, so that no sign is rounding."""
    given = {"device": "cpu", "softmax_dtype": "float64"} | (
        {} if special else {"prefix_token_id": 1}
    )
    with caplog.at_level(logging.WARNING, "llm_attack"):
        lm = AttackedHFLM(
            model().double(), tokenizer=tokenizer(**special), attack=attack, batch_size=8, **given
        )
    assert lm.tokenizer.pad_token_id >= len(WORDS)
    assert "packing: off" not in caplog.text
    answers = lm.loglikelihood(asked(*PAIRS), disable_tqdm=True)
    alone = [lm.loglikelihood(asked(pair), disable_tqdm=True)[0][0] for pair in PAIRS]
    assert [value for value, _ in answers] == pytest.approx(alone, abs=1e-5)
    if attack == "none":
        stock = HFLM(model().double(), tokenizer=tokenizer(**special), batch_size=1, **given)
        expected = [value for value, _ in stock.loglikelihood(asked(*PAIRS), disable_tqdm=True)]
        assert [value for value, _ in answers] == pytest.approx(expected, abs=1e-5)


def test_tokens_without_an_embedding():
    """The tokenizer of another model; nothing is computed."""
    lm = AttackedHFLM(model(12), tokenizer=tokenizer(eos_token="end"), device="cpu", attack="fgsm")
    lm.loglikelihood(asked(PAIRS[2]), disable_tqdm=True)
    line = (
        r"tokenizer=: gives the token 12 \('w12'\), but the model has embeddings for 0 to 11; must"
    )
    with pytest.raises(UsageError, match=line):
        lm.loglikelihood(asked(("w1", " w12 w2")), disable_tqdm=True)
    prompt = [Instance("generate_until", {}, ("w1 w12", {"until": ["w3"], "max_gen_toks": 4}), 0)]
    with pytest.raises(UsageError, match=line):
        lm.generate_until(prompt, disable_tqdm=True)


def test_a_trial_says_what_was_raised(caplog):
    """And guesses at no cause."""
    broken = model()

    def refuse(module, args, named):
        if named.get("position_ids") is not None and named["position_ids"].shape[0] > 1:
            raise IndexError("positions of two rows")

    broken.model.register_forward_pre_hook(refuse, with_kwargs=True)
    with caplog.at_level(logging.WARNING, "llm_attack"):
        AttackedHFLM(broken, tokenizer=tokenizer(eos_token="end"), device="cpu", attack="none")
    (text,) = [text for text in caplog.messages if "packing: off" in text]
    assert "because a trial of trees raises " in text and "positions of two rows" in text


def test_experts_in_float64():
    """Their fast kernels refuse it. The line names what mends it, and it does."""
    kind = pytest.importorskip("transformers").Qwen3MoeForCausalLM
    torch.manual_seed(0)
    options = {name: 16 for name in ("hidden_size", "intermediate_size", "moe_intermediate_size")}
    options |= {name: 2 for name in ("num_hidden_layers", "num_attention_heads", "num_experts")}
    config = kind.config_class(
        vocab_size=40, num_key_value_heads=2, num_experts_per_tok=1, head_dim=8, **options
    )
    made = kind(config).double().eval()
    if not hasattr(made, "set_experts_implementation"):
        pytest.skip("this transformers has one kind of kernel for experts")
    made.set_experts_implementation("grouped_mm")
    try:
        made(input_ids=torch.tensor([[1, 2]]))
        pytest.skip("this torch has such kernels in float64")
    except RuntimeError:
        pass
    given = {"tokenizer": tokenizer(eos_token="end"), "device": "cpu", "attack": "none"}
    line = r"dtype=float64: the model raises .*; needs experts_implementation=eager"
    with pytest.raises(UsageError, match=line):
        AttackedHFLM(made, **given)
    made.set_experts_implementation("eager")
    AttackedHFLM(made, **given)
