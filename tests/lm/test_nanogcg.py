"""GCG beside `nanogcg`, where it is installed, on the loss of `nanogcg` and the bundled model."""

import pytest
import torch

from llm_attack.attacks import Attack, Ball, keys_for, loss_gradient
from llm_attack.attacks.apgd import Hill
from llm_attack.attacks.swaps import Sentence, Vocabulary, first_order, gcg

nanogcg = pytest.importorskip("nanogcg", reason="nanogcg is not installed")

PROMPT, TARGET = "Question: What does a sevil eat?", "\nAnswer: seeds"
START, STEPS, WIDTH, TOP = " a the is of", 12, 24, 256
SEEDS = range(4)


@pytest.fixture(scope="module")
def bundled():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llm_attack.demo import MODEL_PATH

    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return model, tokenizer


def problem(model, tokenizer):
    """(embeddings before, ids that are searched, embeddings after) and the loss of nanogcg."""
    table = model.get_input_embeddings()
    before, ids, target = (
        tokenizer(text, return_tensors="pt", add_special_tokens=first)["input_ids"]
        for text, first in ((PROMPT, True), (START, False), (TARGET, False))
    )

    def loss(x):
        """(N,) the negative cross-entropy of the target behind the searched tokens x."""
        parts = [part.expand(len(x), -1, -1) for part in (table(before), table(target))]
        logits = model(inputs_embeds=torch.cat([parts[0], x, parts[1]], 1)).logits
        start = logits.shape[1] - target.shape[1]
        of_target = logits[:, start - 1 : -1].log_softmax(-1)
        return of_target.gather(-1, target.expand(len(x), -1)[..., None]).mean((1, 2))

    return table, before, ids, target, loss


def settings(**more):
    how = {"num_steps": STEPS, "search_width": WIDTH, "topk": TOP, "verbosity": "ERROR"}
    how |= {"allow_non_ascii": True, "filter_ids": False, "use_prefix_cache": False}
    return nanogcg.GCGConfig(**how, optim_str_init=START, **more)


def test_gradients_of_tokens_are_those_of_nanogcg(bundled):
    """Its gradient of the one-hot tokens, up to a constant for each place."""
    model, tokenizer = bundled
    table, before, ids, target, loss = problem(model, tokenizer)
    other = nanogcg.gcg.GCG(model, tokenizer, settings())
    other.before_embeds, other.target_embeds = table(before), table(target)
    other.after_embeds, other.target_ids = table(ids[:, :0]), target
    expected = -other.compute_token_gradient(ids)[0].double()
    x = table(ids).detach()
    vocabulary = Vocabulary(table, torch.arange(452))
    found = first_order(loss_gradient(loss, x), x, ids, vocabulary, 452)
    of_own = expected.gather(-1, ids[0][:, None])
    expected = (expected - of_own).gather(-1, found.token)
    there = found.value.isfinite()
    assert there.sum() == ids.numel() * 451
    assert torch.allclose(found.value[there], expected[there], atol=1e-4)


def losses_of(bundled, seed):
    """The smallest loss of nanogcg, and of ours with as many steps and candidates."""
    model, tokenizer = bundled
    table, _, ids, _, loss = problem(model, tokenizer)
    theirs = nanogcg.run(model, tokenizer, PROMPT, TARGET, settings(seed=seed)).best_loss
    torch.use_deterministic_algorithms(False)
    x = table(ids).detach()
    hill = Hill(torch.no_grad()(loss), lambda point: (loss(point), loss_gradient(loss, point)))
    sentence = Sentence(
        None, Ball.of(Attack("gcg", 4.0), x), ids, Vocabulary(table, torch.arange(452))
    )
    keys = torch.tensor([keys_for(seed, ids[0].tolist())])
    found = gcg(sentence, hill, keys, swaps=ids.numel(), steps=STEPS, candidates=WIDTH)
    with torch.no_grad():
        return theirs, -float(loss(found.point)), -float(loss(x))


@pytest.mark.slow
def test_the_search_reaches_the_loss_of_nanogcg(bundled):
    """Both draw, so the means over some seeds are compared with how much seeds differ."""
    theirs, ours, start = torch.tensor([losses_of(bundled, seed) for seed in SEEDS]).T
    spread = (theirs.var() / len(SEEDS) + ours.var() / len(SEEDS)).sqrt()
    assert abs(float(theirs.mean() - ours.mean())) <= 3 * float(spread)
    assert (ours < start - 1).all() and (theirs < start - 1).all()
