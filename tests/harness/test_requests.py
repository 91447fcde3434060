"""Requests in tokens if a prompt is blank, cut, or shares a token with its answer."""

import inspect
from contextlib import nullcontext

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llm_attack.base.errors import UsageError
from llm_attack.demo import MODEL_PATH
from llm_attack.harness.requests import encode

WORDS = ["Is it a dog? Answer: a dog", "The cat sat on the mat.", "El niño comió piñas."] * 20


def written(folder, *, split, bos=False):
    """A byte-level tokenizer; without `split` its tokens run across words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(WORDS, trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "split": written(folder / "split", split=True),
        "bos": written(folder / "bos", split=True, bos=True),
        "across": written(folder / "across", split=False),
    }


def asked(*pairs, task="pairs"):
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for request in requests:
        request.task_name, request.doc_id = task, 3
    return requests


def tokens_of(lm, *pairs):
    return [(r.tokens, r.n_continuation) for r in encode(lm, asked(*pairs))]


@pytest.mark.parametrize("blank", [" ", "\n\n", " \t "])
def test_a_prompt_of_blanks_begins_as_an_empty_one(make, tokenizers, blank):
    lm = make(tokenizer=tokenizers["split"], attack="none")
    pairs = [(blank, "sat"), (blank, "the mat"), ("The cat", " sat")]
    as_empty = [("", blank + "sat"), ("", blank + "the mat"), ("The cat", " sat")]
    assert tokens_of(lm, *pairs) == tokens_of(lm, *as_empty)
    requests = asked(*pairs)
    found = lm.loglikelihood(requests, disable_tqdm=True)
    stock = HFLM(str(MODEL_PATH), device="cpu", tokenizer=tokenizers["split"])
    expected = stock.loglikelihood(asked(*as_empty), disable_tqdm=True)
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in expected], abs=1e-4)


def test_a_prompt_of_blanks_where_stock_takes_it(make, tokenizers):
    """With a tokenizer that puts a BOS in front, also when another prefix is asked for."""
    for prefix in (None, 1):
        how = {"tokenizer": tokenizers["bos"], "prefix_token_id": prefix}
        stock = HFLM(str(MODEL_PATH), device="cpu", **how)
        pairs = [(" ", "sat"), ("\n", "mat")]
        expected = stock.loglikelihood(asked(*pairs), disable_tqdm=True)
        found = make(attack="none", **how).loglikelihood(asked(*pairs), disable_tqdm=True)
        assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in expected], abs=1e-4)


def test_the_prefix_is_not_there_twice(make, tokenizers):
    first, *others = make(tokenizer=tokenizers["split"]).tok_encode(" salt")
    assert others
    lm = make(tokenizer=tokenizers["split"], prefix_token_id=first)
    expected = [((first, *others), len(others))]
    assert tokens_of(lm, (" ", "salt")) == tokens_of(lm, ("", " salt")) == expected


def test_a_token_across_the_join_is_told_with_its_place(make, tokenizers):
    lm = make(tokenizer=tokenizers["across"], attack="none")
    message = (
        r"task pairs, question 3, choice 1: the answer ' a dog' has no token of its own\. The"
        r" prompt with the answer has \d+ tokens and ends in \[.*dog'\]; the prompt without it has"
        r" \d+ and ends in \[.*:'\];"
        r" encode_separately=True"
    )
    with pytest.raises(UsageError, match=message) as caught:
        encode(lm, asked(("xy", "z"), ("Is it a dog? Answer:", " a dog")))
    assert "max_length" not in str(caught.value)


def test_answers_encoded_separately_as_lm_eval_does_for_encoder_decoder_models(make, tokenizers):
    lm = make(tokenizer=tokenizers["across"], encode_separately=True)
    pairs = [("Is it a dog? Answer:", " a dog"), ("The cat ", "sat"), ("", "mat"), (" ", "mat")]
    lm.backend = "seq2seq"
    expected = [TemplateLM._encode_pair(lm, *pair) for pair in pairs[:2]]
    lm.backend = "causal"
    found = encode(lm, asked(*pairs))
    assert [(list(r.tokens), r.n_continuation) for r in found[:2]] == [
        (context + own, len(own)) for context, own in expected
    ]
    assert tokens_of(lm, *pairs[2:]) == tokens_of(make(tokenizer=lm.tokenizer), *pairs[2:])
    assert not lm.warnings


def test_what_lm_eval_only_logs_is_a_warning(make, tokenizers):
    lm = make(tokenizer=tokenizers["across"], max_length=8)
    requests = asked(("The cat sat on the m", "at. The"), ("x" * 30, "y"), ("x", "y"))
    for _ in range(2):
        encode(lm, requests)
    assert lm.warnings == [
        "task pairs: 1 of 3 requests are longer than max_length=8, so their first"
        " tokens are cut off",
        "task pairs: in 1 of 3 requests, one token contains the end of the prompt and the start of"
        " the answer. The model does not read the prompt as the task has it; encode_separately=True"
        " avoids this",
    ]
    assert lm.get_model_info()["attack"]["warnings"] == lm.warnings


@pytest.mark.parametrize("context", ["", " ", "The"])
def test_an_answer_without_text(make, context):
    with pytest.raises(UsageError, match="task pairs, question 3, choice 0: the answer '' has no"):
        encode(make(), asked((context, "")))


def test_an_answer_that_is_longer_than_the_model(make):
    with pytest.raises(UsageError, match=r"max_length=2: must be at least \d+, .*choice 0"):
        encode(make(max_length=2), asked(("The", " cat sat on the mat")))


def test_thinking_is_refused_as_in_stock(make, build):
    arguments = {"enable_thinking": True, "think_end_token": "</s>"}
    task = build("demo_piqa", 1)
    known = "enable_thinking=True is not compatible" in inspect.getsource(
        HFLM
    )  # lm-eval 0.4.10 takes no notice of it
    with (
        pytest.raises(ValueError, match="enable_thinking=True is not compatible")
        if known
        else nullcontext()
    ):
        HFLM(str(MODEL_PATH), device="cpu", **arguments).loglikelihood(task.instances)
    with pytest.raises(UsageError, match="enable_thinking=True: must be False for task demo_piqa"):
        make(**arguments).loglikelihood(task.instances)
