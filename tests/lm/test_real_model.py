"""A trained model: true statements are likely, and attacks do what their names say."""

import copy

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from llm_attack.harness.model import AttackedHFLM

pytestmark = pytest.mark.slow  # reading its weights takes longer than all that they are asked

FACTS = [
    ("The capital of France is", " Paris", " Rome"),
    ("Ice is frozen", " water", " fire"),
    ("In summer it is warm, and in winter it is", " cold", " hot"),
    ("The sun rises in the east and sets in the", " west", " south"),
]
EPSILON = "0.01rms"  # so small that the gradient tells what happens


@pytest.fixture(scope="module")
def requests():
    """Of each fact the true continuation and the false one."""
    pairs = [(context, choice) for context, *choices in FACTS for choice in choices]
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


@pytest.fixture(scope="module")
def lm(real_model):
    return AttackedHFLM(str(real_model), attack="none", device="cpu", batch_size=8)


@pytest.fixture(scope="module")
def answers(lm, requests):
    """attack -> log-likelihoods of the requests."""
    found = {}
    for attack in ("none", "random", "fgsm", "reversed"):
        lm.use(type(lm.settings)(attack=attack, epsilon=EPSILON, loss="continuation"))
        found[attack] = [ll for ll, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    return found


def test_it_knows(answers):
    clean = answers["none"]
    assert all(true > false for true, false in zip(clean[::2], clean[1::2], strict=True))


def test_as_in_stock(lm, requests, answers):
    stock = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer)
    expected = [ll for ll, _ in stock.loglikelihood(requests, disable_tqdm=True)]
    assert answers["none"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("task", ["hellaswag", "piqa"])
def test_nearer_to_float64_than_stock(lm, build, real_data, task):
    """Of ten real questions with long choices: by the mean, in squares, and at the most.

    Not of each request: roundings of one may cancel in stock by chance.
    """
    asked = build(task, 10).instances
    exact_model = copy.deepcopy(lm.model).double()
    exact = HFLM(pretrained=exact_model, tokenizer=lm.tokenizer, softmax_dtype=torch.float64)
    stock = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=16)
    lm.use(type(lm.settings)(attack="none"))
    reference, ours, theirs = (
        np.array([ll for ll, _ in of.loglikelihood(asked, disable_tqdm=True)])
        for of in (exact, lm, stock)
    )
    here, there = abs(ours - reference), abs(theirs - reference)
    assert 0 < here.mean() <= there.mean()
    assert (here**2).sum() <= (there**2).sum()
    assert here.max() <= there.max()
    assert abs(ours - theirs).max() <= here.max() + there.max()


def test_sign_flip(answers):
    """Along the gradient's sign every likelihood falls; against it, every one rises."""
    for clean, down, up in zip(*(answers[a] for a in ("none", "fgsm", "reversed")), strict=True):
        assert down < clean < up


def test_gradients_cost_more_than_noise(answers):
    noise, fgsm = sum(answers["random"]), sum(answers["fgsm"])
    assert fgsm < noise
