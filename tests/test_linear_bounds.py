"""Linear bounds of a small Llama: their slopes are the gradient, and they contain the network."""

import runpy

import pytest
import torch
from shown import ROOT
from test_interval_bounds import TOKENS, logits
from test_interval_bounds import model as rounded  # noqa: F401

from llm_attack.lm.packing.questions import Question, Request

BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "linear_bounds.py"))
Bounds, Line = BENCHMARK["Bounds"], BENCHMARK["Line"]
RADII = torch.tensor([1e-8, 1e-5, 1e-3], dtype=torch.float64)
CHOICES = [Request((*TOKENS, 1), 1), Request((*TOKENS, 2), 1)]
SHAPE = (1, len(TOKENS), 8)


@pytest.fixture(scope="module")
def model(rounded):  # noqa: F811
    """With norms in float64; those of transformers are in float32."""
    for layer in rounded.modules():
        if hasattr(layer, "variance_epsilon"):
            layer.forward = lambda x, of=layer: (
                of.weight * (x * (x.square().mean(-1, keepdim=True) + of.variance_epsilon).rsqrt())
            )
    return rounded


@pytest.fixture(scope="module")
def bounds(model):
    with torch.no_grad():
        return Bounds(model, RADII)


@pytest.fixture(scope="module")
def found(bounds):
    with torch.no_grad():
        return bounds.logits(TOKENS, len(TOKENS))


def gradient(model, function):
    leaf = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(logits(model, leaf)), leaf)
    return slope


def test_values_and_slopes_are_those_of_autograd(model, found):
    assert torch.allclose(found.value, logits(model, 0.0), rtol=0, atol=1e-9)
    for place, token in ((-1, 3), (1, 7)):
        own = gradient(model, lambda z, at=(place, token): z[at]).flatten()
        assert torch.allclose(found.slope[:, place, token], own, rtol=1e-7, atol=1e-9)
    assert found.slope[-8:, :-1].abs().max() == 0  # tokens do not see later ones


def changes(model, norm):
    """Perturbations of length 1: random ones, and those that move a logit most."""
    generator = torch.Generator().manual_seed(1)
    for i in range(12):
        draw = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        slope = gradient(model, lambda z, at=i: z[-1, at])
        for way in (draw, slope, -slope):
            yield way.sign() if norm == "linf" else way / way.norm()


@pytest.mark.parametrize("norm", [0, 1])
def test_they_contain_what_the_network_computes(model, bounds, found, norm):
    size, step = bounds.size(found)[norm], RADII.double()
    least, most = torch.full_like(size, torch.inf), torch.full_like(size, -torch.inf)
    for change in changes(model, ("linf", "l2")[norm]):
        seen = torch.stack([logits(model, r * change) for r in step])
        least, most = torch.minimum(least, seen), torch.maximum(most, seen)
    low, high = found.value - size, found.value + size
    assert (least >= low - 1e-10).all() and (most <= high + 1e-10).all()
    # at a small radius they are tight: the change of a logit along its gradient
    width, reached = (high - low)[0, -1], (most - least)[0, -1]
    assert (reached > 0.9 * width).all()


def test_a_linear_network_is_bounded_exactly(bounds):
    """Without a bend there is no rest: the bound is the radius times the dual norm."""
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(2)).double()
    point = torch.ones(8).double()
    rest = torch.zeros(2, len(RADII), 8).double()
    line = Line(point, torch.eye(8).double(), rest).linear(weight)
    size = bounds.size(line)
    for i, dual in enumerate((weight.abs().sum(1), weight.norm(dim=1))):
        assert torch.allclose(size[i], RADII.double()[:, None] * dual, rtol=1e-12)


