"""Tokenizers of every kind: tokens, truncation and answers are those of stock `hf`."""

import copy

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_attack.base.errors import UsageError
from llm_attack.harness.model import AttackedHFLM

MATRIX = 400  # rows of the embedding, unless a kind has another number
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:?!'"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "bird", "dog", "tree"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
BOUNDARY = "▁"  # in place of a blank


def fast(model, before=None, after=None, *, normalizer=None, decoder=None, **options):
    """A tokenizer of transformers, of parts of `tokenizers`."""
    made = Tokenizer(model)
    parts = {"pre_tokenizer": before, "post_processor": after}
    parts |= {"normalizer": normalizer, "decoder": decoder}
    for name, part in parts.items():
        if part is not None:
            setattr(made, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=made, **options)


def numbered(*tokens):
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def template(vocabulary, single):
    """Special tokens round a text."""
    known = [(token, vocabulary[token]) for token in single.split() if token in vocabulary]
    return processors.TemplateProcessing(single=single, special_tokens=known)


def merged(words, first=""):
    """Merges of pairs that make each word from its letters."""
    pairs = [(word[:i], word[i]) for word in words for i in range(max(1, len(first)), len(word))]
    return list(dict.fromkeys(pairs))


def byte_level(single=None, prefix_space=False, **options):
    """Like GPT-2."""
    words = [f"Ġ{word}" for word in WORDS]
    merges = merged(words)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = numbered("<s>", "</s>", "<pad>", *alphabet, *("".join(pair) for pair in merges))
    return fast(
        models.BPE(vocabulary, merges),
        pre_tokenizers.ByteLevel(add_prefix_space=prefix_space),
        template(vocabulary, single) if single else None,
        decoder=decoders.ByteLevel(),
        **options,
    )


def byte_fallback(scheme="always", single="<s> $A"):
    """Like Llama 2: BPE over words with a boundary, and bytes for what is unknown."""
    merges = merged([BOUNDARY + word for word in WORDS])
    made = ["".join(pair) for pair in merges]
    vocabulary = numbered(*SPECIAL.values(), *BYTES, BOUNDARY, *LETTERS[:30], *made)
    return fast(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        pre_tokenizers.Metaspace(prepend_scheme=scheme),
        template(vocabulary, single),
        decoder=decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        **SPECIAL,
    )


def unigram(single):
    """Like T5, whose texts end in a token."""
    made = [*SPECIAL.values(), BOUNDARY, *LETTERS, *(BOUNDARY + word for word in WORDS)]
    scored = [(token, -len(made) / (len(token) + i / 99)) for i, token in enumerate(made)]
    return fast(
        models.Unigram(scored, unk_id=2),
        pre_tokenizers.Metaspace(),
        template(numbered(*made), single),
        decoder=decoders.Metaspace(),
        **SPECIAL,
    )


