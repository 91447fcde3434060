"""Arguments that `perturb` and the searches refuse, and contexts in which they may be called."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from llm_attack.attacks import (
    Attack,
    Elements,
    Groups,
    Known,
    Losses,
    Watch,
    deepfool,
    loss_gradient,
    perturb,
    sparsefool,
)

from .helpers import ALL_ATTACKS, closures, keys, linear, rng

X = torch.rand(3, 4, generator=rng(0))
W = torch.randn(3, 4, generator=rng(1))
LOSS = linear(W)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"attack": "fgsm"}, TypeError, "attack: must be an Attack, not str"),
        ({"x": [[0.5]]}, TypeError, "x: must be a tensor, not list"),
        ({"x": torch.ones(3, 4, dtype=torch.uint8)}, TypeError, "x: must be of floats, not"),
        ({"x": torch.tensor(0.5)}, ValueError, "x: must have a dimension"),
        ({"loss": 5}, TypeError, "loss: must be a function, not int"),
        ({"loss": lambda x: 1.0}, TypeError, "loss: must return a tensor, not float"),
        ({"loss": lambda x: x.sum()}, ValueError, r"loss: .* 3 examples, \(3,\), not \(\)"),
        ({"loss": lambda x: x}, ValueError, r"loss: .* not \(3, 4\)"),
        ({"bounds": (1, 0)}, ValueError, r"bounds: .*the lower one first, not \(1, 0\)"),
        ({"bounds": (0, float("nan"))}, ValueError, "bounds: must be two numbers"),
        ({"bounds": (0, 1, 2)}, TypeError, r"bounds: must be two numbers, not \(0, 1, 2\)"),
        ({"bounds": 1}, TypeError, "bounds: must be two numbers, not 1"),
        ({"bounds": ("a", "b")}, TypeError, "bounds: must be two numbers"),
        ({"bounds": (0, 0.5)}, ValueError, r"x: must lie within bounds=\(0, 0.5\); it goes from"),
        ({"x": X * torch.nan, "bounds": (0, 1)}, ValueError, "x: must lie within .* nan"),
        (
            {"elements": Elements(torch.ones(3))},
            TypeError,
            "mask: must be a tensor of torch.bool, not",
        ),
        (
            {"elements": Elements(torch.ones(4, dtype=torch.bool))},
            ValueError,
            r"mask: its shape \(4,\)",
        ),
        (
            {"elements": Elements([True])},
            TypeError,
            "mask: must be a tensor of torch.bool, not list",
        ),
        ({"keys": torch.ones(3)}, TypeError, "keys: must be a tensor of torch.int64"),
        ({"keys": keys(2)}, ValueError, r"keys: its shape \(2,\)"),
        ({"elements": Elements(examples=5)}, TypeError, "examples: must be Groups, not int"),
        (
            {"elements": Elements(balls=Groups.rows(X[:2]))},
            ValueError,
            r"balls: the shape of its index \(2,\)",
        ),
        ({"watch": Watch(5)}, TypeError, "on_gradient: must be a function, not int"),
        (
            {"loss": Losses(LOSS, target_losses=5)},
            TypeError,
            "target_losses: must be a list of functions, not int",
        ),
        (
            {"loss": Losses(LOSS, target_losses=[5])},
            TypeError,
            "target_losses: must be a function, not int",
        ),
        ({"loss": Losses(LOSS, gap=5)}, TypeError, "gap: must be a function, not int"),
        (
            {"known": Known(gradient=X.double())},
            TypeError,
            "gradient: must be a tensor of torch.float32",
        ),
        ({"known": Known(gradient=X[:, :2])}, ValueError, r"gradient: its shape \(3, 2\)"),
        ({"elements": Groups.rows(X)}, TypeError, "elements: must be Elements, not Groups"),
        ({"known": X}, TypeError, "known: must be Known, not Tensor"),
        ({"watch": print}, TypeError, "watch: must be Watch, not builtin_function_or_method"),
        ({"known": Known(gap=X)}, ValueError, r"gap: must be one value for each of 3 examples"),
        ({"known": Known(gradient=X[0])}, ValueError, r"gradient: its shape \(4,\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", "given"),
)
def test_wrong_arguments(options, kind, message):
    given = {"attack": Attack("fgsm", 0.1), "x": X, "loss": LOSS, **options}
    with pytest.raises(kind, match=message):
        perturb(**given)


@pytest.mark.parametrize("search", [deepfool, sparsefool])
@pytest.mark.parametrize(
    ("x", "bounds", "kind", "message"),
    [
        (5, (0, 1), TypeError, "x: must be a tensor, not int"),
        (X.int(), (0, 1), TypeError, "x: must be of floats"),
        (X, (1, 0), ValueError, "bounds: must be two numbers, the lower one first"),
        (X + 1, (0, 1), ValueError, "x: must lie within bounds"),
        (X, (X + 0.1, X + 0.2), ValueError, "x: must lie within bounds"),
    ],
)
def test_wrong_points_of_searches(search, x, bounds, kind, message):
    with pytest.raises(kind, match=message):
        search(lambda point: point @ W.T, x, bounds=bounds)


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("name", ALL_ATTACKS)
def test_under_inference_mode(name, made_inside):
    """The same numbers as outside of it; the point may be made there."""
    net, labels, attack = network(), torch.tensor([0, 1, 2]), Attack(name, 0.1, steps=3)

    def loss(point):
        return cross_entropy(net(point), labels, reduction="none")

    how = {"keys": keys(3), "bounds": (0, 1), **closures(name, loss)}
    expected = perturb(attack, X, **how)
    with torch.inference_mode():
        found = perturb(attack, X.clone() if made_inside else X, **how)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("search", [deepfool, sparsefool])
def test_searches_under_inference_mode(search):
    net = network()
    expected = search(net, X, bounds=(0, 1))
    assert not torch.equal(expected, X)
    with torch.inference_mode():
        assert torch.equal(search(net, X.clone(), bounds=(0, 1)), expected)


def test_gradient_under_inference_mode():
    with torch.inference_mode():
        assert torch.equal(loss_gradient(LOSS, X.clone()), W)


def test_what_was_made_under_inference_mode_is_said_by_torch():
    """Nothing that a closure multiplies by can be copied for it."""
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"[Ii]nference tensors cannot"):
        perturb(Attack("fgsm", 0.1), X, linear(W.clone()))
