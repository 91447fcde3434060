"""Every architecture of `networks.ARCHITECTURES`: hook, gradient, answers, layout, traces."""

import copy
import logging
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from encoder_decoder import PAIRS
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from multimodal import MULTIMODAL
from networks import (
    ARCHITECTURES,
    CPU,
    VOCABULARY,
    asked,
    exact,
    hookpoints,
    longest_tree_of,
    network,
    prepared,
    scorer_of,
    single,
    slope_error,
    tokenizer,
)
from unchanged import unchanged
from versions import TRANSFORMERS

from llm_attack.attacks import Attack
from llm_attack.lm.engine.engine import Engine, Layout
from llm_attack.lm.engine.probe import longest_tree
from llm_attack.lm.losses import LOSSES, ThreatModel
from llm_attack.lm.network.blocks import blocks
from llm_attack.lm.network.hook import frozen, try_out
from llm_attack.lm.packing.pack import pack_rows, pack_trees

every = pytest.mark.parametrize("name", ARCHITECTURES)


@every
@pytest.mark.sampled(3)
def test_the_hook_holds_what_the_model_reads(name):
    """At the embedding what the model takes as `inputs_embeds`, behind a block its hidden state."""
    model = network(name)
    (pack, embedding, block) = (pack_rows(asked()[:1]), *hookpoints(name))
    everywhere = torch.arange(pack.input_ids.numel())
    with torch.no_grad(), exact():
        scorer = scorer_of(model)
        point = scorer.point(pack)
        assert torch.equal(point, model.get_input_embeddings()(pack.input_ids))
        moved = point + 0.1 * torch.randn(point.shape, generator=torch.Generator().manual_seed(0))
        for x in (point, moved):
            found = scorer.logits(pack, everywhere, x)
            expected = model(inputs_embeds=x, use_cache=False).logits.flatten(0, 1)
            assert torch.allclose(found, expected, rtol=0, atol=1e-10)
        # transformers hooks its blocks when it is first asked for them, and goes on doing so
        hooked = copy.deepcopy(model)
        states = hooked(pack.input_ids, output_hidden_states=True, use_cache=False).hidden_states
        behind = scorer_of(model, block).point(pack)
        expected = states[ARCHITECTURES[name].states_from]
        assert torch.allclose(behind, expected, rtol=0, atol=1e-12)
        with unchanged(model):
            for path in (embedding, block):
                try_out(model, [path], pack.input_ids[:1])


@every
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.sampled(8)
def test_gradient_is_a_finite_difference(name, loss):
    for hookpoint in hookpoints(name):
        assert slope_error(name, hookpoint, loss) < 1e-6


@every
def test_fgsm_raises_the_loss(name):
    """By epsilon times the gradient's L1 norm, to first order."""
    model = network(name)
    pack = pack_rows(asked(), whole=True)
    with exact(), frozen(model):
        batch = prepared(scorer_of(model), pack, ThreatModel())
        epsilon = 1e-5 * float(batch.x.square().mean().sqrt())
        adversarial = batch.attack(Attack("fgsm", epsilon)).x
        with torch.no_grad():
            rise = batch.loss(adversarial).sum() - batch.loss(batch.x).sum()
        expected = epsilon * float(batch.clean.gradient.abs().sum())
        assert float(rise) == pytest.approx(expected, rel=0.01)


@every
def test_trees_equal_rows_or_are_not_used(name, caplog):
    """Clean logits of each request alone, also in trees; the log says so in a line if not."""
    model = network(name)
    with exact(), caplog.at_level(logging.WARNING, "llm_attack"):
        longest = longest_tree(scorer_of(model), CPU)
    assert longest == longest_tree_of(name) == ARCHITECTURES[name].trees
    lines = [r.message for r in caplog.records if r.name.startswith("llm_attack")][:1]
    assert [line.partition(",")[0] for line in lines] == ["packing: off"] * (longest == 0)
    head, sizes = model.get_output_embeddings(), []
    handle = head.register_forward_hook(lambda module, args, output: sizes.append(output.shape))
    for make in (pack_trees, pack_rows) if longest else (pack_rows,):
        pack = make(asked(), whole=True)
        with torch.no_grad(), exact():
            found = scorer_of(model).logits(pack, pack.watched.positions)
            assert sizes[-1][:-1].numel() == len(pack.watched.positions)  # of the head: no others
            for i, request in enumerate(pack.requests):
                alone = model(torch.tensor([request.inputs]), use_cache=False).logits[0]
                mine = found[pack.watched.slot[pack.watched.request == i]]
                assert torch.allclose(mine, alone, rtol=0, atol=1e-9)
    handle.remove()


