"""Steps of adversarial training: closed forms on a linear model, and the engine's own attacks."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM

from llm_attack.attacks import Attack, uniform
from llm_attack.demo import MODEL_PATH
from llm_attack.demo.train import train
from llm_attack.lm.engine.adversarial import AdversarialLoss
from llm_attack.lm.engine.attacked import AttackedBatch
from llm_attack.lm.engine.clean import Needs, clean_pass
from llm_attack.lm.engine.scoring import Scorer
from llm_attack.lm.losses import ThreatModel
from llm_attack.lm.network.hook import frozen
from llm_attack.lm.packing.pack import pack_rows
from llm_attack.lm.packing.questions import Question, Request

EPSILON, PAD, HIDDEN = 0.3, 2, 5


class Linear(nn.Module):
    """Two words and padding. The next word depends on the embedding of the last, linearly."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.embed = nn.Embedding(3, HIDDEN, dtype=torch.float64)
            self.weight = nn.Parameter(torch.randn(2, HIDDEN, dtype=torch.float64))
        self.embed.requires_grad_(False)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        logits = self.embed(input_ids) @ self.weight.T
        never = torch.full_like(logits[..., :1], -torch.inf)
        return SimpleNamespace(logits=torch.cat([logits, never], -1))


IDS = torch.tensor([[0, 1, 1, 0], [1, 0, PAD, PAD], [0, 0, 1, PAD]])
PAIRS = torch.tensor([[0, 1], [1, 1], [1, 0], [1, 0], [0, 0], [0, 1]])  # a word and the next one


def step(attack, free=False, ids=IDS, seed=0, model=None):
    """The loss of a step, and the gradient of the head."""
    model = model or Linear()
    loss = AdversarialLoss(attack, free, PAD, seed)(model, ids)
    return loss, model.weight.grad


def exact(shift, pairs=PAIRS):
    """The mean loss, and its gradient, if each margin is lower by shift(w), w its slope."""
    model = Linear()
    x, goals = model.embed(pairs[:, 0]), pairs[:, 1]
    w = model.weight[goals] - model.weight[1 - goals]
    loss = softplus(shift(w) - (w * x).sum(1)).mean()
    loss.backward()
    return loss.item(), model.weight.grad


def same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd", "mifgsm"])
def test_the_worst_case_of_a_linear_model_is_the_dual_norm(name):
    """min over w of the mean of softplus(-(wx - epsilon |w|_1)): the robust counterpart."""
    same(step(Attack(name, EPSILON)), exact(lambda w: EPSILON * w.abs().sum(1)))


def test_in_l2_the_dual_norm_is_l2():
    """Of texts with one prediction: there a ball holds one token."""
    found = step(Attack("fgsm", EPSILON, norm="l2"), ids=PAIRS)
    same(found, exact(lambda w: EPSILON * w.norm(dim=1)))


@pytest.mark.parametrize("attack", [Attack("none"), Attack("pgd", 0.0)])
def test_without_an_attack_it_is_the_cross_entropy(attack):
    same(step(attack), exact(lambda w: 0 * w.sum(1)))


def starts(seed=0):
    """The change of each embedding that is read at the random start; zero for padding."""
    draws = torch.Generator().manual_seed(seed)
    keys = torch.randint(-(2**63), 2**63 - 1, (len(IDS),), generator=draws)
    read = torch.zeros(*IDS[:, :-1].shape, HIDDEN, dtype=torch.float64)
    return EPSILON * uniform(keys, read)


def of_pairs(change):
    """In the order of `PAIRS`: one for each token that predicts another."""
    return change[IDS[:, 1:] != PAD]


def test_freelb_with_one_step_trains_at_the_random_start():
    change = of_pairs(starts())
    same(step(Attack("pgd", EPSILON, steps=1), free=True), exact(lambda w: -(w * change).sum(1)))


def test_freelb_is_the_mean_over_its_points():
    """Each step goes against the margin's slope, and the ball ends it."""
    step_size, points = 0.4 * EPSILON, [of_pairs(starts())]
    model = Linear()
    w = (model.weight[PAIRS[:, 1]] - model.weight[1 - PAIRS[:, 1]]).detach()
    for _ in range(2):
        points.append((points[-1] - step_size * w.sign()).clamp(-EPSILON, EPSILON))
    of_each = [exact(lambda w, change=change: -(w * change).sum(1)) for change in points]
    mean = [sum(values) / 3 for values in zip(*of_each, strict=True)]
    same(step(Attack("pgd", EPSILON, steps=3, step_size=step_size), free=True), mean)


