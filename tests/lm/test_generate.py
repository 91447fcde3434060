"""Generation: the attack perturbs the prompt's embeddings at prefill, and nowhere else."""

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from llm_attack.base.errors import UsageError
from llm_attack.demo import MODEL_PATH


def prompts(build, n=5):
    """Prompts of different lengths, so that a batch of them is padded."""
    task = build("demo_arc_challenge", n)
    requests = []
    for i, request in enumerate(task.instances[::4]):
        words = request.args[0].split()
        text = " ".join(words[: len(words) - i])
        asked = ("generate_until", {}, (text, {"until": ["\n\n"], "max_gen_toks": 6}), 0)
        requests.append(type(request)(*asked))
    return requests


def generate(lm, requests):
    return lm.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize("settings", [{"attack": "none"}, {"attack": "fgsm", "epsilon": 0}])
def test_clean_equals_stock(reused, build, settings):
    requests = prompts(build)
    stock = HFLM(pretrained=str(MODEL_PATH), device="cpu", batch_size=8)
    assert generate(reused(**settings), requests) == generate(stock, requests)


@pytest.mark.parametrize("epsilon", [0.01, 0.05])
def test_attacked_equals_definition(reused, build, reference, epsilon):
    requests = prompts(build)
    found = generate(reused(attack="fgsm", epsilon=epsilon, dtype="float64"), requests)
    model, tokenizer = reference.model, reference.tokenizer
    for request, text in zip(requests, found, strict=True):
        tokens = tokenizer.encode(request.args[0])

        def loss(x, tokens=tokens):
            logits = model(inputs_embeds=x[None]).logits[0, :-1].log_softmax(-1)
            return -logits[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].sum()

        # the loss does not depend on the last token, whose gradient is zero: it stays as it is
        x = reference.iterate(loss, reference.embed(tokens), epsilon, 1, epsilon)
        ids = model.generate(
            inputs_embeds=x[None],
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert text == tokenizer.decode(ids[0], skip_special_tokens=True).split("\n\n")[0]


def test_attack_changes_what_is_generated(reused, build):
    requests = prompts(build)
    assert generate(reused(epsilon=0.2), requests) != generate(reused(attack="none"), requests)


def test_diagnostics_count_the_prompts(reused, build):
    requests = prompts(build)
    lm = reused(attack="random", epsilon=0.02)
    generate(lm, requests)
    tokens = sum(len(lm.tok_encode(r.args[0])) for r in requests)
    assert lm.diagnostics[0].elements == tokens * lm.model.config.hidden_size
    assert lm.attack_info()["noise_rms"] == pytest.approx(0.02, rel=1e-5)


@pytest.mark.parametrize("loss", ["choice", "continuation"])
def test_losses_without_meaning(reused, build, loss):
    with pytest.raises(UsageError, match=rf"loss={loss}.*sequence"):
        generate(reused(loss=loss), prompts(build, 1))
