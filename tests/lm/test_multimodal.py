"""Models that also read images, on tasks of text: hook, gradient, and answers of stock `hf`."""

import copy

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from multimodal import MULTIMODAL, network
from networks import asked, exact, prepared, scorer_of, tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llm_attack.base.errors import UsageError
from llm_attack.harness.model import AttackedHFLM
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.packing.pack import pack_rows

every = pytest.mark.parametrize("kind", MULTIMODAL)
LOADED = [kind for kind in MULTIMODAL if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
OPTIONS = {"device": "cpu", "batch_size": 4}


def requests():
    words = [f"w{i}" for i in range(4, 58)]
    made = []
    for doc, (start, choices) in enumerate([(0, 3), (11, 2), (25, 4)]):
        for i in range(choices):
            context = " ".join(words[start : start + 6 + 2 * doc])
            continuation = " " + " ".join(words[start + 20 - 4 * i : start + 22 - 3 * i][: i + 1])
            request = Instance("loglikelihood", {}, (context, continuation), i)
            request.task_name, request.doc_id = "made up", doc
            made.append(request)
    return made


def answers(lm):
    return [ll for ll, _ in lm.loglikelihood(requests(), disable_tqdm=True)]


@every
@pytest.mark.sampled(3)
def test_none_equals_stock(kind):
    """Also without the module for images."""
    given = {"tokenizer": tokenizer(), "softmax_dtype": "float64", **OPTIONS}
    model = network(kind)
    expected = answers(HFLM(pretrained=model, **given))
    assert answers(AttackedHFLM(model, attack="none", **given)) == pytest.approx(expected, abs=1e-5)
    blind = copy.deepcopy(model)
    owner, _, name = MULTIMODAL[kind].tower.rpartition(".")
    assert getattr(blind.get_submodule(owner), name) is not None
    setattr(blind.get_submodule(owner), name, None)
    assert answers(AttackedHFLM(blind, attack="none", **given)) == pytest.approx(expected, abs=1e-5)


@every
def test_the_hook_holds_the_embedding_of_the_text(kind):
    """With the gradient of a loss, which equals a central difference."""
    model, pack = network(kind), pack_rows(asked(), shared=True)
    with exact(), frozen(model):
        batch = prepared(scorer_of(model), pack, ThreatModel("choice", shared=True))
        rows = pack_rows(asked()[:1])
        everywhere = torch.arange(rows.input_ids.numel())
        with torch.no_grad():
            point = scorer_of(model).point(rows) + 0.1
            found = scorer_of(model).logits(rows, everywhere, point)
            expected = model(inputs_embeds=point, use_cache=False).logits.flatten(0, 1)
            assert torch.allclose(found, expected, rtol=0, atol=1e-9)
            gradient = batch.clean.gradient
            h, way = 3e-5 * batch.x.square().mean().sqrt(), gradient / gradient.norm()
            up, down = (batch.loss(batch.x + s * h * way).sum() for s in (1, -1))
        assert (gradient.norm() - (up - down) / (2 * h)).abs() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("kind", LOADED)
def test_checkpoints_that_stock_loads(kind, tmp_path):
    """Of some it loads the text part: so does `attacked-hf`, and the results say so."""
    copy.deepcopy(network(kind)).float().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    given = {"dtype": "float32", **OPTIONS}
    stock = HFLM(str(tmp_path), **given)
    lm = AttackedHFLM(str(tmp_path), attack="fgsm", epsilon="0.01rms", **given)
    assert type(lm.model) is type(stock.model)
    part = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind].endswith("ForCausalLM")
    assert [w.partition(",")[0] for w in lm.warnings] == [
        "only the text part of the checkpoint was loaded"
    ] * part
    lm.use(AttackedHFLM(str(tmp_path), attack="none", **given).settings)
    assert answers(lm) == pytest.approx(answers(stock), abs=1e-4)


def test_text_weights_that_are_not_used_are_refused(tmp_path):
    """Also where those for images are left out."""
    model = copy.deepcopy(network("llama4")).float()
    model.language_model.model.layers.append(copy.deepcopy(model.language_model.model.layers[0]))
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"does not use: \d+ \(.*layers\.2.*must be a complete"):
        AttackedHFLM(str(tmp_path), attack="none", **OPTIONS)