def test_padding_changes_nothing():
    wider = torch.cat([IDS, torch.full((3, 2), PAD)], 1)
    same(step(Attack("bim", EPSILON), ids=wider), step(Attack("bim", EPSILON)))


def test_passes():
    """What the dry run says is what a step does."""
    model, done = Linear(), []
    model.register_forward_hook(lambda *_: done.append(1))
    for attack, free in (
        (Attack("none"), False),
        (Attack("fgsm", EPSILON), False),
        (Attack("pgd", EPSILON, steps=3), False),
        (Attack("pgd", EPSILON, steps=3), True),
    ):
        objective = AdversarialLoss(attack, free, PAD)
        done.clear()
        objective(model, IDS)
        assert len(done) == objective.passes  # those that read only the embedding stop in it


# -- the bundled model ----------------------------------------------------------------------------


TEXTS = [[5, 17, 40, 9, 2], [30, 8, 200, 7, 60, 11, 2], [12, 90, 2]]


@pytest.fixture(scope="module")
def bundled():
    # In float32, the sign of a slope near zero depends on the order of sums.
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH).double()


@pytest.fixture(scope="module")
def ids():
    rows = [torch.tensor(text) for text in TEXTS]
    return nn.utils.rnn.pad_sequence(rows, True, 3)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd"])
def test_the_attack_is_that_of_the_engine(bundled, ids, name, norm):
    """The point of each text: that of the loss `sequence`, with the same random start."""
    attack = Attack(name, 0.01 if norm == "linf" else 0.3, norm=norm, steps=3)
    questions = [Question([Request(tuple(text), 1)], [[0]]) for text in TEXTS]
    with frozen(bundled):
        pack, threat = pack_rows(questions, whole=True), ThreatModel("sequence")
        scorer = Scorer(bundled, bundled.get_input_embeddings(), softmax_dtype=torch.float64)
        clean = clean_pass(scorer, pack, threat, Needs.of([attack]))
        batch = AttackedBatch(scorer, pack, threat, clean)
        expected = batch.attack(attack).x - batch.x  # rows, like ours
    objective = AdversarialLoss(attack, False, 3)
    objective._keys = lambda ids: batch.keys
    found = objective.found(bundled, ids) - objective.clean(bundled, ids)
    for i, text in enumerate(TEXTS):
        n = len(text) - 1
        assert (found[i, :n] - expected[i, :n]).abs().max() < 1e-9
        assert not found[i, n:].any()


def test_plain_steps_are_those_of_the_trainer(bundled, ids):
    """The same weights after two steps; the embedding, which requires no gradient, stays."""
    models = [copy.deepcopy(bundled).requires_grad_(True) for _ in range(2)]
    for model, backward in zip(
        models, (None, AdversarialLoss(Attack("none"), False, 3)), strict=True
    ):
        model.get_input_embeddings().requires_grad_(False)
        train(model, [ids, ids], 0.05, 0.0, backward=backward, bar=False)
    kept = "model.embed_tokens.weight"
    before, of_plain, of_ours = (dict(m.named_parameters()) for m in (bundled, *models))
    for name, weight in of_plain.items():
        torch.testing.assert_close(of_ours[name], weight)
        assert torch.equal(weight, before[name]) == (name == kept), name


def test_modes_and_flags_are_restored(bundled, ids):
    model = copy.deepcopy(bundled).requires_grad_(True).train()
    model.get_input_embeddings().requires_grad_(False)
    modes = []
    model.lm_head.register_forward_hook(lambda head, *_: modes.append(head.training))
    AdversarialLoss(Attack("pgd", 0.01, steps=1), False, 3).found(model, ids)
    assert modes == [False]  # the attack sees no dropout
    assert all(module.training for module in model.modules())
    still = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    assert still == ["model.embed_tokens.weight"]
    assert not model.get_input_embeddings()._forward_hooks
