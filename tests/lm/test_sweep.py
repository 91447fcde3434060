"""Several hookpoints: equal to a run for each, and partial forwards equal to whole ones."""

import copy
import functools

import numpy as np
import pytest
import torch
from networks import ARCHITECTURES, CPU, network, path_of, prepared, scorer_of
from versions import TRANSFORMERS

from llm_attack.attacks import Attack
from llm_attack.base.errors import UsageError
from llm_attack.lm.engine.clean import Needs
from llm_attack.lm.engine.engine import Engine, Layout
from llm_attack.lm.engine.hookpoints import clean_passes, expand, scorers
from llm_attack.lm.engine.scatter import by_index
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.network.blocks import known_blocks, recompute
from llm_attack.lm.network.hook import capture, frozen, try_out
from llm_attack.lm.network.signals import signals_at
from llm_attack.lm.packing.pack import pack_rows, pack_trees
from llm_attack.lm.packing.questions import Question, Request
from llm_attack.lm.settings import AttackSettings

MADE = [
    Question(
        [Request((5, 6, 7, 8, 9, 3), 2), Request((5, 6, 7, 11, 2), 2), Request((5, 6, 4), 1)],
        [[0], [1], [2]],
        [False, True, False],
    ),
    Question([Request((9, 3, 4, 4), 1), Request((9, 3, 4, 7, 7), 2)], [[3], [4]], [True, False]),
]


def places(model):
    """The embedding, every block, and the inside of each that is run once."""
    inside = []
    for block in known_blocks(model):
        for child in block.children():
            name = path_of(model, child)
            try:
                try_out(model, [name], torch.tensor([[2, 3, 4, 5, 6, 7]]))
            except UsageError:
                continue
            inside.append(name)
    return [*expand(model, ["embed", "layers"]), *inside]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.sampled(3)
def test_forwards_that_start_there_are_whole_ones(name):
    if name == "mpt" and TRANSFORMERS.major < 5:
        pytest.skip("the causal mask that transformers 4 makes for it overflows in float64")
    model = network(name)
    names = places(model)
    before = dict.fromkeys(known_blocks(model))
    for block in before:
        before[block] = vars(block).get("forward")
    found = scorers(scorer_of(model), names, CPU)
    pack = pack_rows(MADE, shared=True)
    assert all(vars(block).get("forward") is forward for block, forward in before.items())
    assert all(s.skip is not None for s in found[1 : 1 + len(before)])
    for scorer in (s for s in found if s.skip is not None):
        with torch.no_grad():
            forward = functools.partial(scorer._forward, pack.inputs)
            point = capture(scorer.hookpoint, forward) * 1.1
            below = capture(scorer.skip.blocks[-1], forward)
            whole = scorer.logits(pack, pack.scored.positions, point)
            part = scorer.logits(pack, pack.scored.positions, point, below)
        assert torch.allclose(part, whole, rtol=0, atol=1e-6 * whole.abs().max().item())
    assert all(vars(block).get("forward") is forward for block, forward in before.items())


@pytest.mark.parametrize("teller", [0, 1])
def test_blocks_that_tell_later_ones_more_run(caplog, teller):
    """As those of models whose later blocks use the keys and values of earlier ones."""
    model = copy.deepcopy(network("llama"))
    first, second = known_blocks(model)
    block, later = ((first, second.input_layernorm), (second, model.model.norm))[teller]
    plain, told = block.forward, []

    def forward(x, *args, **kwargs):
        told.append(x.mean())
        return plain(x, *args, **kwargs)

    block.forward = forward
    later.register_forward_hook(lambda module, args, output: output * (1 + told[-1]))
    _, *found = scorers(scorer_of(model), expand(model, ["embed", "layers"]), CPU)
    assert [scorer.skip is None for scorer in found] == [teller == 0, teller == 1]
    assert (
        f"whole forward passes, because partial ones change or fail at model.layers.{teller}"
        in caplog.text
    )


def test_scales_are_those_of_the_activations():
    """Without the first position, in one forward for all."""
    model, ids = network("llama"), torch.arange(5, 25)[None]
    layers = ["model.layers.0", "model.layers.1.mlp"]
    found = signals_at(model, [None, *layers], ids)
    weight = model.get_input_embeddings().weight
    assert found[None].rms == pytest.approx(weight.square().mean().sqrt().item(), rel=1e-6)
    for name in layers:
        x = capture(model.get_submodule(name), lambda: model(input_ids=ids))
        assert found[name].rms == pytest.approx(x[:, 1:].square().mean().sqrt().item(), rel=1e-6)
        assert found[name].rms != pytest.approx(x.square().mean().sqrt().item(), rel=1e-3)


def test_layers_are_those_that_text_goes_through():
    model = copy.deepcopy(network("llama"))
    model.model.spare = copy.deepcopy(model.model.layers)
    assert len(known_blocks(model)) == 4
    assert expand(model, ["layers"]) == ["model.layers.0", "model.layers.1"]


def test_a_failing_forward_leaves_nothing_behind():
    model = network("llama")
    *_, last = scorers(scorer_of(model), expand(model, ["embed", "layers"]), CPU)
    assert len(last.skip.blocks) == 2
    before = [vars(block).get("forward") for block in known_blocks(model)]
    with pytest.raises(ZeroDivisionError), last.skip.over(torch.zeros(1)):
        raise ZeroDivisionError
    assert [vars(block).get("forward") for block in known_blocks(model)] == before


