"""The user's own attacks and losses give the results of equal built-in ones on language models."""

import pytest
import torch
from networks import CPU, exact, network, scorer_of
from test_prefix import asked

from llm_attack.attacks import ATTACKS, Attack, register_attack
from llm_attack.base.errors import UsageError
from llm_attack.lm.engine.diagnostics import Diagnostics
from llm_attack.lm.engine.engine import Engine, Layout
from llm_attack.lm.losses import LOSSES, ThreatModel, register_loss
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.settings import AttackSettings

THREATS = {
    "own": ThreatModel(),
    "shared": ThreatModel(shared=True),
    "choice": ThreatModel("choice", shared=True),
    "each token": ThreatModel("margin", shared=True),
}


def ball_of(threat):
    """Settings of attacks under one of `THREATS`."""
    return {"norm": "l2", "per_token": True} if threat == "each token" else {}


@pytest.fixture(autouse=True)
def registers():
    """As they were, at the end."""
    before = [(table, dict(table)) for table in (ATTACKS, LOSSES)]
    yield
    for table, content in before:
        table.clear()
        table.update(content)


def bim(x, loss, ball, keys, *, steps, step_size):
    point = x
    for _ in range(steps):
        point = ball.step(point, loss.gradient(point), step_size)
    return point


def best_of_noise(x, loss, ball, keys):
    """Of the clean point and a random one, for each example, the one with the greater loss."""
    drawn = ball.stay(ball.drawn(ball.norm.on_sphere, keys))
    with torch.no_grad():
        better = loss(drawn) > loss(x)
    return ball.where(better, drawn, x)


def answers(attacks, threat, longest_tree=0, questions=None):
    """Log-likelihoods (attacks, requests), and the diagnostics of each attack."""
    engine = Engine(
        scorer_of(network("llama")), attacks, threat, CPU, Layout(longest_tree=longest_tree)
    )
    made = asked(gold=threat.shared, examples=(2, 3), n=4) if questions is None else questions
    with exact(), frozen(engine.scorer.model):
        parts = [part for _, part in engine.answers(engine.batches(made, 100))]
    found = [a for part in parts for a in part.answered]
    totals = [Diagnostics() for _ in attacks]
    for part in parts:
        for total, sums in zip(totals, part.diagnostics, strict=True):
            total.add(vars(sums))
    found.sort(key=lambda a: a.question.requests[0].tokens)
    log_likelihoods = [[x for a in found for x, _ in a.answers[i]] for i in range(len(attacks))]
    return torch.tensor(log_likelihoods).double(), totals


@pytest.mark.parametrize("longest_tree", [0, 100])
@pytest.mark.parametrize("threat", THREATS)
def test_bim_of_ones_own(threat, longest_tree):
    names = "bim", register_attack(bim, "own")
    attacks = [Attack(name, 0.05, steps=3, **ball_of(threat)) for name in names]
    found, diagnostics = answers(attacks, THREATS[threat], longest_tree)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-9)
    ours, theirs = (d.report()["zero_gradient_fraction"] for d in diagnostics)
    assert ours == pytest.approx(theirs)


@pytest.mark.parametrize("threat", THREATS)
def test_it_sees_a_loss_for_each_example(threat):
    """Of rows and of trees; each is better or equal, by its own loss."""
    attacks = [
        Attack("none"),
        Attack(register_attack(best_of_noise, "best"), 0.3, **ball_of(threat)),
    ]
    rows, trees = (answers(attacks, THREATS[threat], longest)[0] for longest in (0, 100))
    torch.testing.assert_close(trees, rows, rtol=0, atol=1e-9)
    assert (rows[0] != rows[1]).any()
    if threat == "own":
        none, best = rows
        assert (best != none).any() and (best == none).any()