def word_piece(**options):
    """Like BERT: lower case, without accents, between two tokens."""
    pieces = [*WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = numbered("[PAD]", "[UNK]", "[CLS]", "[SEP]", *pieces)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    return fast(
        models.WordPiece(vocabulary, unk_token="[UNK]"),
        pre_tokenizers.BertPreTokenizer(),
        template(vocabulary, "[CLS] $A [SEP]"),
        normalizer=normalizers.BertNormalizer(),
        decoder=decoders.WordPiece(),
        **names,
        **options,
    )


def whole_words(**options):
    """A token for each word."""
    vocabulary = numbered("<unk>", *WORDS, ".", "?")
    before = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    return fast(models.WordLevel(vocabulary, unk_token="<unk>"), before, **options)


def cut_and_padded():
    """Its file says that texts are cut and padded."""
    made = byte_level(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.backend_tokenizer.enable_truncation(4)
    made.backend_tokenizer.enable_padding(length=8, pad_id=2, pad_token="<pad>")
    return made


def added():
    """With tokens behind its vocabulary: one of them special, and one not."""
    made = byte_level(bos_token="<s>", eos_token="</s>")
    made.add_tokens(["catmat"])
    made.add_special_tokens({"pad_token": "<padding>"})
    return made


END = {"eos_token": "</s>"}
# Of each kind: how it is made, and arguments of both models.
KINDS = {
    "no token before a text": (lambda: byte_level(**END), {}),
    "a token before a text": (lambda: byte_level("<s> $A", bos_token="<s>", **END), {}),
    "a token before a text, left out": (
        lambda: byte_level("<s> $A", bos_token="<s>", **END),
        {"add_bos_token": False},
    ),
    "a token before a text, asked for": (
        lambda: byte_level("<s> $A", bos_token="<s>", **END),
        {"add_bos_token": True},
    ),
    "a token behind a text": (lambda: unigram("$A </s>"), {}),
    "tokens round a text": (word_piece, {}),
    "prefix space": (lambda: byte_level(prefix_space=True, **END), {}),
    "byte fallback": (byte_fallback, {}),
    "byte fallback, first word without a space": (lambda: byte_fallback("first"), {}),
    "byte fallback, no space": (lambda: byte_fallback("never"), {}),
    "no special tokens": (whole_words, {"prefix_token_id": 3}),
    "an end alone": (lambda: whole_words(eos_token="."), {}),
    "a start alone": (lambda: whole_words(bos_token="?"), {}),
    "unknown as padding": (lambda: whole_words(eos_token=".", unk_token="<unk>"), {}),
    "padding is the end": (lambda: byte_level(**END, pad_token="</s>"), {}),
    "padding behind the matrix": (lambda: whole_words(eos_token=".", pad_token="<pad>"), {}),
    "a vocabulary of fewer tokens": (lambda: byte_level(**END), {"rows": 4000}),
    "a vocabulary of more tokens": (added, {"rows": 305}),
    "cut and padded by itself": (cut_and_padded, {}),
    "padding on the left": (lambda: byte_level(**END, padding_side="left"), {}),
    "cut on the left": (lambda: byte_level(**END, truncation_side="left"), {}),
    "a short length": (lambda: byte_level("<s> $A", **END, model_max_length=9), {}),
    "written in Python": (ByT5Tokenizer, {"rows": 384}),
    "lower case": (word_piece, {"prefix_token_id": 5}),
}

TEXTS = [
    ("the cat sat on", " a mat"),
    ("the cat sat on ", "a mat"),  # a blank belongs to the answer
    ("the cat sat on  ", " a mat."),
    ("the cat sat", "s on"),  # one word
    ("", "the cat"),
    ("", " a dog on a tree"),
    ("the Bird: ", "été 🐦"),
    ("déjà\nthe dog\n\n", "\tcat"),
    ("the dog on a tree. " * 9, " the dog on a mat"),  # too long
    ("a bird on the mat " * 3, "the bird on a tree"),
    ("<s>the cat", " sat"),
    ("</s>", "the cat"),
]


def model(rows):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=rows, **sizes, **heads)).eval().double()
    for weight in made.parameters():
        if weight.dim() > 1:
            weight.data.mul_(12)  # context matters
    return made


def asked():
    return [
        Instance("loglikelihood", {}, pair, i, metadata=("t", i, 1)) for i, pair in enumerate(TEXTS)
    ]


def both(kind, **more):
    """(ours, stock)."""
    make, options = KINDS[kind]
    options = {"batch_size": 4, "device": "cpu", "softmax_dtype": "float64", **options, **more}
    network = model(options.pop("rows", MATRIX))
    ours = AttackedHFLM(copy.deepcopy(network), tokenizer=make(), attack="none", **options)
    return ours, HFLM(network, tokenizer=make(), **options)


def outcome(answer, request):
    """Answers to a request; None: it is refused, or stock fails."""
    try:
        return answer([request], disable_tqdm=True)[0]
    except (AssertionError, IndexError, ValueError):
        return None


@pytest.mark.parametrize("length", [None, 12])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled(4)
def test_as_stock(kind, length):
    """Also where a text is cut to 12 tokens."""
    ours, stock = both(kind, **({} if length is None else {"max_length": length}))
    assert ours.max_length == stock.max_length
    requests = asked()
    expected = [outcome(stock.loglikelihood, request) for request in requests]
    answered = [r for r, answer in zip(requests, expected, strict=True) if answer is not None]
    assert len(answered) >= 6
    found = ours.loglikelihood(answered, disable_tqdm=True)
    expected = [answer for answer in expected if answer is not None]
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in expected], abs=1e-9)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    whole = [Instance("loglikelihood_rolling", {}, (TEXTS[8][0],), 0)]
    found, expected = (lm.loglikelihood_rolling(whole, disable_tqdm=True) for lm in (ours, stock))
    assert found == pytest.approx(expected, abs=1e-9)
    how = {"until": ["cat"], "max_gen_toks": 3}
    prompts = [Instance("generate_until", {}, (text, how), 0) for text, _ in TEXTS[:3]]
    if ours.tokenizer.eos_token_id is None:  # stock fails
        with pytest.raises(UsageError, match="tokenizer=: has no EOS token, but lm-eval needs one"):
            ours.generate_until(prompts)
        return
    assert ours.generate_until(prompts) == stock.generate_until(prompts)
