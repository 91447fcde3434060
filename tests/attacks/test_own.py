"""The user's own attacks: they stay in the ball, with the draws and settings of all others."""

import functools
import subprocess
import sys

import pytest
import torch
from shown import ROOT

from attacks.helpers import grid, keys, linear, rng
from llm_attack.attacks import (
    ATTACKS,
    Attack,
    Elements,
    Groups,
    Watch,
    perturb,
    register_attack,
    uniform,
)
from llm_attack.attacks.draws import rehashed
from llm_attack.base.errors import UsageError
from llm_attack.base.plugins import load_function, name_of, source_hash

VMI, L1 = "examples.vmi_fgsm:vmi_fgsm", "examples.l1_pgd:l1_pgd"


@pytest.fixture(autouse=True)
def register():
    """`register_attack`, undone at the end."""
    before = dict(ATTACKS)
    yield register_attack
    ATTACKS.clear()
    ATTACKS.update(before)


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    return torch.nn.Sequential(*layers).double().eval()


def test_vmi_fgsm_is_that_of_torchattacks(network, monkeypatch):
    torchattacks = pytest.importorskip("torchattacks", reason="make attack-libs")
    x, labels = torch.rand(5, 3, 2, 2, generator=rng(1)).double(), torch.tensor([0, 1, 2, 0, 1])
    draws = keys(5)

    def ours(self, low, high):
        nonlocal draws
        draws = rehashed(draws)
        return high * uniform(draws, x)

    def loss(point):
        return torch.nn.functional.cross_entropy(network(point), labels, reduction="none")

    theirs = torchattacks.VMIFGSM(network, eps=0.1, alpha=0.02, steps=4, decay=0.7, N=5, beta=1.5)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "uniform_", ours)
        expected = theirs(x, labels)
    attack = Attack(VMI, 0.1, steps=4, step_size=0.02, decay=0.7)
    found = perturb(attack, x, loss, bounds=(0, 1), keys=keys(5))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (found - x).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l1_pgd_on_a_linear_loss(dtype):
    """The best point of an L1 ball is the corner of the steepest coordinate."""
    x, w = grid(6, 4, 5).to(dtype), torch.randn(6, 4, 5, generator=rng(3)).to(dtype)
    found = perturb(Attack(L1, 0.75, steps=8), x, linear(w), keys=keys(6))
    steepest = w.abs().flatten(1).argmax(1)
    expected = torch.zeros_like(w).flatten(1)
    signs = w.flatten(1).gather(1, steepest[:, None]).sign()
    expected.scatter_(1, steepest[:, None], 0.75 * signs)
    torch.testing.assert_close((found - x).flatten(1), expected, rtol=0, atol=1e-6)


def test_projection_on_the_l1_ball():
    """Against the threshold from sorted coordinates (Duchi et al. 2008, Fig. 1)."""
    projected = load_function("attack", "examples.l1_pgd:projected")
    change = (
        torch.randn(7, 9, generator=rng(4)).double() * torch.tensor([0.01, *[1.0] * 6])[:, None]
    )
    found = projected(change, Groups.rows(change), 1.5)
    for row, of in zip(change, found, strict=True):
        size = row.abs().sort(descending=True).values
        sums = (size.cumsum(0) - 1.5) / torch.arange(1, 10)
        threshold = sums[size > sums][-1] if size.sum() > 1.5 else 0.0
        torch.testing.assert_close(of, row.sign() * (row.abs() - threshold).clamp(min=0))


@pytest.mark.parametrize("name", [VMI, L1])
def test_an_example_alone_and_among_others(name):
    x, w = grid(5, 3, 4), torch.randn(5, 3, 4, generator=rng(7))
    loss = lambda point: (w[: len(point)] * point).tanh().flatten(1).sum(1)  # noqa: E731
    attack = Attack(name, 0.25, steps=3)
    together = perturb(attack, x, loss, keys=keys(5))
    alone = perturb(attack, x[:1], loss, keys=keys(5)[:1])
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-6)


def test_what_it_returns_is_kept_in_ball_box_and_mask(register):
    def far(x, loss, ball, keys):
        return x + 100

    x = torch.full((2, 3, 4), 0.5)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    attack = Attack(register(far, "far"), 0.3)
    found = perturb(attack, x, linear(x), keys=keys(2), elements=Elements(mask), bounds=(0, 0.7))
    expected = torch.where(mask[..., None], 0.7, 0.5).expand_as(x)
    torch.testing.assert_close(found, expected)