@pytest.mark.parametrize("name", ["llama", "llama, recomputed", "falcon", "gpt2"])
@pytest.mark.parametrize("pack", [pack_trees(MADE), pack_rows(MADE, shared=True)])
def test_one_pass_for_all(pack, name):
    """Clean points, answers and gradients are those that each batch has alone.

    Falcon adds the attention's output into that of the MLP, in place.
    """
    name, _, recomputed = name.partition(", ")
    model = copy.deepcopy(network(name))
    for block in known_blocks(model) if recomputed else ():
        recompute(block)
    names = places(model)
    threat = ThreatModel("choice", shared=True)
    with frozen(model):
        together = scorers(scorer_of(model), names, CPU)
        passes = clean_passes(together, pack, threat, Needs(gradient=True))
        for name, clean in zip(names, passes, strict=True):
            batch = prepared(scorer_of(model, name), pack, threat)
            alone, kept = batch.clean, slice(None) if batch.mask is None else batch.mask
            assert torch.allclose(clean.gradient[kept], alone.gradient[kept], atol=1e-12)
            assert clean.gradient[kept].any()
            assert torch.allclose(clean.x[kept], alone.x[kept], atol=1e-12)
            assert torch.allclose(clean.scores.log_prob, alone.scores.log_prob, atol=1e-12)


@pytest.mark.parametrize("longest", [99, 0])
@pytest.mark.parametrize("loss", ["sequence", "choice"])
def test_answers_are_those_of_a_run_for_each(longest, loss):
    model = network("gpt2")
    names = places(model)
    threat = ThreatModel(loss, shared=loss == "choice")
    attacks = [Attack("random", 0.3), Attack("fgsm", 0.2), Attack("bim", 0.2, steps=2)]
    conditions = [Attack("none"), *attacks * len(names)]
    of_names = scorers(scorer_of(model), names, CPU)
    of_conditions = [of_names[0], *(scorer for scorer in of_names for _ in attacks)]

    def answers(attacks, scorer, many=()):
        engine = Engine(scorer, attacks, threat, CPU, Layout(longest_tree=longest), many)
        with frozen(model):
            batches = list(engine.answers(engine.batches(MADE, 8)))
        found = by_index(a for _, batch in batches for a in batch.answered)
        return torch.tensor(
            [[found[i].answers[k][0] for i in sorted(found)] for k in range(len(attacks))]
        )

    found = answers(conditions, of_names[0], of_conditions)
    expected = [answers([Attack("none")], scorer_of(model))]
    expected += [answers(attacks, scorer_of(model, name)) for name in names]
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)
    assert (found[1:] - found[:1]).abs().amax(1).min() > 1e-4  # each of them changes answers


def test_expand():
    model = network("llama")
    layers = ["model.layers.0", "model.layers.1"]
    assert expand(model, ["embed", "layers"]) == [None, *layers]
    assert expand(model, ["model.layers.*", "model.layers.1", "layers"]) == layers
    assert expand(model, ["model.layers.*.mlp"]) == [f"{layer}.mlp" for layer in layers]
    for given, says in (
        (
            "model.layer.*.mlp",
            r"hookpoints=model.layer.\*.mlp: .*did you mean 'model.layers.\*.mlp'",
        ),
        ("model.layers.7", "hookpoint=model.layers.7: "),
        ("layer", "hookpoints=layer: must be embed, layers or .*did you mean 'layers'"),
    ):
        with pytest.raises(UsageError, match=says):
            expand(model, [given])


def test_conditions_are_named_by_their_hookpoint(make):
    conditions = [
        AttackSettings("fgsm", "0.1rms", hookpoint=name) for name in (None, "model.layers.1")
    ]
    lm = make(attack="none")
    lm.use(AttackSettings("none"), *conditions)
    names = [attack.condition for attack in lm.engine.attacks]
    assert names == ["none", "fgsm@0.1rms", "fgsm@0.1rms@model.layers.1"]
    infos = [lm.attack_info(i) for i in (1, 2)]
    for info, key in zip(infos, ("embedding_rms", "hookpoint_rms"), strict=True):
        assert info["epsilon_absolute"] == pytest.approx(0.1 * info[key])
    assert infos[0]["epsilon_absolute"] != pytest.approx(infos[1]["epsilon_absolute"], rel=0.1)


def test_scales_have_the_digits_of_float64():
    """Of the embedding matrix, and of activations, against numpy."""
    model, ids = network("llama"), torch.arange(5, 25)[None]
    found = signals_at(model, [None, "model.layers.0"], ids)
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[1][0, 1:].numpy()
    for signal, x in (
        (found[None], model.get_input_embeddings().weight.detach().numpy()),
        (found["model.layers.0"], states),
    ):
        assert signal.rms == pytest.approx(np.sqrt(np.square(x).mean()), rel=1e-14, abs=0)
        norms = np.linalg.norm(x, axis=-1).mean()
        assert signal.token_norm == pytest.approx(norms, rel=1e-14, abs=0)