def test_products_miss_the_product_of_the_changes(bounds):
    """(1 + r)(2 + r) is 2 + 3 r + r²; with rests of 1, each change is r + 1."""
    r, one = RADII, torch.ones(1).double()
    for rest in (0.0, 1.0):
        a, b = (Line(v * one, one[None], torch.full((2, 3, 1), rest).double()) for v in (1.0, 2.0))
        made = bounds.product(a, b)
        assert (made.value.item(), made.slope.item()) == (2.0, 3.0)
        assert torch.allclose(made.rest[..., 0], (r + rest) ** 2 + 3 * rest, rtol=1e-12)


@pytest.mark.parametrize("name", ["exp", "silu", "power -0.5", "power -1", "power 0"])
def test_bends_contain_the_function(bounds, name):
    kind, *exponent = name.split()
    arguments = [float(e) for e in exponent]
    functions = {"exp": torch.exp, "silu": torch.nn.functional.silu, "power 0": torch.log}
    function = functions.get(name, lambda x: x ** arguments[0])
    grid = torch.linspace(0.3, 3, 40).double() if exponent else torch.linspace(-6, 6, 40).double()
    radii = torch.tensor([1e-3, 0.1, 0.25])
    wide = Bounds(bounds.model, radii)
    rest = torch.zeros(2, 3, 40).double()
    line = getattr(wide, kind)(Line(grid, torch.ones(1, 40).double(), rest), *arguments)
    for i, r in enumerate(radii.double()):
        for way in torch.linspace(-1, 1, 41).double():
            off = function(grid + r * way) - (line.value + r * way * line.slope[0])
            assert (off.abs() <= line.rest[0, i] + 1e-12).all()
    assert (line.rest[0, 0] < 1e-3).all()


@pytest.mark.parametrize("other", [Request((*TOKENS, 2), 1), Request((*TOKENS, 2, 5), 2)])
def test_choices_share_the_change_of_their_common_tokens(model, other):
    """At a small radius, the margin falls by the radius times the dual norm of its gradient."""
    slopes, values = [], []
    for request in (CHOICES[0], other):
        leaf = model.model.embed_tokens(torch.tensor([request.inputs])).double().requires_grad_()
        n = request.n_continuation
        shares = model(inputs_embeds=leaf).logits[0, -n:].log_softmax(-1)
        values.append(sum(shares[i, token] for i, token in enumerate(request.tokens[-n:])))
        slopes.append(torch.autograd.grad(values[-1], leaf)[0][0])
    shared = len(TOKENS)
    slope = torch.cat([slopes[0] - slopes[1][:shared], slopes[1][shared:]])
    margin = float((values[0] - values[1]).detach())
    gold = [margin > 0, margin < 0]
    with torch.no_grad():
        fine = Bounds(model, torch.tensor([1e-10], dtype=torch.float64))
        found = fine.margin(Question([CHOICES[0], other], [[0], [1]], gold))
    for norm, dual in enumerate((slope.abs().sum(), slope.norm())):
        fall = (abs(margin) - float(found[norm, 0])) / 1e-10
        assert fall == pytest.approx(float(dual), rel=0.01)


def test_the_reach_is_no_longer_than_an_attack_needs(model):
    with torch.no_grad():
        fine = Bounds(model, 10 ** torch.linspace(-8, 0, 81))
        first, second = (float(fine.score(request).value) for request in CHOICES)
        gold = [first > second, second > first]
        question = Question(CHOICES, [[0], [1]], gold)
        reach = fine.reach(question)
        assert fine.reach(Question(CHOICES, [[0], [1]], gold[::-1])) == [0, 0]
    sign = 1.0 if gold[0] else -1.0
    slope = gradient(model, lambda z: sign * (z[-1, 1] - z[-1, 2]))
    distance = sign * float(logits(model, 0.0)[-1, 1] - logits(model, 0.0)[-1, 2])
    for norm, way in enumerate((slope.sign(), slope / slope.norm())):
        assert reach[norm] > 1e-6
        # no longer than the first-order distance, which is nearly exact so near
        first_order = distance / float((slope * way).sum())
        assert reach[norm] < first_order * 1.05
        after = logits(model, -reach[norm] * way)[-1]
        assert sign * (after[1] - after[2]) > 0