def test_settings_that_it_names(register):
    seen = {}

    def some(x, loss, ball, keys, steps, step_size):
        seen.update(steps=steps, step_size=step_size)
        return x

    def every(x, loss, ball, keys, **settings):
        seen.update(settings)
        return x

    x = torch.zeros(1, 2)
    perturb(Attack(register(some, "some"), 0.4, steps=7), x, linear(x))
    assert seen == {"steps": 7, "step_size": pytest.approx(0.1)}
    perturb(Attack(register(every, "every"), 0.4, decay=0.5), x, linear(x))
    assert seen["decay"] == 0.5 and {"steps", "step_size", "restarts", "queries"} <= seen.keys()


def test_its_gradients_are_counted(register):
    def once(x, loss, ball, keys):
        return x + ball.epsilon * loss.gradient(x).sign()

    counted = []
    x, w = grid(2, 3), torch.tensor([[1.0, 0.0, float("nan")]]).expand(2, 3)
    attack = Attack(register(once, "once"), 0.5)
    found = perturb(attack, x, linear(w), watch=Watch(counted.append))
    assert len(counted) == 1
    torch.testing.assert_close(found - x, torch.tensor([[0.5, 0, 0]]).expand(2, 3))


@pytest.mark.parametrize(
    ("returned", "said"), [(None, "NoneType"), (torch.zeros(1, 2), r"\[1, 2\]")]
)
def test_what_is_no_point(register, returned, said):
    name = register(lambda x, loss, ball, keys: returned, "none_such")
    with pytest.raises(UsageError, match=f"attack=none_such: must return a point .*{said}"):
        perturb(Attack(name, 0.5), torch.zeros(2, 3), linear(torch.zeros(2, 3)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:f", "ModuleNotFoundError"),
        ("examples.vmi_fgsm:vmi", "AttributeError: .* no attribute 'vmi'"),
        ("examples.vmi_fgsm:NEIGHBOURS", "not a int"),
        (":f", "ValueError"),
    ],
)
def test_what_is_no_function(name, said):
    with pytest.raises(UsageError, match=f"attack={name}: must be package.module:function.*{said}"):
        Attack(name)


def test_a_name_that_is_taken(register):
    with pytest.raises(ValueError, match="name=fgsm: must be a name that no attack has"):
        register(lambda x, loss, ball, keys: x, "fgsm")


def test_the_hash_is_of_the_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    hashes = set()
    for body in ("x", "x + 1", "x"):
        (tmp_path / "own_attack.py").write_text(f"def f(x, loss, ball, keys):\n    return {body}\n")
        sys.modules.pop("own_attack", None)
        import linecache

        linecache.clearcache()
        function = load_function("attack", "own_attack:f")
        assert name_of(function) == "own_attack:f"
        hashes.add(source_hash(function))
    assert len(hashes) == 2


MAKER = "def make(k):\n    def f(x, loss, ball, keys):\n        return {body}\n    return f\n"


def made(k, body="x.sign() * k"):
    """A function that no file has the text of, as in an interpreter."""
    namespace = {"__name__": "no_such_module"}
    exec(compile(MAKER.format(body=body), "<input>", "exec"), namespace)
    return namespace["make"](k)


class Pusher:
    def __init__(self, k):
        self.k = k

    def __call__(self, x, loss, ball, keys):
        return x + self.k

    push = __call__


@pytest.mark.parametrize(
    ("this", "other"),
    [
        (lambda: made(1), lambda: made(2)),
        (lambda: made(1), lambda: made(1, "x.abs() * k")),
        (lambda: made(1, "[y for y in x.sign()][0]"), lambda: made(1, "[y for y in x.abs()][0]")),
        (lambda: functools.partial(far_by, k=1), lambda: functools.partial(far_by, k=2)),
        (lambda: Pusher(1), lambda: Pusher(2)),
        (lambda: Pusher(1).push, lambda: Pusher(2).push),
        (lambda: torch.sign, lambda: torch.abs),
    ],
)
def test_the_hash_of_what_has_no_file_of_its_own(this, other):
    """It is of what the function computes, and not of where it lies in memory."""
    assert source_hash(this()) == source_hash(this()) != source_hash(other())


def test_functions_of_one_file_differ():
    """Lambdas have the same name, and the text of their file is the same."""
    functions = [lambda x: x, lambda x: -x, lambda x: x + 1, lambda x: x + 2, lambda x: x.sin()]
    functions += [lambda x: x.cos(), lambda x: x]
    hashes = [source_hash(function) for function in functions]
    assert len(set(hashes)) == len(hashes)
    assert hashes == [source_hash(function) for function in functions]


def far_by(x, loss, ball, keys, k):
    return x + k


def test_the_hash_is_the_same_in_every_process():
    found = {
        subprocess.run(
            [sys.executable, "-c", PROCESS], check=True, capture_output=True, text=True, cwd=ROOT
        ).stdout
        for _ in range(2)
    }
    assert len(found) == 1 and found != {""}


PROCESS = """
from llm_attack.base.plugins import source_hash
print([source_hash(f) for f in (lambda x: [(lambda: y)() for y in x], print)])
"""
