"""The hookpoint: found by name, restored afterwards, and nothing of the model changed."""

import pytest
import torch
from unchanged import unchanged

from llm_attack.base.errors import UsageError
from llm_attack.lm.network.hook import capture, edit_input, edit_output, frozen, resolve


@pytest.mark.parametrize("attack", ["fgsm", "bim", "pgd", "random", "none"])
@pytest.mark.sampled(2)
def test_nothing_of_the_model_changes(make, build, attack):
    lm = make(attack=attack, steps=2)
    for p in lm.model.parameters():
        p.requires_grad_(True)
    seen = []
    handle = lm.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output.shape) and None
    )
    with unchanged(lm.model):
        lm.loglikelihood(build("demo_piqa", 2).instances, disable_tqdm=True)
    assert seen
    handle.remove()


def test_hooks_go_when_the_forward_raises(make, build, monkeypatch):
    lm = make(attack="fgsm")

    def fail(*args, **kwargs):
        raise RuntimeError("in the middle of the forward")

    monkeypatch.setattr(lm.model.model.norm, "forward", fail)
    with unchanged(lm.model), pytest.raises(RuntimeError, match="in the middle"):
        lm.loglikelihood(build("demo_piqa", 1).instances, disable_tqdm=True)


def test_edits_and_capture():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    x = torch.ones(1, 2)
    with edit_output(model[0], lambda y: y * 0), edit_input(model[1], lambda y: y + 1):
        found = model(x)
    assert torch.equal(found, model[1](torch.ones(1, 2)))
    assert torch.equal(capture(model[0], lambda: model(x)), model[0](x))
    assert not model[0]._forward_hooks and not model[1]._forward_pre_hooks


def test_capture_of_a_module_that_is_not_called():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="never called"):
        capture(torch.nn.Identity(), lambda: model(torch.ones(1, 2)))


def test_frozen_restores_flags():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise RuntimeError
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_hookpoints(make, build):
    """The embedding by its name is the default; a deeper point is another attack, and an attack."""
    lm = make()
    task = build("demo_piqa", 3)
    default = lm.loglikelihood(task.instances, disable_tqdm=True)
    named = make(hookpoint="model.embed_tokens").loglikelihood(task.instances, disable_tqdm=True)
    assert named == default
    deep = make(hookpoint="model.layers.1", epsilon=0.5)
    clean = make(attack="none").loglikelihood(task.instances, disable_tqdm=True)
    attacked = deep.loglikelihood(task.instances, disable_tqdm=True)
    assert attacked != clean and attacked != default
    assert deep.attack_info()["noise_rms"] == pytest.approx(0.5, rel=1e-3)


def test_layer_hookpoint_equals_definition(make, build, reference):
    """FGSM on the output of a block, against autograd through a hook of the test's own."""
    task, epsilon = build("demo_piqa", 2), 0.3
    lm = make(hookpoint="model.layers.1", epsilon=epsilon, dtype="float64", softmax_dtype="float64")
    found = [ll for ll, _ in lm.loglikelihood(task.instances, disable_tqdm=True)]
    layer = reference.model.model.layers[1]
    for request, ll in zip(task.instances, found, strict=True):
        tokens, n = reference.tokens(*request.args)
        x = reference.embed(tokens[:-1])
        kept = []

        def keep(module, args, output, kept=kept):
            kept.append(output[0] if isinstance(output, tuple) else output)
            kept[0].retain_grad()

        def put(module, args, output, kept=kept):
            attacked = (kept[0] + epsilon * kept[0].grad.sign()).detach()
            return (attacked, *output[1:]) if isinstance(output, tuple) else attacked

        handle = layer.register_forward_hook(keep)
        (-reference.log_probs(x.requires_grad_(), tokens).sum()).backward()
        handle.remove()
        handle = layer.register_forward_hook(put)
        expected = float(reference.log_probs(x, tokens)[-n:].sum().detach())
        handle.remove()
        assert ll == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("model.layers.9", "model.layers."),
        ("layers.1", "model.layers.1"),
        ("embed_tokens", "model.embed_tokens"),
        ("", ""),
    ],
)
def test_unknown_hookpoint(make, name, meant):
    with pytest.raises(UsageError, match=rf"hookpoint={name}: must be the dotted path.*{meant}"):
        resolve(make().model, name)