def test_a_loss_of_ones_own():
    names = {
        "sequence": register_loss(lambda sums: -sums, "all", whole=True),
        "continuation": register_loss(lambda sums: -sums, "end"),
        "choice": register_loss(lambda sums, choices: choices.margin(sums, choices.gold), "odds"),
    }
    for built_in, own in names.items():
        gold = LOSSES[built_in].gold
        assert LOSSES[own].gold == gold
        found = [
            answers([Attack("fgsm", 0.05)], ThreatModel(name, shared=gold), questions=asked(gold))
            for name in (built_in, own)
        ]
        torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=0)


def test_by_their_names_as_arguments(tmp_path, monkeypatch):
    code = "def push(x, loss, ball, keys):\n    return x + ball.epsilon\n"
    code += "def margin(sums, choices):\n    return choices.gap(sums)\n"
    (tmp_path / "my_attacks.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    made = AttackSettings(attack="my_attacks:push", loss="my_attacks:margin", epsilon=0.5)
    assert made.needs_gold and made.shared
    assert made.attack_in_units.condition == "my_attacks:push@0.5"
    for name in ("attack", "loss"):
        with pytest.raises(UsageError, match=f"{name}=my_attacks:pull: must be package.module:"):
            AttackSettings(**{name: "my_attacks:pull"})
    with pytest.raises(
        UsageError, match=r"loss=sequenze: must be one of .*did you mean 'sequence'"
    ):
        AttackSettings(loss="sequenze")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x, loss, ball: x, "too many positional arguments"),
        (lambda x, loss, ball, keys, alpha: x, "missing a required argument: 'alpha'"),
        (lambda x, loss, ball, keys, *, alpha: x, "missing a required .*argument: 'alpha'"),
        (dict.fromkeys, "too many positional|no signature"),
    ],
)
def test_an_attack_of_other_parameters(function, said):
    with pytest.raises(UsageError, match=f"attack=strange: must take x, loss, ball, keys.*{said}"):
        register_attack(function, "strange")
    assert "strange" not in ATTACKS


@pytest.mark.parametrize(
    "function",
    [
        lambda: 1,
        lambda *sums: sums[0],
        lambda sums, *, choices: sums,
        lambda sums, choices, more: sums,
        lambda **sums: sums,
    ],
)
def test_a_loss_of_other_parameters(function):
    with pytest.raises(
        UsageError, match="loss=strange: must take the arguments sums, or sums and choices"
    ):
        register_loss(function, "strange")
    assert "strange" not in LOSSES


def test_a_default_is_no_choices():
    """A loss with a parameter of its own does not know the gold by it."""
    name = register_loss(lambda sums, temperature=2.0: -sums / temperature, "warm")
    assert not LOSSES[name].gold
    sums = torch.tensor([-2.0, -4.0])
    assert LOSSES[name].value(sums, None).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda sums: -sums.mean(), r"each request, shape \[\d+\], not Tensor"),
        (lambda sums: "x", r"each request, shape \[\d+\], not str"),
        (lambda sums: sums[:1], r"each request, shape \[\d+\], not \[1\]"),
        (lambda sums, choices: sums, r"each question, shape \[\d+\], not \[\d+\]"),
        (lambda sums, choices: choices.matrix(sums), r"each question, .*not \[\d+, \d+\]"),
        (lambda sums, choices: choices.gap(sums).sum(), "each question, .*not Tensor"),
    ],
)
def test_a_loss_that_is_not_of_each_example(function, said):
    """A mean over the batch would depend on what else is in it."""
    name = register_loss(function, "strange")
    threat = ThreatModel(name, shared=LOSSES[name].gold)
    questions = asked(gold=threat.shared, examples=(2, 3), n=4)
    with pytest.raises(UsageError, match=f"loss=strange: must return a value for {said}"):
        answers([Attack("fgsm", 0.05)], threat, questions=questions)


@pytest.mark.parametrize("name", ["", "worst", "a/b", "../x", "a,b", "a@b", "a b", "a=b", "\n", 3])
@pytest.mark.parametrize("register", [register_attack, register_loss])
def test_names_that_no_file_or_list_can_have(register, name):
    function = bim if register is register_attack else (lambda sums: -sums)
    with pytest.raises(UsageError, match=r"name=.*must be letters, digits"):
        register(function, name)