@every
@pytest.mark.sampled(3)
def test_none_equals_stock(name, make):
    """In float32, of questions that are packed where the architecture takes trees."""
    words = [f"w{i}" for i in range(4, VOCABULARY)]
    requests = []
    for doc, (start, choices) in enumerate([(0, 3), (11, 2), (29, 4)]):
        for i in range(choices):
            context = " ".join(words[start : start + 6 + 2 * doc])
            continuation = " " + " ".join(words[start + 30 - 9 * i : start + 32 - 8 * i][: i + 1])
            request = Instance("loglikelihood", {}, (context, continuation), i)
            request.task_name, request.doc_id = "made up", doc
            requests.append(request)
    options = {"tokenizer": tokenizer(), "batch_size": 4, "device": "cpu"}
    stock = HFLM(pretrained=single(name), **options)
    expected = stock.loglikelihood(requests, disable_tqdm=True)
    ours = make(pretrained=single(name), attack="none", **options)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert (ours.engine.layout.longest_tree > 0) == (ARCHITECTURES[name].trees > 0)


def attacked(name, threat):
    """Answers under an attack of each sort, and the model that gives them."""
    attacks = [Attack("none"), Attack("fgsm", 0.01), Attack("pgd", 0.01, steps=2)]
    model = network(name)
    engine = Engine(
        scorer_of(model), attacks, threat, CPU, Layout(longest_tree=longest_tree_of(name))
    )
    return list(engine.answers(engine.batches(asked(), 8)))


@every
@pytest.mark.parametrize("threat", [ThreatModel(), ThreatModel("choice", shared=True)], ids=str)
@pytest.mark.sampled(4)
def test_nothing_of_the_model_changes(name, threat, monkeypatch):
    """Nor when the forward raises in the middle; a hook that was there stays."""
    model = network(name)
    with torch.no_grad(), exact():
        model(torch.tensor([[5, 6, 7]]))  # some set themselves up in their first forward
    model.requires_grad_(True)
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.shape) and None
    )
    try:
        with exact(), unchanged(model), frozen(model):
            attacked(name, threat)
        assert seen

        def fail(*args, **options):
            raise RuntimeError("in the middle of the forward")

        monkeypatch.setattr(blocks(model, "")[-1], "forward", fail)
        failing = pytest.raises(RuntimeError, match="in the middle of the forward")
        with exact(), unchanged(model), failing, frozen(model):
            attacked(name, threat)
    finally:
        handle.remove()


@pytest.mark.skipif(TRANSFORMERS.major < 5, reason="transformers 4 draws other weights")
def test_far_steps_of_rwkv():
    """What the page shows: near the clean point the likelihood rises as the gradient says."""
    text = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text("utf-8")
    shown = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    assert len(shown) == 4
    model, pack = network("rwkv"), pack_rows(asked(), whole=True)
    with exact(), frozen(model):
        batch = prepared(scorer_of(model), pack, ThreatModel())
        rms, slope = batch.x.square().mean().sqrt(), batch.clean.gradient.abs().sum()
        for share, first_order, rise in (map(float, row) for row in shown):
            epsilon = share * float(rms)
            assert float(slope) * epsilon == pytest.approx(first_order, rel=0.06)
            moved = batch.attack(Attack("reversed", epsilon)).x
            with torch.no_grad():
                found = float(batch.loss(batch.x).sum() - batch.loss(moved).sum())
            assert found == pytest.approx(rise, rel=0.06)


def page():
    path = Path(__file__).parents[2] / "docs" / "architectures.py"
    spec = spec_from_file_location("page_of_architectures", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(TRANSFORMERS.major < 5, reason="the page is what was found with transformers 5")
@pytest.mark.slow
def test_the_page_is_what_is_measured():
    """`python docs/architectures.py` writes it anew."""
    shown = page()
    text = shown.PAGE.read_text("utf-8")
    assert shown.renewed(text) == text
    assert shown.renewed(text.replace("| `llama` | packed |", "| `llama` | plain |")) == text
    others = (PAIRS, MULTIMODAL, shown.published.FAMILIES)
    assert text.count("\n| `") == len(ARCHITECTURES) + sum(map(len, others))
